"""What eviction policies are told of an access."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tierkv.cache.holder import BlockHolder
from tierkv.cache.prefix_tree import Block
from tierkv.cache.residency import copy_below
from tierkv.policies.base import AccessHint
from tierkv.protocols import Clock, CostModel
from tierkv.types import TierName


class HintMaker:
    """Makes the hints of one access; only the depth differs between its blocks."""

    __slots__ = (
        "ends_use",
        "first_output",
        "now",
        "priority",
        "tenant",
        "tokens",
        "turn",
        "wishes",
    )

    def __init__(self, now: float, tokens: int, seq: BlockHolder, ends_use: bool) -> None:
        self.now, self.tokens, self.ends_use = now, tokens, ends_use
        self.priority, self.tenant, self.wishes = seq.priority, seq.tenant, seq.hints
        self.turn = seq.turn
        self.first_output = seq.num_prompt_tokens // tokens

    def __call__(self, depth: int) -> AccessHint:
        hint = AccessHint(
            self.now, depth, self.tokens, priority=self.priority, ends_use=self.ends_use
        )
        if self.tenant:
            hint.tenant = self.tenant
        if self.wishes is not None:
            hint.session, hint.stop_reason = self.wishes.session_id, self.wishes.turn
            hint.turn = self.turn
        if depth >= self.first_output:
            hint.is_output = True
        return hint

    def parts(self, blocks: Sequence[Block]) -> Iterator[tuple[AccessHint, Sequence[Block]]]:
        """A chain's blocks, deepest first, in at most two parts whose hints are alike but for the
        depth: what was generated, and the prompt; each with the hint of its first block."""
        first, split = self.first_output, 0
        while split < len(blocks) and blocks[split].depth >= first:
            split += 1
        for part in (blocks[:split], blocks[split:]):
            if part:
                yield self(part[0].depth), part


class Hints:
    """Hints for all accesses of one cache.

    Args:
        clock: supplies `AccessHint.now`.
        block_size: tokens per block.
    """

    def __init__(self, clock: Clock, block_size: int) -> None:
        self._clock = clock
        self._block_size = block_size

    def of_use(self, seq: BlockHolder, *, ends: bool = False) -> HintMaker:
        """The sequence uses blocks now, or ceases to."""
        return HintMaker(self._clock.now(), self._block_size, seq, ends)

    def of_block(self, block: Block) -> AccessHint:
        """For an access that no request is behind, such as a move."""
        hint = AccessHint(self._clock.now(), block.depth, self._block_size)
        if block.owner is not None:
            hint.tenant = block.owner.tenant
        return hint


class BlockCosts:
    """What a tier loses with a block, for policies that weigh it.

    Args:
        cost: what loading and computing take.
    """

    def __init__(self, cost: CostModel) -> None:
        self._cost = cost

    def priced(self, hint: AccessHint, block: Block, tier: TierName) -> AccessHint:
        """The hint with the seconds that one block more of a load from below `tier` takes (0 when
        nothing below holds the block), and those of computing it."""
        return AccessHint(
            hint.now,
            hint.depth,
            hint.tokens,
            self._load_s(block, tier),
            self._cost.compute_s(block.depth * hint.tokens, hint.tokens),
            hint.session,
            hint.turn,
            hint.stop_reason,
            hint.tenant,
            hint.priority,
            hint.ends_use,
            hint.is_output,
        )

    def _load_s(self, block: Block, tier: TierName) -> float:
        below = copy_below(block, tier)
        return 0.0 if below is None else self._cost.up_s(below, 1) - self._cost.up_s(below, 0)
