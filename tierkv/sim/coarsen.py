"""The same trace in larger blocks.

An id stands for the whole prefix that ends with its block, so the id of `factor` blocks together is
that of the last of them. Fewer blocks are faster to simulate; what is shared is found in steps of
the larger block, as an engine with that block size would.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from tierkv.errors import ConfigError
from tierkv.sim.trace import Run, Trace, TraceRequest


def coarsen(trace: Trace, block_size: int) -> Trace:
    """A trace with blocks of `block_size` tokens.

    Raises:
        ConfigError: it is no multiple of the trace's own block size.
    """
    factor, rest = divmod(block_size, trace.block_size)
    if rest or factor < 1:
        fix = f"must be a multiple of the trace's {trace.block_size}: its ids stand for so many"
        raise ConfigError("coarsen", block_size, fix)
    if factor == 1:
        return trace

    def begin() -> Iterator[TraceRequest]:
        for request in trace:
            yield dataclasses.replace(request, runs=_every(request.runs, factor))

    return Trace(trace.name, block_size, begin)


def _every(runs: tuple[Run, ...], factor: int) -> tuple[Run, ...]:
    """The ids at every `factor`-th place, each a run of its own."""
    found: list[Run] = []
    missing = factor
    for first, count in runs:
        found.extend((first + i, 1) for i in range(missing - 1, count, factor))
        missing = factor - (count - missing) % factor if count >= missing else missing - count
    return tuple(found)
