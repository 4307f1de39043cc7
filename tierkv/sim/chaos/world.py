"""The real engine on a simulated machine whose bytes are symbols."""

from __future__ import annotations

from itertools import permutations

from tierkv.cache.lower_tiers import MoveLimits
from tierkv.config import EngineConfig
from tierkv.engine.core import EngineCore, EngineInfo, LowerTierSetup
from tierkv.engine.cost import MeasuredCost
from tierkv.engine.policy_options import lower_specs
from tierkv.sim.chaos.contents import STATE_BYTES, VOCAB, Contents
from tierkv.sim.chaos.faults import ChaosMover, Faults
from tierkv.sim.chaos.log import Log
from tierkv.sim.chaos.scenario import SLOT_BYTES, Scenario
from tierkv.sim.clock import VirtualClock
from tierkv.sim.mover import GPU, NVME, Link, LinkSpec
from tierkv.storage.base import StoredBlock
from tierkv.types import TierName

_MAX_MODEL_LEN = 10_000


class World:
    """One engine from its start to its end.

    Args:
        scenario: what it is.
        clock, contents, faults, log: of the run; they outlive the engine.
        stored: what the persistent tier brought back.

    Attributes:
        core: the engine.
        mover: of its tiers, if there are any below the pool.
    """

    def __init__(
        self,
        scenario: Scenario,
        clock: VirtualClock,
        contents: Contents,
        faults: Faults,
        log: Log,
        stored: list[StoredBlock],
    ) -> None:
        self.mover: ChaosMover | None = None
        config = EngineConfig.from_mapping(
            {k: v for k, v in scenario.options.items() if v is not None}
        )
        setup = None
        if len(scenario.blocks) > 1:
            links = _links(scenario)
            devices = {"drive": SLOT_BYTES / scenario.block_s, "bus": SLOT_BYTES / scenario.block_s}
            self.mover = ChaosMover(clock, links, devices, SLOT_BYTES, contents, faults, log)
            setup = _setup(scenario, config, self.mover, stored)
        info = _info(scenario, config.block_size)
        self.core = EngineCore(config, info, contents, contents, clock, setup, port=contents)
        self._set_tenants(scenario, info.block_bytes)

    def _set_tenants(self, scenario: Scenario, block_bytes: int) -> None:
        tenants = [
            {
                "name": name,
                "salt": name,
                "weight": 1.0 + weight,
                "quota": {tier: count * block_bytes for tier, count in quota.items()},
            }
            for weight, (name, quota) in enumerate(scenario.quotas.items())
        ]
        if tenants:
            self.core.control.set_tenants(tenants)


def _links(scenario: Scenario) -> dict[Link, LinkSpec]:
    """Every way between two tiers; the drive's are half as fast."""
    fast = LinkSpec(SLOT_BYTES / scenario.block_s, scenario.latency_s, "bus")
    slow = LinkSpec(fast.bandwidth / 2, scenario.latency_s, "drive")
    return {ends: slow if NVME in ends else fast for ends in permutations(scenario.blocks, 2)}


def _setup(
    scenario: Scenario, config: EngineConfig, mover: ChaosMover, stored: list[StoredBlock]
) -> LowerTierSetup:
    lower = {tier: count for tier, count in scenario.blocks.items() if tier is not GPU}
    rate = SLOT_BYTES / scenario.block_s
    rates = {(tier, is_up): rate for tier in TierName for is_up in (False, True)}
    limits = scenario.limits
    return LowerTierSetup(
        specs=lower_specs(config, lower),
        mover=mover,
        slot_bytes=SLOT_BYTES,
        limits=MoveLimits(
            step_bytes=int(limits["step_bytes"]),
            link_bytes=int(limits["link_bytes"]),
            load_timeout_s=limits["load_timeout_s"],
            room=limits["room"],
        ),
        cost=MeasuredCost(SLOT_BYTES, per_token_s=scenario.time.per_token_s, rates=rates),
        stored=stored,
        close=mover.close,
    )


def _info(scenario: Scenario, block_size: int) -> EngineInfo:
    return EngineInfo(
        model="chaos",
        tokenizer="",
        max_model_len=_MAX_MODEL_LEN,
        vocab_size=VOCAB,
        eos_token_ids=[],
        num_gpu_blocks=scenario.blocks[GPU],
        block_size=block_size,
        dtype="",
        device="",
        window=scenario.window,
        layout="chaos",
        block_bytes=STATE_BYTES * block_size,
    )
