"""Runs a plan on the model: copies, one packed forward, logits of the wanted rows."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from tierkv.cache.pools import GpuPool
from tierkv.errors import ConfigError
from tierkv.kernels.metadata import warm_up_steps
from tierkv.kernels.ops import copy_blocks, widen_nuclei
from tierkv.model.attention import StepContext, current_step
from tierkv.model.graphs import DecodeBuffers, DecodeGraphs, GraphBackend
from tierkv.model.inputs import (
    BlockTables,
    StepInputs,
    TokenSource,
    late_tokens,
    pack_rows,
    to_device,
)
from tierkv.model.loaded import LoadedModel

if TYPE_CHECKING:
    from tierkv.engine.plan import Plan
    from tierkv.types import BlockCopy


class ModelRunner:
    """The executor of a real model; owns the bytes of the GPU pool.

    Args:
        loaded: a model whose attention is tierkv's.
        pool: blocks of the model's layout, on the model's device.

    Raises:
        ConfigError: the pool is not of the model's shape.
    """

    def __init__(self, loaded: LoadedModel, pool: GpuPool) -> None:
        if pool.layout != loaded.layout(pool.layout.block_size):
            fix = f"the model needs {loaded.layout(pool.layout.block_size)}"
            raise ConfigError("pool", pool.layout, fix)
        self.loaded = loaded
        self.pool = pool
        self.tables = BlockTables()
        self.graphs: DecodeGraphs | None = None
        self._windows = loaded.windows
        self._passes_step = loaded.passes_step
        parameters = inspect.signature(loaded.model.forward).parameters
        self._selects_logits = "logits_to_keep" in parameters

    def run(self, plan: Plan) -> Tensor:
        """Copy-on-write, then the forward of all rows.

        Returns:
            fp32 `[sum(row.num_logit_rows), vocab_size]`, rows in plan order; valid until the next
            run.
        """
        with torch.inference_mode():
            self._copy(plan.copies)
            inputs = pack_rows(plan.rows, self.tables, self.pool.layout.block_size)
            source = cast("TokenSource | None", plan.unread)
            late = late_tokens(plan.rows, source) if source is not None else None
            if self.graphs is not None and self.graphs.can_run(inputs):
                return self.graphs.run(inputs, late)
            inputs = inputs.to(self.loaded.device)
            if late is not None:
                late.put(inputs.input_ids[0])
            return self.forward(inputs)

    def warm_up(self) -> None:
        """Have every kernel compiled that a step can ask for; reads block 0 and writes none."""
        device = self.pool.device
        for meta in warm_up_steps(self.pool.layout.block_size, device):
            zeros = torch.zeros(1, meta.num_tokens, dtype=torch.int64, device=device)
            self.forward(StepInputs(zeros, zeros, meta, zeros[0, :1]))
        logits = torch.zeros(1, self.loaded.vocab_size, device=device)
        number = logits[:, 0].clone()  # sampling launches one kernel, for wide nuclei
        widen_nuclei(logits, number, number, number.bool(), number)

    def capture(self, sizes: Sequence[int], max_model_len: int, backend: GraphBackend) -> None:
        """Let steps of decode rows replay graphs from now on, if the model can be captured.

        Args:
            sizes: batch sizes.
            max_model_len: tokens of the longest context.
            backend: makes the graphs.
        """
        vocab_size, device = self.loaded.vocab_size, self.loaded.device
        buffers = DecodeBuffers(
            max(sizes), max_model_len, self.pool.layout.block_size, vocab_size, device
        )
        graphs = DecodeGraphs(self.forward, buffers, self.pool.num_blocks, backend)
        self.graphs = graphs if graphs.try_capture(sizes) else None

    def forget(self, seq_id: int) -> None:
        """The sequence is finished or was preempted; unknown ids are ignored."""
        self.tables.forget(seq_id)

    @torch.inference_mode()
    def forward(self, inputs: StepInputs, out: Tensor | None = None) -> Tensor:
        """One forward pass; writes the KV of every row.

        Args:
            inputs: the step, on the model's device.
            out: fp32 `[num_logit_rows, vocab_size]` for the logits; allocated if None.

        Returns:
            out.
        """
        step = StepContext(self.pool, inputs.meta, self._windows)
        kwargs = {
            "input_ids": inputs.input_ids,
            "position_ids": inputs.position_ids,
            "use_cache": False,
        }
        if self._selects_logits:
            kwargs["logits_to_keep"] = inputs.logit_rows
        if self._passes_step:
            logits = self.loaded.model(**kwargs, tierkv_step=step).logits[0]
        else:
            with current_step(step):
                logits = self.loaded.model(**kwargs).logits[0]
        if not self._selects_logits:
            logits = logits[inputs.logit_rows]
        result: Tensor = logits.float() if out is None else out.copy_(logits)
        return result

    def _copy(self, copies: list[BlockCopy]) -> None:
        if not copies:
            return
        device = self.pool.device
        sources = to_device(torch.tensor([copy.source for copy in copies]), device)
        targets = to_device(torch.tensor([copy.destination for copy in copies]), device)
        num_tokens = max(copy.num_tokens for copy in copies)
        copy_blocks(self.pool.tensor, sources, targets, num_tokens)
