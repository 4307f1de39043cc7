"""Decode steps as graphs: one launch instead of one for every kernel.

A step of which every row is one token that wants one row of logits has only numbers for inputs:
token ids, positions, context lengths, slots, block tables. They are written into buffers that never
move, and a graph that was captured over those buffers is replayed. There is a graph for each of a
ladder of batch sizes; a step takes the smallest that holds it, and fills up with padding rows:

    token 0 at position 0, context length 0, slot -1, the row's block table of an earlier step

A padding row reads no key and writes none, and its attention is zero, so its activations are
finite; rows do not read each other, so the others come out as they do without it. Logits go to a
buffer that all sizes share.

The metadata's lists are read when kernels are launched, which for a graph is once, at capture; then
they say the most there can be (`max_model_len` for every row). CUDA graphs have not yet run on a
GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from tierkv.kernels.metadata import AttentionMetadata
from tierkv.model.inputs import LateTokens, StepInputs, to_device

logger = logging.getLogger(__name__)

_LARGEST = 512
"""Default end of the ladder; larger steps launch their kernels one by one."""

Forward = Callable[[StepInputs, Tensor], object]
"""Computes a step and writes its logits into a tensor."""


def batch_sizes(max_num_seqs: int, asked: Sequence[int] = ()) -> list[int]:
    """The ladder: 1, 2, 4, then multiples of 8, then of 16 above 256; ascending.

    Args:
        max_num_seqs: rows of the largest decode step.
        asked: one number is the end of the ladder instead of 512; several are the ladder.
    """
    if len(asked) > 1:
        sizes = set(asked)
    else:
        sizes = {1, 2, 4, *range(8, 256, 8), *range(256, 1 + max(256, max_num_seqs), 16)}
        end = min(max_num_seqs, asked[0] if asked else _LARGEST)
        sizes = {size for size in sizes if size < end} | {end}
    return sorted(size for size in sizes if size <= max_num_seqs) or [max_num_seqs]


class GraphBackend(Protocol):
    """Turns a computation over fixed buffers into one that can be repeated."""

    def capture(self, run: Callable[[], object]) -> Callable[[], object]:
        """A function that computes what `run` does, over the same buffers.

        Raises:
            RuntimeError: `run` does something that cannot be captured.
        """
        ...


class PlainBackend:
    """Repeats the computation itself: what a device without graphs does, and tests."""

    def capture(self, run: Callable[[], object]) -> Callable[[], object]:
        """See `GraphBackend`."""
        run()
        return run


class CudaBackend:
    """CUDA graphs that share one pool of memory; capture the largest first. Not yet run on a GPU.

    Args:
        device: of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, run: Callable[[], object]) -> Callable[[], object]:
        """See `GraphBackend`. Runs twice: kernels are compiled and loaded before the capture."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Threads that move blocks may go on calling CUDA meanwhile. A capture that fails leaves its
        # stream behind as the current one; the outer context puts back the one before.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"),
        ):
            run()
        return graph.replay


class DecodeBuffers:
    """Inputs and outputs of decode steps of up to `num_rows` rows, at addresses that stay.

    Attributes:
        tables: int64 `[num_rows, blocks of the longest context]`.
        logits: fp32 `[num_rows, vocab_size]`.
    """

    def __init__(
        self,
        num_rows: int,
        max_model_len: int,
        block_size: int,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self.max_model_len, self.block_size = max_model_len, block_size
        self.device = device
        width = -(-max_model_len // block_size)
        make = partial(torch.zeros, dtype=torch.int64, device=device)
        self.tables: Tensor = make(num_rows, width)
        self.logits = torch.zeros(num_rows, vocab_size, dtype=torch.float32, device=device)
        self._columns: Tensor = make(4 * num_rows)
        self._counts = torch.arange(num_rows + 1, device=device)
        self._zeros: Tensor = make(num_rows)

    def inputs(self, size: int, context_lens: list[int], num_blocks: int) -> StepInputs:
        """A step over the first `size` rows of the buffers.

        Args:
            size: rows.
            context_lens: of each row, at most, as far as the host knows; read by reference.
            num_blocks: of the pool.
        """
        token_ids, positions, context, slots = self._columns_of(size)
        meta = AttentionMetadata(
            query_start=self._counts[: size + 1],
            context_lens=context,
            key_start=self._zeros[:size],
            key_lens=context,
            block_tables=self.tables[:size],
            positions=positions,
            slot_mapping=slots,
            block_size=self.block_size,
            query_len_list=[1] * size,
            context_len_list=context_lens,
            key_start_list=[0] * size,
            key_len_list=context_lens,
            max_block_id=num_blocks - 1,
        )
        counts = self._counts[:size]
        return StepInputs(token_ids.unsqueeze(0), positions.unsqueeze(0), meta, counts)

    def clear(self, size: int) -> None:
        """Make all of the first `size` rows padding."""
        self._columns_of(size).copy_(to_device(_padding(size), self.device), non_blocking=True)

    def fill(self, step: StepInputs, size: int, late: LateTokens | None = None) -> None:
        """Write a step, whose tensors are in CPU memory, and padding up to `size` rows.

        Args:
            step: the step.
            size: rows.
            late: those of its tokens that are on the device.
        """
        meta, columns = step.meta, _padding(size)
        num_rows, num_blocks = meta.block_tables.shape
        columns[0, :num_rows] = step.input_ids[0]
        columns[1, :num_rows] = meta.positions
        columns[2, :num_rows] = meta.context_lens
        columns[3, :num_rows] = meta.slot_mapping
        self._columns_of(size).copy_(to_device(columns, self.device), non_blocking=True)
        if late is not None:
            late.put(self._columns_of(size)[0])
        table = to_device(meta.block_tables, self.device)
        self.tables[:num_rows, :num_blocks].copy_(table, non_blocking=True)

    def _columns_of(self, size: int) -> Tensor:
        """`[4, size]`, contiguous: token ids, positions, context lengths, slots."""
        return self._columns[: 4 * size].view(4, size)


def _padding(size: int) -> Tensor:
    """Columns of rows that are all padding."""
    columns = torch.zeros(4, size, dtype=torch.int64)
    columns[3] = -1
    return columns


class DecodeGraphs:
    """Graphs of a model's decode steps.

    Args:
        forward: the model.
        buffers: for as many rows as the largest batch size has.
        num_blocks: of the pool.
        backend: makes the graphs.

    Attributes:
        sizes: batch sizes that have a graph, ascending.
    """

    def __init__(
        self, forward: Forward, buffers: DecodeBuffers, num_blocks: int, backend: GraphBackend
    ) -> None:
        self.sizes: list[int] = []
        self._forward = forward
        self._buffers = buffers
        self._num_blocks = num_blocks
        self._backend = backend
        self._lens: dict[int, list[int]] = {}
        self._replays: dict[int, Callable[[], Any]] = {}

    @torch.inference_mode()
    def try_capture(self, sizes: Sequence[int]) -> bool:
        """Capture the largest size first; whether all could be. Says why not, once."""
        for size in sorted(sizes, reverse=True):
            self._lens[size] = [self._buffers.max_model_len] * size
            self._buffers.clear(size)
            try:
                self._replays[size] = self._backend.capture(partial(self._compute, size))
            except RuntimeError as error:
                reason = (str(error).strip().splitlines() or [repr(error)])[0]
                logger.warning("decode steps run without graphs: %s", reason)
                return False
        self.sizes = sorted(sizes)
        return True

    def can_run(self, step: StepInputs) -> bool:
        """Whether it is made of decode rows, and there is a graph that holds it."""
        num_rows, num_blocks = step.meta.block_tables.shape
        is_decode = step.meta.num_tokens == step.logit_rows.shape[0] == num_rows
        fits = bool(self.sizes) and num_rows <= self.sizes[-1]
        return is_decode and fits and num_blocks <= self._buffers.tables.shape[1]

    def run(self, step: StepInputs, late: LateTokens | None = None) -> Tensor:
        """Logits `[num_rows, vocab_size]` of a step that can be run, until the next one.

        Args:
            step: its tensors in CPU memory.
            late: those of its tokens that are on the device.
        """
        num_rows = step.meta.num_seqs
        size = next(size for size in self.sizes if size >= num_rows)
        self._buffers.fill(step, size, late)
        self._lens[size][:] = step.meta.context_len_list + [0] * (size - num_rows)
        self._replays[size]()
        return self._buffers.logits[:num_rows]

    def _compute(self, size: int) -> None:
        """What is captured; every call has fresh metadata, so nothing derived from it is stale."""
        step = self._buffers.inputs(size, self._lens[size], self._num_blocks)
        self._forward(step, self._buffers.logits[:size])
