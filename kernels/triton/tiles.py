"""How attention is cut into programs: tile sizes, warps and stages, and parts of long contexts.

Tables instead of trials: nothing is timed while requests wait. The sizes follow from what a
multiprocessor holds (shared memory for `num_stages` tiles of keys and values, registers for an
fp32 accumulator of `block_m x block_d`); they are not yet tuned on a GPU.

    rows of a tile   tokens x heads of one KV head's group, tokens = block_m // heads
    grid             tiles, num_kv_heads * head_tiles, parts of the context
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

MAX_HEAD_DIM = 256

_MAX_TILE_HEADS = 64  # larger groups are cut into several tiles of heads
_MAX_PARTS = 256
_MAX_PART_KEYS = 8192  # of a decode row: one long context must not keep a batch waiting
_MAX_BALANCING_PARTS = 32  # for that purpose; partial results take memory
_MIN_PART_KEYS = {True: 256, False: 1024}  # of a decode row or a chunk: what merging costs is small
_ROOMY = ((8, 0), (9, 0), (10, 0), (10, 3))  # 160 KiB of shared memory or more


@dataclass(frozen=True, slots=True)
class Device:
    """What a launch needs to know of a GPU.

    Attributes:
        num_sms: multiprocessors.
        capability: compute capability, such as (9, 0).
    """

    num_sms: int
    capability: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Tile:
    """One program's share of the work, and the compiler's options for it.

    Attributes:
        block_m: rows, tokens x heads.
        block_n: keys per turn of the loop.
        num_warps: warps that share a tile.
        num_stages: turns of the loop whose loads may be under way at once.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class KvShape:
    """One layer's blocks."""

    num_kv_heads: int
    block_size: int
    head_dim: int


@dataclass(frozen=True)
class AttendShape:
    """What the attention kernel is compiled for; see `attend.attend`.

    Attributes:
        group: query heads per KV head.
        heads: of them in one tile; the last of the `head_tiles` may have fewer.
        tokens: new tokens of one sequence in one tile.
        block_m, block_n, block_d: rows, keys and padded head elements of a tile.
        is_split: do several parts of a context give partial results?
        min_tiles: key tiles that a part has at least.
        precision: how fp32 is multiplied; 16-bit types know one way.
    """

    group: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    heads: int
    tokens: int
    block_m: int
    block_n: int
    block_d: int
    has_window: bool
    has_softcap: bool
    is_split: bool
    min_tiles: int
    precision: str = "ieee"

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return self.group * self.num_kv_heads

    def merged(self) -> MergeShape:
        """What the merge of a split context is compiled for."""
        return MergeShape(self.num_heads, self.head_dim, self.block_d, self.tokens)

    @property
    def head_tiles(self) -> int:
        """Tiles of heads per KV head."""
        return -(-self.group // self.heads)

    @property
    def has_whole(self) -> bool:
        """Is it worth a loop of its own that most keys are visible to all rows of a tile?"""
        return self.tokens > 1 and not self.has_window


@dataclass(frozen=True)
class MergeShape:
    """What `merge.merge_parts` is compiled for; attributes as in `AttendShape`."""

    num_heads: int
    head_dim: int
    block_d: int
    tokens: int


def tile_heads(group: int) -> int:
    """Heads of a group of query heads (those that share one KV head) in each of its tiles."""
    return -(-group // -(-group // _MAX_TILE_HEADS))


def power_of_two(count: int, least: int = 16) -> int:
    """The first power of two that is not below `count` or `least`."""
    return max(least, 1 << (count - 1).bit_length())


def decode_tile(shape: KvShape, group: int, dtype: torch.dtype, device: Device) -> Tile:
    """The tile of a sequence's single new row, whose loop is bound by memory.

    Tensor cores want 16 rows at least, so smaller groups are padded. Several programs share a
    multiprocessor.
    """
    block_m = power_of_two(tile_heads(group))
    is_wide = shape.head_dim > 128
    if dtype is torch.float32:
        return Tile(block_m, 16 if is_wide else 32, num_warps=8, num_stages=2)
    block_n = 32 if is_wide else 64
    num_warps = 4 if block_m * shape.head_dim <= 4096 else 8
    return Tile(block_m, block_n, num_warps, _num_stages(2 if _is_roomy(device) else 1))


def prefill_tile(shape: KvShape, group: int, dtype: torch.dtype, device: Device) -> Tile:
    """The tile of a run of new rows, bound by arithmetic: as large as the registers allow."""
    is_wide = shape.head_dim > 128
    if dtype is torch.float32:
        block_m = power_of_two(tile_heads(group), 32)
        return Tile(block_m, 16 if shape.head_dim > 64 else 32, num_warps=8, num_stages=1)
    block_n = 32 if is_wide else 64
    num_stages = _num_stages(2 if _is_roomy(device) else 1)
    # Before and beside the large chips of 9.x and 10.x, operands of a product are in registers.
    is_tight = is_wide and device.capability[0] not in (9, 10)
    return Tile(64 if is_tight else 128, block_n, 8, num_stages)


def _is_roomy(device: Device) -> bool:
    return device.capability in _ROOMY


def _num_stages(in_flight: int) -> int:
    """The compiler's stages with which `in_flight` tiles of keys and values are loaded ahead.

    The compiler spreads `num_stages - 2` turns evenly over the two loads that wait for each other:
    of block ids, and of what they point at.
    """
    return 2 * in_flight + 1


def attend_shape(
    tile: Tile,
    shape: KvShape,
    group: int,
    *,
    is_decode: bool,
    has_window: bool = False,
    has_softcap: bool = False,
) -> AttendShape:
    """What to compile for a tile of these blocks and as many heads per KV head, nothing split."""
    heads = tile_heads(group)
    return AttendShape(
        group=group,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        block_size=shape.block_size,
        heads=heads,
        tokens=1 if is_decode else tile.block_m // heads,
        block_m=tile.block_m,
        block_n=tile.block_n,
        block_d=power_of_two(shape.head_dim),
        has_window=has_window,
        has_softcap=has_softcap,
        is_split=False,
        min_tiles=_MIN_PART_KEYS[is_decode] // tile.block_n,
    )


def count_parts(num_programs: int, max_keys: int, device: Device, shape: AttendShape) -> int:
    """Parts into which every context is cut, from bounds that the host knows.

    Enough to fill the GPU; where and into how many of them a context is really cut follows from
    its own length, on the device.

    Args:
        num_programs: programs without cutting.
        max_keys: keys that a tile can see at most.
        device: the GPU.
        shape: of the tiles.
    """
    is_decode = shape.tokens == 1
    wanted = device.num_sms * (2 if is_decode else 1) // max(num_programs, 1)
    if is_decode:
        wanted = max(wanted, min(-(-max_keys // _MAX_PART_KEYS), _MAX_BALANCING_PARTS))
    return max(1, min(wanted, -(-max_keys // (shape.min_tiles * shape.block_n)), _MAX_PARTS))
