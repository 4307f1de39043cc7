"""The conservation laws of the cache. Tests run them after every step, production when idle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tierkv.cache.holder import BlockHolder
from tierkv.cache.kept import is_bound
from tierkv.cache.prefix_tree import Block
from tierkv.cache.residency import CopyState
from tierkv.cache.tiered_cache import CPU, GPU, NVME, TieredCache
from tierkv.errors import InvariantError


def check_cache(cache: TieredCache, sequences: Sequence[BlockHolder]) -> None:
    """Raise InvariantError unless every law holds.

    Args:
        sequences: all that may hold blocks (no copy-on-write may be in flight).
    """
    held = [block for seq in sequences for block in seq.blocks if block is not None]
    found = [*cache.tree, *held, *cache.tails.blocks]
    blocks = list({id(block): block for block in found}.values())
    _check_slots(cache, blocks)
    _check_pins(blocks, held)
    _check_readers(cache, blocks)
    _check_evictable(cache)
    _check_shares(cache, blocks)
    _check_tree(cache)
    _check_tables(cache, sequences)


def _require(law: bool, message: str) -> None:
    if not law:
        raise InvariantError(message)


def _check_slots(cache: TieredCache, blocks: list[Block]) -> None:
    """empty + filling + ready + draining == capacity, and no slot has two owners."""
    moving = [] if cache.moves is None else [*cache.moves.tickets.values()]
    for name, tier in cache.residency.tiers.items():
        copies = [block.copies[name] for block in blocks if name in block.copies]
        copies += [
            ticket.copy
            for ticket in moving
            if ticket.is_late and not ticket.is_released and ticket.move.destination is name
        ]
        states = Counter(copy.state for copy in copies)
        for state in (CopyState.FILLING, CopyState.READY, CopyState.DRAINING):
            _require(tier.counts[state] == states[state], f"{name.value}: {state} miscounted")
        _require(tier.counts[CopyState.EMPTY] == tier.num_empty, f"{name.value}: empty miscounted")
        slots = [copy.slot for copy in copies] + tier.empty_slots
        _require(sorted(slots) == list(range(tier.capacity)), f"{name.value}: a slot leaked")
        noted = bytearray(tier.capacity)
        for copy in copies:
            noted[copy.slot] = copy.state.code if isinstance(copy.state, CopyState) else 0
        _require(noted == tier.slot_states, f"{name.value}: a slot's state is not its copy's")


def _check_pins(blocks: list[Block], held: list[Block]) -> None:
    """A block is pinned once for every sequence that holds it."""
    holders = Counter(id(block) for block in held)
    for block in blocks:
        if block.pins != holders.get(id(block), 0):
            raise InvariantError(f"block {block.key.hex()}: pins miscounted")


def _check_readers(cache: TieredCache, blocks: list[Block]) -> None:
    """Every copy is held once for each move that reads it, and holds its ancestors in the pool
    unless it is pinned, and they with it."""
    tickets = [] if cache.moves is None else list(cache.moves.tickets.values())
    reading = Counter((id(t.block), t.move.source) for t in tickets if t.holds_source)
    for block in blocks:
        for tier, copy in block.copies.items():
            _require(copy.readers == reading[id(block), tier], "readers miscounted")
        busy = reading[id(block), GPU]
        if cache.window is None:
            busy += sum(c.busy > 0 and not c.pins for c in block.children.values())
        _require(block.busy == busy, f"block {block.key.hex()}: {block.busy} != {busy} busy")


def _check_evictable(cache: TieredCache) -> None:
    for tier, evictor in cache.evictors.items():
        copies = [(b, b.copies[tier]) for b in cache.tree if tier in b.copies]
        free = sum(copy.is_evictable for _, copy in copies)
        _require(evictor.num_evictable == free, f"{tier.value}: evictable blocks miscounted")
        for block, copy in copies:
            is_free = copy.is_listed and not copy.readers and not is_bound(block, tier)
            if tier is GPU:
                is_free = is_free and not block.pins and not block.busy
                _require(
                    copy.state is not CopyState.READY
                    or copy.is_listed
                    or block.pins > 0
                    or block.busy > 0,
                    "a pool copy is neither listed nor held",
                )
            else:
                _require(copy.is_listed == (copy.state is CopyState.READY), "not listed")
            if copy.is_evictable != is_free:
                raise InvariantError(f"{tier.value}: wrongly evictable")
            if is_free and tier is GPU and cache.window is None:
                _check_can_leave(block)


def _check_can_leave(block: Block) -> None:
    """What counts as room in the pool is room: nobody holds what hangs on it."""
    for child in block.children.values():
        copy = child.copies.get(GPU)
        if copy is not None and copy.is_listed and not copy.is_evictable:
            raise InvariantError(f"block {block.key.hex()} counts as room, but a child is held")


def _check_shares(cache: TieredCache, blocks: list[Block]) -> None:
    """Every copy of an owner's block counts for it once, and is among those it can give up."""
    counted = Counter(
        (id(b.owner), tier) for b in blocks if b.owner is not None for tier in b.copies
    )
    for share in cache.shares.values():
        for tier in cache.evictors:
            count = counted.pop((id(share), tier), 0)
            _require(share.counts[tier] == count, f"{share.tenant}: {tier.value} copies miscounted")
    _require(not counted, "a block's owner is nobody's share")
    for tier, evictor in cache.evictors.items():
        listed = [b for b in cache.tree if tier in b.copies and b.copies[tier].is_listed]
        for block in listed if evictor.shares is not None else []:
            is_owned = evictor.shares is not None and block.key in evictor.shares
            _require(
                is_owned == (block.owner is not None), f"{tier.value}: an owner's block is not"
            )


def _check_tree(cache: TieredCache) -> None:
    """Links agree both ways; without a window every block with a copy is reachable."""
    for block in cache.tree:
        parent = block.parent
        _require(block.in_tree and cache.tree.get(block.key) is block, "index and node disagree")
        if parent is None:
            raise InvariantError(f"block {block.key.hex()} has no parent")
        _require(parent.children.get(block.tokens) is block, "parent does not know its child")
        _require(parent.depth + 1 == block.depth, "depths disagree")
        _require(bool(block.copies or block.pins or block.children), "a dead node was kept")
        if cache.window is None and parent.depth >= 0:
            _check_reachable(cache, block, parent)
    for node in [*cache.tree, *cache.tree.roots]:
        order = node.sorted_children
        _require(order is None or order == sorted(node.children), "sorted children disagree")


def _check_reachable(cache: TieredCache, block: Block, parent: Block) -> None:
    """A block with a copy has a parent with one; lower tiers are closed from the root on."""
    if cache.moves is not None and (cache.moves.num_lost or cache.tree.num_joined):
        return  # a lower tier lost bytes: what came after them waits to be reached again
    held = {tier for tier, copy in block.copies.items() if copy.state is not CopyState.FILLING}
    if GPU in held and block.copies[GPU].state is CopyState.DRAINING:
        held.discard(GPU)  # it may have come from outside and lost its parent: then it is refused
    _require(not held or bool(parent.copies), "a block is unreachable")
    if GPU in held and block.copies[GPU].is_listed:
        _require(GPU in parent.copies, "a pool block's parent is not in the pool")
    if NVME in held:
        _require(NVME in parent.copies, "a stored block's parent is not stored")
    if CPU in held:
        _require(CPU in parent.copies or NVME in parent.copies, "a CPU block is cut off")


def _check_tables(cache: TieredCache, sequences: Sequence[BlockHolder]) -> None:
    """Block tables say where the blocks are, and cover the computed tokens."""
    for seq in sequences:
        slots = [b.copies[GPU].slot if b is not None else 0 for b in seq.blocks]
        _require(slots == seq.block_table, f"sequence {seq.seq_id}: its block table is wrong")
        need = cache.blocks_for(max(seq.num_computed, seq.load_tokens))
        _require(len(seq.blocks) >= need, f"sequence {seq.seq_id}: {len(seq.blocks)} < {need}")
        if cache.moves is None:
            _require(len(seq.blocks) == need, f"sequence {seq.seq_id}: too many blocks")
        loads = {} if cache.moves is None else cache.moves.loads
        loading = sum(b is not None and b.key in loads for b in seq.blocks)
        _require(seq.num_loading == loading, f"sequence {seq.seq_id}: loads miscounted")
