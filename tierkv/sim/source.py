"""Where a trace comes from, as something that another process can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tierkv.errors import ConfigError
from tierkv.sim.coarsen import coarsen
from tierkv.sim.generate import generate_trace
from tierkv.sim.trace import Trace
from tierkv.sim.trace_formats import ReadOptions
from tierkv.sim.trace_lines import Problem
from tierkv.sim.traces import MOST_PROBLEMS, OnProblem, read_trace
from tierkv.sim.workloads import WORKLOADS


@dataclass(slots=True, frozen=True)
class Source:
    """A file, or a generated workload.

    Attributes:
        name: path of the file, or name of the workload.
        read: how to read the file.
        limit: requests, from the start; a workload needs it.
        coarsen: tokens per block, a multiple of the trace's own; None: its own.
        most_problems: bad lines that a file may have.
        seed, knobs: of a workload.
    """

    name: str
    read: ReadOptions = field(default_factory=ReadOptions)
    limit: int | None = None
    coarsen: int | None = None
    most_problems: int = MOST_PROBLEMS
    seed: int = 0
    knobs: tuple[tuple[str, Any], ...] = ()

    def open(self, on_problem: OnProblem | None = None) -> Trace:
        """The trace.

        Args:
            on_problem: told of bad lines each time it is read; None: nobody is.

        Raises:
            ConfigError: there is no such file or workload, or it cannot be read.
        """
        trace = self._generated() if self.name in WORKLOADS else self._from_file(on_problem)
        return trace if self.coarsen is None else coarsen(trace, self.coarsen)

    def _generated(self) -> Trace:
        count = 10_000 if self.limit is None else self.limit
        return generate_trace(self.name, num_requests=count, seed=self.seed, **dict(self.knobs))

    def _from_file(self, on_problem: OnProblem | None) -> Trace:
        try:
            return read_trace(
                self.name,
                limit=self.limit,
                options=self.read,
                on_problem=on_problem or _ignore,
                most_problems=self.most_problems,
            )
        except ConfigError as error:
            if "/" in self.name or "." in self.name:
                raise
            fix = f"{error.fix}; generated workloads are {', '.join(WORKLOADS)}"
            raise ConfigError(error.option, error.value, fix) from None


def _ignore(problem: Problem) -> None:
    """Somebody else has been told."""
