"""The blocks of one tier, and among them those of each tenant that has a quota there.

    all       every block is in one policy, which decides what the tier gives up
    own       a tenant's blocks are in a second policy of the same kind too, which decides what the
              tenant gives up when it is at its quota

A tenant's blocks hang under its own salts, so its leaves are leaves of the tier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import ClassVar

from tierkv.policies.base import AccessHint, EvictionPolicy, Key, TreeView, Why


class TenantShares:
    """An `EvictionPolicy` around another one that can also propose among one tenant's blocks.

    Args:
        everything: the tier's policy; it may hold blocks already.
        make: a new policy of the same kind.
        tenants: those with a quota.
    """

    uses_cost: ClassVar[bool] = True  # whoever makes the hints has asked the policy inside

    def __init__(
        self,
        everything: EvictionPolicy,
        make: Callable[[], EvictionPolicy],
        tenants: Iterable[str],
    ) -> None:
        self._all = everything
        self._own = {tenant: make() for tenant in tenants}
        self._of: dict[Key, EvictionPolicy] = {}

    def __contains__(self, key: Key) -> bool:
        """Whether the block is some tenant's."""
        return key in self._of

    def adopt(
        self, key: Key, parent: Key | None, hint: AccessHint, *, evictable: bool, retention: int
    ) -> None:
        """A block that is in the tier already becomes that of `hint.tenant`, parents first."""
        own = self._of[key] = self._own[hint.tenant]
        own.insert(key, parent, hint)
        own.set_retention(key, retention)
        own.set_evictable(key, evictable)

    def propose_own(self, tenant: str, n: int, view: TreeView) -> list[Key]:
        """As `propose`, of one tenant's blocks."""
        return self._own[tenant].propose(n, view)

    def insert(self, key: Key, parent: Key | None, hint: AccessHint) -> None:
        self._all.insert(key, parent, hint)
        own = self._own.get(hint.tenant)
        if own is not None:
            self._of[key] = own
            own.insert(key, parent, hint)

    def touch(self, key: Key, hint: AccessHint) -> None:
        self._all.touch(key, hint)
        if key in self._of:
            self._of[key].touch(key, hint)

    def set_evictable(self, key: Key, yes: bool) -> None:
        self._all.set_evictable(key, yes)
        if key in self._of:
            self._of[key].set_evictable(key, yes)

    def set_retention(self, key: Key, retention: int) -> None:
        self._all.set_retention(key, retention)
        if key in self._of:
            self._of[key].set_retention(key, retention)

    def propose(self, n: int, view: TreeView, candidate: Key | None = None) -> list[Key]:
        return self._all.propose(n, view, candidate)

    def forget(self, key: Key, why: Why) -> None:
        self._all.forget(key, why)
        if key in self._of:
            self._of.pop(key).forget(key, why)
