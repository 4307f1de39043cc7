"""What callers ask of the cache itself: where a prefix is, pins, times to live, whole sessions,
sleep. Each call takes and returns what a message can carry, and none waits for a move.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from tierkv.cache.evictor import GPU
from tierkv.cache.hashing import extend_keys
from tierkv.cache.prefix_tree import Block
from tierkv.cache.residency import CopyState
from tierkv.cache.shares import MakePolicy, Share, adopt_salt, set_shares
from tierkv.cache.tiered_cache import TieredCache
from tierkv.cache.transfer import take_in
from tierkv.engine.kv_hints import check_ttl
from tierkv.engine.recording import Recorder
from tierkv.engine.request import Request, Sequence
from tierkv.engine.scheduler import Scheduler
from tierkv.engine.sessions import Sessions
from tierkv.engine.sleep import Sleeper, SleepState
from tierkv.errors import ConflictError, NotFoundError, RequestError
from tierkv.protocols import BlockPort, Clock
from tierkv.types import BlockKey, TierName

if TYPE_CHECKING:
    from tierkv.engine.core import EngineInfo

_MOST_READS = 64  # of exports that nobody came back for


class KvControl:
    """The calls, over one engine.

    Args:
        cache, scheduler, info, clock: of the engine.
        port: the bytes of blocks; without it nothing can be exported, imported or put to sleep.
        make_eviction: one more policy of a tier's kind.
        settle: waits for the step under way.

    Attributes:
        sessions: whose blocks are which.
        sleeper: whether steps are made.

    Raises (from every call that names a prefix or a session):
        NotFoundError: there is no such session, or nothing of it is cached.
        RequestError: a value is wrong; ConflictError: it cannot be done now, with the numbers.
    """

    def __init__(
        self,
        cache: TieredCache,
        scheduler: Scheduler,
        info: EngineInfo,
        clock: Clock,
        port: BlockPort | None,
        make_eviction: MakePolicy,
        settle: Callable[[], None],
    ) -> None:
        self.sessions = Sessions()
        self.sleeper = Sleeper(cache, scheduler, port.give_back if port is not None else _nothing)
        self._recorder = Recorder(cache, scheduler, clock)
        self._cache, self._scheduler = cache, scheduler
        self._block_bytes, self._vocab_size = info.block_bytes, info.vocab_size
        self._clock = clock
        self._port, self._make_eviction, self._settle = port, make_eviction, settle
        self._reads: dict[BlockKey, Future[bytes | None]] = {}

    @property
    def calls(self) -> dict[str, Callable[..., Any]]:
        """By name, as messages spell them."""
        names = (
            *("set_tenants", "stats", "where", "pin", "unpin", "ttl", "pending"),
            *("session_keys", "note_session", "export_block", "import_block"),
            *("sleep", "wake", "sleep_state"),
        )
        recorder = {f"kv_record_{n}": getattr(self._recorder, n) for n in ("start", "take", "stop")}
        return {f"kv_{name}": getattr(self, name) for name in names} | recorder

    @property
    def is_awake(self) -> bool:
        return self.sleeper.state is SleepState.AWAKE

    @property
    def is_falling_asleep(self) -> bool:
        return self.sleeper.state is SleepState.FALLING

    # ------------------------------------------------------------------ requests

    def admit(self, request: Request) -> None:
        """A request was queued."""
        cache, hints = self._cache, request.hints
        if hints is not None:
            cache.keeps.is_active |= hints.ttl is not None or hints.priority != 0
            if hints.session_id:
                request.turn = self.sessions.begun(request.tenant, hints.session_id)
        request.owner = cache.shares.get(request.tenant)
        if request.owner is not None:
            adopt_salt(cache, request.cache_salt, request.owner)

    def ended(self, seq: Sequence) -> None:
        """One of its sequences, which has hints, ended."""
        if seq.hints is not None and seq.hints.session_id and seq.block_keys:
            keys = list(seq.block_keys)  # without any, what an earlier request left stays
            self.sessions.ended(seq.tenant, seq.hints.session_id, seq.cache_salt, keys)

    # ------------------------------------------------------------------ tenants and budgets

    def set_pin_budget(self, num_bytes: int | str | None) -> None:
        """How much may be pinned: bytes, or (None) a quarter of the last tier."""
        capacity = [*self._cache.residency.tiers.values()][-1].capacity
        budget = capacity * self._block_bytes // 4 if num_bytes is None else int(num_bytes)
        self._cache.keeps.budget = min(budget // self._block_bytes, capacity)

    def set_tenants(self, tenants: list[dict[str, Any]]) -> None:
        """Who shares the service and the tiers; once, before the first request.

        Args:
            tenants: `name`, `salt`, `weight`, and `quota`: bytes by tier.
        """
        cache, order = self._cache, self._scheduler.waiting.service
        shares: dict[str, Share] = {}
        for tenant in tenants:
            if order is not None:
                order.set_weight(tenant["name"], tenant["weight"])
            quota = {TierName(t): b // self._block_bytes for t, b in tenant["quota"].items()}
            if quota:
                shares[tenant["salt"]] = Share(tenant["name"], quota)
        cache.keeps.weights = {tenant["name"]: tenant["weight"] for tenant in tenants}
        if shares:
            set_shares(cache, shares, self._make_eviction)

    # ------------------------------------------------------------------ what is where

    def stats(self, tenant: str | None = None) -> dict[str, Any]:
        """Tiers, pins and sessions; of one tenant, or (None) of all."""
        cache, size = self._cache, self._block_bytes
        keeps = cache.keeps
        shares = [s for s in cache.shares.values() if tenant in (None, s.tenant)]
        pinned = keeps.num_pinned if tenant is None else keeps.num_pinned_of(tenant)
        budget = keeps.budget if tenant is None else keeps.share(tenant)
        return {
            "block_size": cache.block_size,
            "block_bytes": size,
            "state": self.sleeper.state.value,
            "tiers": {tier.value: self._tier_stats(tier) for tier in cache.evictors},
            "pins": {
                "count": sum(tenant in (None, pin.tenant) for pin in keeps.pins.values()),
                "pinned_bytes": pinned * size,
                "budget_bytes": budget * size,
            },
            "sessions": len(self.sessions) if tenant is None else self.sessions.count(tenant),
            "tenants": {share.tenant: self._share_stats(share) for share in shares},
            **self.pending(),
        }

    def _tier_stats(self, tier: TierName) -> dict[str, int]:
        slots, size = self._cache.residency.tiers[tier], self._block_bytes
        evictor = self._cache.evictors[tier]
        return {
            "capacity_bytes": slots.capacity * size,
            "used_bytes": (slots.capacity - slots.num_empty) * size,
            "evictable_bytes": evictor.num_evictable * size,
            "evicted_blocks": evictor.num_evicted,
        }

    def _share_stats(self, share: Share) -> dict[str, Any]:
        size = self._block_bytes
        return {
            "used_bytes": {tier.value: share.counts[tier] * size for tier in self._cache.evictors},
            "quota_bytes": {tier.value: count * size for tier, count in share.quota.items()},
        }

    def pending(self) -> dict[str, int]:
        """What is on its way: moves, offers to lower tiers, erasures."""
        moves, lower = self._cache.moves, self._cache.lower
        return {
            "moves": 0 if moves is None else len(moves.tickets),
            "offers": 0 if lower is None else lower.num_queued,
            "erasures": 0 if moves is None or moves.erasures is None else moves.erasures.num_begun,
        }

    def where(self, salt: str, token_ids: list[int]) -> dict[str, Any]:
        """How many tokens of a prefix can be reused, and from which tiers."""
        found = self._found(self._keys_of(salt, token_ids))
        copies = Counter(tier for block in found for tier in _ready_tiers(block))
        size = self._cache.block_size
        return {
            "tokens": len(token_ids),
            "cached_tokens": len(found) * size,
            "cached_tokens_by_tier": {t.value: copies[t] * size for t in self._cache.evictors},
        }

    def _keys_of(self, salt: str, token_ids: list[int]) -> list[BlockKey]:
        for token_id in token_ids:
            if not 0 <= token_id < self._vocab_size:
                fix = f"token ids must be in [0, {self._vocab_size})"
                raise RequestError("prompt", token_id, fix)
        keys: list[BlockKey] = []
        root = self._cache.tree.root_key(salt)
        extend_keys(keys, root, token_ids, self._cache.block_size)
        return keys

    def _named(
        self, tenant: str, salt: str, token_ids: list[int] | None, session_id: str | None
    ) -> tuple[str, list[BlockKey]]:
        """The name that a pin of these blocks has, and the blocks."""
        if session_id is not None:
            return _session_pin(tenant, session_id), self._session(tenant, session_id)[1]
        keys = self._keys_of(salt, token_ids or [])
        if not keys:
            fix = f"is shorter than a block of {self._cache.block_size} tokens"
            raise RequestError("prompt", f"<{len(token_ids or [])} tokens>", fix)
        return f"prefix {keys[-1].hex()}", keys

    def _session(self, tenant: str, session_id: str) -> tuple[str, list[BlockKey]]:
        session = self.sessions.find(tenant, session_id)
        if session is None or not session.keys:
            raise NotFoundError("session_id", session_id, "no request of it has ended here")
        return session.salt, session.keys

    def _found(self, keys: list[BlockKey]) -> list[Block]:
        """What is there, up to the first gap unless windows make gaps."""
        found = []
        for key in keys:
            block = self._cache.tree.get(key)
            if block is not None and _ready_tiers(block):
                found.append(block)
            elif self._cache.window is None:
                break
        return found

    # ------------------------------------------------------------------ pins and times to live

    def pin(
        self,
        tenant: str,
        salt: str,
        token_ids: list[int] | None = None,
        session_id: str | None = None,
        ttl: float | None = None,
    ) -> dict[str, Any]:
        """Keep what is cached of a prefix or a session, for `ttl` seconds or until unpinned."""
        check_ttl(ttl, "ttl")
        name, keys = self._named(tenant, salt, token_ids, session_id)
        found = [block.key for block in self._found(keys)]
        if not found:
            raise NotFoundError("pin", "<prefix>", "nothing of it is cached: warm it first")
        keeps = self._cache.keeps
        until = float("inf") if ttl is None else self._clock.now() + ttl
        keeps.pin(name, tenant, found, until)
        size, budget = self._block_bytes, keeps.share(tenant)
        return {
            "pinned_tokens": len(found) * self._cache.block_size,
            "tokens": len(keys) * self._cache.block_size,
            "pinned_bytes": keeps.num_pinned_of(tenant) * size,
            "budget_bytes": budget * size,
        }

    def unpin(
        self,
        tenant: str,
        salt: str,
        token_ids: list[int] | None = None,
        session_id: str | None = None,
    ) -> dict[str, Any]:
        """Let what a pin of the same prefix or session kept go its way."""
        if session_id is not None:
            name = _session_pin(tenant, session_id)  # it may be forgotten, and is pinned still
        else:
            name, _ = self._named(tenant, salt, token_ids, None)
        if not self._cache.keeps.unpin(name):
            raise NotFoundError("pin", name.partition(" ")[0], "is not pinned")
        return {"unpinned": True}

    def ttl(
        self,
        tenant: str,
        salt: str,
        token_ids: list[int] | None = None,
        session_id: str | None = None,
        ttl: float | None = None,
    ) -> dict[str, Any]:
        """In `ttl` seconds the blocks of a prefix or a session are the first to go; None: never."""
        check_ttl(ttl, "ttl")
        _, keys = self._named(tenant, salt, token_ids, session_id)
        count = self._cache.keeps.set_ttl(keys, ttl)
        return {"tokens": count * self._cache.block_size}

    # ------------------------------------------------------------------ export and import

    def session_keys(self, tenant: str, session_id: str) -> list[Any]:
        """Salt and keys of what can be exported of a session."""
        salt, keys = self._session(tenant, session_id)
        found = []
        for key in keys:
            block = self._cache.tree.get(key)
            if block is None or not block.copies:
                break
            found.append(key)
        if not found:
            raise NotFoundError("session_id", session_id, "nothing of it is cached any more")
        return [salt, found]

    def note_session(self, tenant: str, session_id: str, salt: str, keys: list[BlockKey]) -> None:
        """These are the blocks of a session that came from elsewhere."""
        self.sessions.ended(tenant, session_id, salt, keys)

    def export_block(self, key: BlockKey) -> list[Any] | None:
        """Parent, tokens and payload of a block, from whatever tier; empty when it must be asked
        for again, because it is being read or moved; None when it is gone."""
        block = self._cache.tree.get(key)
        if block is None or block.parent is None or not block.copies:
            return None
        reading = self._reads.pop(key, None)
        if reading is None:
            tiers = _ready_tiers(block)
            if not tiers:
                return []
            tier = tiers[0]
            reading = self._need_port().read(tier, block.copies[tier].slot, key)
        if not reading.done():
            if len(self._reads) >= _MOST_READS:
                del self._reads[next(iter(self._reads))]
            self._reads[key] = reading
            return []
        payload = reading.result()
        return None if payload is None else [block.parent.key, block.tokens, payload]

    def import_block(
        self, salt: str, key: BlockKey, parent: BlockKey, tokens: bytes, payload: bytes
    ) -> str:
        """Take a block in, its parent first; answers as `take_in`."""
        if not self._cache.is_caching:
            raise ConflictError(
                "import", "<block>", "the server keeps nothing: prefix caching is off"
            )
        if self.sleeper.state is not SleepState.AWAKE:
            raise ConflictError("import", "<block>", "the engine is asleep: wake it first")
        if len(payload) != self._block_bytes:
            raise RequestError("payload", f"<{len(payload)} bytes>", "has the wrong size")
        return take_in(self._cache, self._need_port(), salt, key, parent, tokens, payload)

    def _need_port(self) -> BlockPort:
        if self._port is None:
            raise ConflictError("kv", "<bytes>", "this engine does not give access to its blocks")
        return self._port

    # ------------------------------------------------------------------ sleep

    def sleep(self) -> dict[str, Any]:
        """Begin to fall asleep."""
        self._settle()
        self.sleeper.begin()
        return self.sleep_state()

    def wake(self) -> dict[str, Any]:
        """Go on."""
        self.sleeper.wake()
        return self.sleep_state()

    def sleep_state(self) -> dict[str, Any]:
        """Awake, falling asleep or asleep, and what it gave back."""
        sleeper = self.sleeper
        is_asleep = sleeper.state is SleepState.ASLEEP
        given = sleeper.bytes_given_back if is_asleep else 0
        return {"state": sleeper.state.value, "bytes_given_back": given}


def _nothing() -> int:
    return 0


def _session_pin(tenant: str, session_id: str) -> str:
    """The name of a session's pin; no two tenants, whatever they are called, have the same."""
    return f"session {(tenant, session_id)!r}"


def _ready_tiers(block: Block) -> list[TierName]:
    """Tiers that have its bytes, from hot to cold."""
    return [
        tier
        for tier in TierName
        if (copy := block.copies.get(tier)) is not None
        and (copy.state is CopyState.READY or (tier is GPU and copy.state is CopyState.DRAINING))
    ]
