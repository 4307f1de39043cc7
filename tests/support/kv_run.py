"""An engine over a ledger that requests with hints and tenants are put to."""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any

from ledger import VOCAB, expected_tokens, ledger_engine

from tierkv.cache.tiered_cache import TieredCache
from tierkv.engine.core import EngineRequest
from tierkv.engine.kv_control import KvControl
from tierkv.engine.kv_hints import KvHints
from tierkv.engine.sampling_params import SamplingParams
from tierkv.types import TierName

GPU, CPU, NVME = TierName.GPU, TierName.CPU, TierName.NVME
BLOCK = 4


def prompt_of(number: int, num_tokens: int) -> list[int]:
    """Prompts that share no block."""
    rng = random.Random(number)
    return [rng.randrange(VOCAB) for _ in range(num_tokens)]


class KvRun:
    """Runs requests one after the other, checking every law and every token.

    Args:
        options: of `ledger_engine`; moves end at once unless they say otherwise.
    """

    def __init__(self, **options: Any) -> None:
        given = {
            "block_size": BLOCK,
            "load_policy": "load",
            "mover": {"is_eager": True, "is_ordered": True},
            **options,
        }
        self.core, self.ledger, self.clock = ledger_engine(**given)
        self.got: dict[str, list[int]] = defaultdict(list)
        self.asked: dict[str, list[int]] = {}
        self.cached: dict[str, int] = {}
        self._count = 0

    @property
    def cache(self) -> TieredCache:
        return self.core.cache

    @property
    def control(self) -> KvControl:
        return self.core.control

    def set_tenants(self, *, weights: dict[str, float] | None = None, **quotas: Any) -> None:
        """Tenants by name, each with the salt of its name and a quota in blocks by tier."""
        size = self.core.info.block_bytes
        self.control.set_tenants(
            [
                {
                    "name": name,
                    "salt": name,
                    "weight": (weights or {}).get(name, 1.0),
                    "quota": {tier: count * size for tier, count in quota.items()},
                }
                for name, quota in quotas.items()
            ]
        )

    def add(
        self,
        prompt: list[int],
        *,
        tokens: int = 1,
        tenant: str = "",
        salt: str | None = None,
        **hints: Any,
    ) -> str:
        """Queue a request, under the tenant's salt unless it has another; returns its name."""
        self._count += 1
        name = f"r{self._count}"
        request = EngineRequest(
            name,
            prompt,
            SamplingParams(max_tokens=tokens),
            cache_salt=tenant if salt is None else salt,
            tenant=tenant,
            hints=KvHints.parse(hints),
        )
        self.core.add_request(request)
        self.asked[name] = prompt
        return name

    def step(self) -> None:
        self.clock.time += 1.0
        for output in self.core.step():
            self.got[output.request_id].extend(output.new_token_ids)
            if output.num_cached_tokens is not None:
                self.cached[output.request_id] = output.num_cached_tokens
        self.core.check()

    def finish(self) -> None:
        """Until nothing is left to compute; every answer is right."""
        for _ in range(5000):
            if not self.core.has_work:
                break
            self.step()
        assert not self.core.has_work
        for name, tokens in self.got.items():
            assert tokens == expected_tokens(self.asked[name], len(tokens))

    def ask(self, prompt: list[int], **fields: Any) -> int:
        """Run one request to its end; returns how many of its prompt's tokens were cached."""
        name = self.add(prompt, **fields)
        self.finish()
        self.settle()
        return self.cached[name]

    def settle(self) -> None:
        """Let everything on its way arrive."""
        for _ in range(1000):
            if not self.core.has_background_work:
                break
            self.clock.time += 0.05
            self.core.work_in_background()
        assert not self.core.has_background_work
        self.core.check()

    def pass_time(self, seconds: float) -> None:
        self.clock.time += seconds
        self.core.work_in_background()
        self.core.check()

    def held(self, prompt: list[int], tenant: str = "") -> dict[str, int]:
        """Blocks of a prompt by tier."""
        found = self.control.where(tenant, prompt)["cached_tokens_by_tier"]
        return {tier: tokens // BLOCK for tier, tokens in found.items()}
