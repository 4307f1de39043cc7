"""How much of each tier a tenant may keep, and how much it does.

    quota     a tenant at its quota makes room by giving up its own least valuable copy, never
              another's; where it has none to give, a lower tier does not take the block
    pool      what running sequences hold counts too, and is never refused: one sequence of a
              tenant always runs, others of it only as far as its quota goes

A block belongs to the tenant under whose salt it was computed, so to the owner of its parent.
`Residency` is the only writer of the counts: a copy counts from the moment its slot is reserved
until the slot is given back, or nobody waits for it any more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from tierkv.policies.base import EvictionPolicy
from tierkv.policies.shares import TenantShares
from tierkv.types import TierName

if TYPE_CHECKING:
    from tierkv.cache.evictor import Evictor, Hinter
    from tierkv.cache.holder import BlockHolder
    from tierkv.cache.prefix_tree import Block
    from tierkv.cache.tiered_cache import TieredCache

MakePolicy = Callable[[TierName], EvictionPolicy]


class Share:
    """One tenant's copies.

    Attributes:
        tenant: its name.
        quota: most copies by tier; a tier that is not named has no bound.
        counts: copies by tier, in any state.
    """

    __slots__ = ("counts", "quota", "tenant")

    def __init__(self, tenant: str, quota: Mapping[TierName, int]) -> None:
        self.tenant = tenant
        self.quota = dict(quota)
        self.counts: Counter[TierName] = Counter()

    def is_full(self, tier: TierName) -> bool:
        """Whether one more copy would be too many."""
        most = self.quota.get(tier)
        return most is not None and self.counts[tier] >= most

    def admits(self, num_blocks: int) -> bool:
        """Whether sequences may hold so many blocks of the pool."""
        return num_blocks <= self.quota.get(TierName.GPU, num_blocks)

    def num_over(self, tier: TierName) -> int:
        """Copies beyond the quota."""
        most = self.quota.get(tier)
        return 0 if most is None else max(0, self.counts[tier] - most)


class HeldBlocks:
    """Blocks of the pool that each owner's sequences hold, while a step is planned."""

    def __init__(self, holders: Iterable[BlockHolder]) -> None:
        self._counts: Counter[Share] = Counter()
        for holder in holders:
            self.add(holder)

    def add(self, holder: BlockHolder) -> None:
        """One more holds its blocks."""
        if holder.owner is not None:
            self._counts[holder.owner] += len(holder.block_table)

    def admits(self, owner: Share | None, num_blocks: int) -> bool:
        """Whether the pool may hold so many more of its owner, who may always run one sequence."""
        held = 0 if owner is None else self._counts[owner]
        return owner is None or not held or owner.admits(held + num_blocks)


def set_shares(cache: TieredCache, shares: Mapping[str, Share], make: MakePolicy) -> None:
    """Bound what tenants keep, by their salts; once, before they ask for anything."""
    cache.shares, cache.salts = {share.tenant: share for share in shares.values()}, dict(shares)
    for tier, evictor in cache.evictors.items():
        evictor.shares = TenantShares(evictor.policy, partial(make, tier), cache.shares)
        evictor.policy = evictor.shares
    for salt, share in shares.items():
        adopt_salt(cache, salt, share)


def adopt_salt(cache: TieredCache, salt: str, share: Share) -> None:
    """What is there under the salt, from before a restart say, is the tenant's."""
    root = cache.tree.root(salt)
    if root is None or root.owner is share:
        return
    root.owner = share
    adopt_below(root, share, cache.evictors[TierName.GPU], cache.hint_of)


def adopt_below(block: Block, share: Share, evictor: Evictor, hint_of: Hinter) -> None:
    """What hangs under a block of the share's, and came before that was known, is the share's."""
    pending = list(block.children.values())
    while pending:
        child = pending.pop()
        if child.owner is not share:
            evictor.own(child, share, hint_of)
        pending.extend(child.children.values())
