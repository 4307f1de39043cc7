"""One engine in virtual time: the real core on a simulated executor, sampler and mover."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tierkv.cache.lower_tiers import MoveLimits
from tierkv.config import EngineConfig
from tierkv.engine.core import EngineCore, EngineInfo, LowerTierSetup
from tierkv.engine.cost import MeasuredCost
from tierkv.engine.policy_options import lower_specs
from tierkv.sim.arrivals import BlockNames
from tierkv.sim.clock import VirtualClock
from tierkv.sim.executor import SimExecutor, SimSampler
from tierkv.sim.hardware import Hardware
from tierkv.sim.mover import CPU, GPU, NVME, Link, LinkSpec, SimMover
from tierkv.sim.quantiles import Quantiles
from tierkv.sim.steps import ModelShape, step_cost
from tierkv.types import TierName

_STEP_S, _LINK_S = 0.05, 0.02  # of a link's bandwidth may be begun in a step, or be on its way
_NO_LIMIT = 1 << 62


@dataclass(slots=True, frozen=True)
class Machine:
    """What is simulated.

    Attributes:
        shape, hardware: the model, and what it runs on.
        block_size: tokens per block, the trace's.
        blocks: of each tier that there is; the GPU pool always.
        options: of `EngineConfig`: policies, limits of a step.
    """

    shape: ModelShape
    hardware: Hardware
    block_size: int
    blocks: Mapping[TierName, int]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def slot_bytes(self) -> int:
        return self.shape.kv_bytes_per_token * self.block_size

    @property
    def max_tokens(self) -> int:
        """What the longest request may have, prompt and output: the last token needs no KV."""
        return self.blocks[GPU] * self.block_size + 1


@dataclass(slots=True)
class World:
    """A machine that runs.

    Attributes:
        core: the engine.
        clock: its time.
        executor, sampler, mover: what it runs on; no mover with one tier.
        gaps: seconds between two tokens of a sequence.
    """

    core: EngineCore
    clock: VirtualClock
    executor: SimExecutor
    sampler: SimSampler
    mover: SimMover | None
    gaps: Quantiles


def build_world(machine: Machine, names: BlockNames) -> World:
    """An idle engine at time 0.

    Raises:
        ConfigError: a policy that does not exist, or an option out of range.
    """
    clock, gaps = VirtualClock(), Quantiles()
    config = _config(machine)
    executor = SimExecutor(clock, step_cost(machine.shape, machine.hardware))
    sampler = SimSampler(clock, names, gaps)
    mover = _mover(machine, clock) if len(machine.blocks) > 1 else None
    tiers = _tiers(machine, config, mover) if mover is not None else None
    core = EngineCore(config, _info(machine), executor, sampler, clock, tiers)
    return World(core, clock, executor, sampler, mover, gaps)


def _config(machine: Machine) -> EngineConfig:
    lower = [tier.value for tier in machine.blocks if tier is not GPU]
    return EngineConfig(
        model=machine.shape.name,
        num_gpu_blocks=machine.blocks[GPU],
        offload=",".join(lower) or None,
        **machine.options,
    )


def _info(machine: Machine) -> EngineInfo:
    return EngineInfo(
        model=machine.shape.name,
        tokenizer="",
        max_model_len=_NO_LIMIT,
        vocab_size=1 << 32,
        eos_token_ids=[],
        num_gpu_blocks=machine.blocks[GPU],
        block_size=machine.block_size,
        dtype="",
        device="",
        block_bytes=machine.slot_bytes,
    )


def _tiers(machine: Machine, config: EngineConfig, mover: SimMover) -> LowerTierSetup:
    lower = {tier: blocks for tier, blocks in machine.blocks.items() if tier is not GPU}
    links = _links(machine.hardware)
    down = min(links[GPU, tier].bandwidth for tier in lower)
    least = MoveLimits()
    limits = MoveLimits(
        step_bytes=max(least.step_bytes, int(down * _STEP_S)),
        link_bytes=max(least.link_bytes, int(down * _LINK_S)),
        load_timeout_s=config.load_timeout,
    )
    cost = first_guess(machine)
    return LowerTierSetup(
        lower_specs(config, lower), mover, machine.slot_bytes, limits, cost, [], mover.close
    )


def first_guess(machine: Machine) -> MeasuredCost:
    """What the engine expects of computing and moving before it has seen any."""
    step, links = step_cost(machine.shape, machine.hardware), _links(machine.hardware)
    short, long = 2048, 16384
    base = step.step_s([(0, short)])
    per_token = base / short
    pairs = short * (long + short / 2) - short * short / 2
    per_pair = max(0.0, step.step_s([(long, short)]) - base) / pairs
    rates = {
        (tier, is_up): links[(tier, GPU) if is_up else (GPU, tier)].bandwidth
        for tier in (CPU, NVME)
        for is_up in (True, False)
    }
    return MeasuredCost(machine.slot_bytes, per_token_s=per_token, per_pair_s=per_pair, rates=rates)


def _mover(machine: Machine, clock: VirtualClock) -> SimMover:
    hardware = machine.hardware
    devices = {
        "link": hardware.link.both * hardware.tp,
        "drives": max(hardware.drive.read, hardware.drive.write) * hardware.drives,
    }
    return SimMover(clock, _links(hardware), devices, machine.slot_bytes)


def _links(hardware: Hardware) -> dict[Link, LinkSpec]:
    """All ways between tiers. What the drives share is less than what the link could carry, so a
    move between pool and drive counts for the drives."""
    link, drive = hardware.link, hardware.drive
    bus = LinkSpec(link.bandwidth * hardware.tp, link.latency_s, "link")
    through = bus.bandwidth
    read = LinkSpec(drive.read * hardware.drives, drive.latency_s, "drives")
    write = LinkSpec(drive.write * hardware.drives, drive.latency_s, "drives")
    latency_s = drive.latency_s + link.latency_s
    return {
        (GPU, CPU): bus,
        (CPU, GPU): bus,
        (NVME, CPU): read,
        (CPU, NVME): write,
        (NVME, GPU): LinkSpec(min(through, read.bandwidth), latency_s, "drives"),
        (GPU, NVME): LinkSpec(min(through, write.bandwidth), latency_s, "drives"),
    }
