"""Random steps over poisoned pools, and both CPU backends to run them on."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from tierkv.kernels import cpu_native, ops
from tierkv.kernels.metadata import AttentionMetadata, build_metadata


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small problems on a busy machine: waiting for a second thread takes most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["torch", "native"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on this CPU implementation; native is skipped where it cannot be built."""
    if request.param == "native" and cpu_native.library() is None:
        pytest.skip("no C compiler")
    ops.set_backend(request.param)
    yield request.param
    ops.set_backend("auto")


@dataclass
class Shape:
    """Axes of an attention problem."""

    dtype: torch.dtype = torch.float32
    group: int = 3
    num_kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16


@dataclass
class Step:
    """A step whose pool holds NaN wherever no live token is."""

    shape: Shape
    rng: random.Random
    query_lens: list[int]
    context_lens: list[int]
    pad_elements: int = 0
    q: Tensor = field(init=False)
    kv: Tensor = field(init=False)
    meta: AttentionMetadata = field(init=False)
    block_tables: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        s = self.shape
        self.block_tables = self._draw_tables()
        self.kv = self._poisoned_layer()
        self.meta = build_metadata(
            self.query_lens, self.context_lens, self.block_tables, s.block_size
        )
        self._fill()
        # As a model makes it: head-major in memory, so the rows are not contiguous.
        heads = s.num_kv_heads * s.group
        q = torch.randn(heads, sum(self.query_lens), s.head_dim)
        self.q = q.to(s.dtype).transpose(0, 1)

    def _draw_tables(self) -> list[list[int]]:
        """Disjoint tables over a shuffled pool twice as big, longer than needed by up to two."""
        needs = [-(-n // self.shape.block_size) for n in self.context_lens]
        ids = list(range(2 * sum(needs) + 2 * len(needs)))
        self.rng.shuffle(ids)
        return [[ids.pop() for _ in range(need + self.rng.randint(0, 2))] for need in needs]

    def _poisoned_layer(self) -> Tensor:
        """One of three layers; with padding, blocks whose stride no head divides."""
        s = self.shape
        block = (3, 2, s.num_kv_heads, s.block_size, s.head_dim)
        num_blocks = 1 + max(max(table) for table in self.block_tables)
        elements = 6 * s.num_kv_heads * s.block_size * s.head_dim
        flat = torch.full((num_blocks, elements + self.pad_elements), torch.nan, dtype=s.dtype)
        return flat[:, :elements].unflatten(1, block)[:, 1]

    def _fill(self) -> None:
        """Write a random key and value for every token of every context."""
        s = self.shape
        whole = build_metadata(
            self.context_lens, self.context_lens, self.block_tables, s.block_size
        )
        tokens = (sum(self.context_lens), s.num_kv_heads, s.head_dim)
        k, v = (torch.randn(tokens).to(s.dtype) for _ in range(2))
        ops.write_kv(self.kv, k, v, whole.slot_mapping)


@pytest.fixture
def make_step(rng: random.Random):
    """`make_step(shape, query_lens, context_lens)`."""

    def make(
        shape: Shape, query_lens: list[int], context_lens: list[int], pad_elements: int = 0
    ) -> Step:
        return Step(shape, rng, query_lens, context_lens, pad_elements)

    return make


@pytest.fixture
def shape_type() -> type[Shape]:
    """The class of problem shapes (test modules cannot import from here)."""
    return Shape
