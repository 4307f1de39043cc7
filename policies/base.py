"""What a policy is told and asked. Policies propose; they never act.

A policy does no I/O, loads no third-party code, reads no clock and no global random state:
everything it may use comes in its arguments.
"""

from __future__ import annotations

import enum
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import ClassVar, Protocol

Key = Hashable


@dataclass(slots=True)  # not frozen: one is made for every block touched, and that costs 4x
class AccessHint:
    """What is known about a block when it appears or is used. Nobody changes one.

    Attributes:
        now: the engine clock, seconds.
        depth: the block's distance from the root, in blocks (the first block has 0).
        tokens: tokens the block holds.
        load_s, recompute_s: estimated seconds to fetch it from the next tier below that has it,
            or to compute it; each as one block more of many, 0 when unknown.
        session, tenant: opaque names, empty when unknown.
        turn: the request's number within its session, 0 when unknown.
        stop_reason: why the session's last request ended, empty when unknown.
        priority: the request's priority (lower is more urgent).
        ends_use: a use that was told already (by `insert` or `touch`) ends now: the block was
            recently used, but not once more.
        is_output: the request that uses the block has generated (a part of) it, so that nobody
            else has asked for it yet.
    """

    now: float = 0.0
    depth: int = 0
    tokens: int = 0
    load_s: float = 0.0
    recompute_s: float = 0.0
    session: str = ""
    turn: int = 0
    stop_reason: str = ""
    tenant: str = ""
    priority: int = 0
    ends_use: bool = False
    is_output: bool = False


class Why(enum.Enum):
    """Why a block left: the policy's own proposal, or the caller's decision."""

    EVICTED = "evicted"
    REMOVED = "removed"


class TreeView(Protocol):
    """The prefix tree as a policy may see it: blocks that have a copy anywhere."""

    def parent(self, key: Key) -> Key | None: ...

    def children(self, key: Key) -> Iterable[Key]: ...


class EvictionPolicy(Protocol):
    """Ranks the blocks of one tier.

    The caller keeps the order insert -> (touch | set_evictable)* -> forget for each key and
    inserts a parent before its child (`parent` is None for a root, or where the tier holds
    blocks without their ancestors). A new block is not evictable until it is said to be.

    Hints tell `load_s` and `recompute_s` only where `uses_cost` is True: they take time to find.
    """

    uses_cost: ClassVar[bool]

    def insert(self, key: Key, parent: Key | None, hint: AccessHint) -> None:
        """A READY copy of the block appeared in the tier."""
        ...

    def touch(self, key: Key, hint: AccessHint) -> None:
        """The block was used, or (`hint.ends_use`) its use ends."""
        ...

    # A policy may also have `touch_chain(keys, hint)`: the same for blocks of one chain, deepest
    # first; `hint` is that of the first of them, and differs from the others' in its depth alone.

    def set_evictable(self, key: Key, yes: bool) -> None:
        """Whether the block may be proposed (it may not while pinned or in flight)."""
        ...

    def set_retention(self, key: Key, retention: int) -> None:
        """How much the block is to be kept: 0 when it appears, less below, more above.

        Of two that could go the one of lower retention does; the policy decides between equals.
        """
        ...

    def propose(self, n: int, view: TreeView, candidate: Key | None = None) -> list[Key]:
        """Up to `n` victims, cheapest loss first.

        Each is evictable once those before it are gone: a parent comes after its children.
        Nothing is dropped; `forget` tells what was. Fewer than `n` means there are no more.
        `candidate` is the block that wants to come in, for policies that weigh admission.
        """
        ...

    def forget(self, key: Key, why: Why) -> None:
        """The block left the tier."""
        ...
