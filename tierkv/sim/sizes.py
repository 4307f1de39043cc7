"""How large tiers are: `gpu=40GiB,cpu=256GiB,nvme=4TB`, in bytes, blocks, or as a share."""

from __future__ import annotations

from dataclasses import dataclass

from tierkv.config import parse_bytes
from tierkv.errors import ConfigError
from tierkv.sim.hardware import Hardware
from tierkv.sim.steps import ModelShape
from tierkv.types import TierName

AUTO = "auto"
MEMORY_SHARE = 0.9
"""Of a device's memory, for weights and blocks; the rest is for activations."""
_OPTION = "tiers"


@dataclass(slots=True, frozen=True)
class Units:
    """What sizes mean.

    Attributes:
        slot_bytes: of a block.
        unique_blocks: of the trace, for shares.
        gpu_blocks: what `auto` is; None where nothing is known of the device.
    """

    slot_bytes: int
    unique_blocks: int
    gpu_blocks: int | None


def auto_gpu_blocks(shape: ModelShape, hardware: Hardware, block_size: int) -> int | None:
    """What fits beside the weights; None where the hardware has no memory to tell.

    Raises:
        ConfigError: the weights alone do not fit, or they leave no room for a block.
    """
    if not hardware.memory:
        return None
    room = int(hardware.memory * hardware.tp * MEMORY_SHARE) - shape.weight_bytes
    blocks = room // (shape.kv_bytes_per_token * block_size)
    if blocks < 1:
        need, has = shape.weight_bytes / 1e9, hardware.memory * hardware.tp / 1e9
        fix = (
            f"{shape.name} has {need:.0f} GB of weights, {hardware.name} {has:.0f} GB of memory: "
            "take more devices (tp=2) or a smaller model"
        )
        raise ConfigError("hardware", hardware.name, fix)
    return blocks


def parse_tiers(text: str, units: Units) -> dict[TierName, int]:
    """Blocks of each tier, hot to cold; the GPU pool is `auto` unless it is named.

    Args:
        text: `tier=size` each; sizes are bytes (`40GiB`), blocks (`5000blocks`), a share of the
            distinct blocks of the trace (`5%`), `auto` (gpu only), or 0 for none.

    Raises:
        ConfigError: an unknown tier, one named twice, or a size that is none.
    """
    names = {tier.value: tier for tier in TierName}
    found: dict[TierName, int] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, _, size = part.partition("=")
        tier = names.get(name.strip())
        if tier is None or tier in found:
            fix = "name each of gpu, cpu and nvme at most once: gpu=auto,cpu=256GiB,nvme=4TB"
            raise ConfigError(_OPTION, text, fix)
        found[tier] = _blocks(tier, size.strip() or AUTO, text, units)
    if TierName.GPU not in found:
        found[TierName.GPU] = _blocks(TierName.GPU, AUTO, text, units)
    if found[TierName.GPU] < 1:
        raise ConfigError(_OPTION, text, "the GPU pool must hold at least one block")
    return {tier: found[tier] for tier in TierName if found.get(tier)}


def _blocks(tier: TierName, size: str, text: str, units: Units) -> int:
    if size == AUTO:
        if tier is not TierName.GPU or units.gpu_blocks is None:
            fix = f"say how large {tier.value} is, e.g. {tier.value}=64GiB"
            raise ConfigError(_OPTION, text, fix)
        return units.gpu_blocks
    if size == "0":
        return 0
    for unit, scale in (("%", units.unique_blocks / 100), ("blocks", 1.0), ("block", 1.0)):
        if size.endswith(unit):
            return _number(size.removesuffix(unit), scale, text)
    return parse_bytes(size, _OPTION) // units.slot_bytes


def _number(text: str, scale: float, whole: str) -> int:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1e15:
        raise ConfigError(_OPTION, whole, f"{text!r} is no size: give 40GiB, 5000blocks or 5%")
    return max(1, round(value * scale))
