"""All ranks run a plan: rank 0 tells the others and runs it as well."""

from __future__ import annotations

from typing import Any

from tierkv.engine.plan import Plan
from tierkv.engine.tp.group import TpGroup
from tierkv.engine.tp.steps import StepEncoder
from tierkv.protocols import Executor


class TpExecutor:
    """The `Executor` of a model over several ranks.

    Args:
        local: runs rank 0's part, and has the whole logits.
        group: the other ranks.
    """

    def __init__(self, local: Executor, group: TpGroup) -> None:
        self._local, self._group = local, group
        self._encoder = StepEncoder()

    def run(self, plan: Plan) -> Any:
        """As `ModelRunner.run`.

        Raises:
            EngineDeadError: a worker has ended.
        """
        with self._group.guarded():
            self._group.tell("step", self._encoder.encode(plan))
            return self._local.run(plan)

    def forget(self, seq_id: int) -> None:
        self._local.forget(seq_id)
        self._encoder.forget(seq_id)
