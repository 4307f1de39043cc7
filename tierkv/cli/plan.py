"""`tierkv plan MODEL`: the size of a KV cache, and what fits on each tier.

bytes per token = layers * 2 (K and V) * KV heads * head_dim * bytes per element
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from tierkv.cache.layout import DTYPE_BITS, KVLayout
from tierkv.cli.model_facts import ModelFacts, read_facts
from tierkv.cli.options import Parser, add_config_flag, add_flags, read_options, take_model
from tierkv.config import check_block_size, option, parse_bytes
from tierkv.errors import ConfigError
from tierkv.types import TierName

KV_DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "int4")
"""The rows of the table: 32, 16, 8 and 4 bits (sizes without quantisation scales)."""

SHORT_DTYPES = {
    "fp32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp8": "float8_e4m3fn",
}

EXAMPLES = """\
examples:
  tierkv plan llama-3-70b --context 8192 --sequences 128
  tierkv plan ./my-model --gpu-memory 80GiB --cpu-memory 512GiB --nvme 4TiB
"""


@dataclass(slots=True, kw_only=True)
class PlanOptions:
    """Options of `tierkv plan`; sizes as in `EngineConfig`.

    Raises:
        ConfigError: a number below 1, a share outside (0, 1], or an unknown dtype.
    """

    model: str = option("demo", "model directory, config.json, cached hub id or well-known name")
    context: int | None = option(None, "tokens per sequence (default: the model's context)")
    sequences: int = option(1, "sequences at once")
    kv_dtype: str | None = option(None, "KV element type (default: 16 bit, or the model's own)")
    block_size: int = option(16, "tokens per block")
    gpu_memory: int | str | None = option(None, "GPU memory in all, e.g. 80GiB", metavar="SIZE")
    gpu_memory_utilization: float = option(0.9, "share of it that the engine may use")
    cpu_memory: int | str | None = option(None, "CPU memory for blocks", metavar="SIZE")
    nvme: int | str | None = option(None, "NVMe space for blocks", metavar="SIZE")
    json: bool = option(False, "print JSON instead of tables")

    def __post_init__(self) -> None:
        for name in ("context", "sequences", "block_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(name, value, "must be at least 1")
        check_block_size(self.block_size)
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            fix = "must be above 0 and at most 1"
            raise ConfigError("gpu_memory_utilization", self.gpu_memory_utilization, fix)
        self._check_dtype()
        for name in ("gpu_memory", "cpu_memory", "nvme"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, parse_bytes(value, name))

    def _check_dtype(self) -> None:
        if self.kv_dtype is None:
            return
        self.kv_dtype = SHORT_DTYPES.get(self.kv_dtype, self.kv_dtype)
        if self.kv_dtype not in DTYPE_BITS:
            names = ", ".join([*SHORT_DTYPES, *DTYPE_BITS])
            raise ConfigError("kv_dtype", self.kv_dtype, f"choose one of {names}")


@dataclass(slots=True, frozen=True)
class TierPlan:
    """What a tier of a given size holds: blocks, tokens, and whole sequences of the context."""

    tier: str
    kv_bytes: int
    blocks: int
    tokens: int
    sequences: int


@dataclass(slots=True, frozen=True)
class KVPlan:
    """The answer of `tierkv plan`; byte counts are exact, scales of quantised KV not counted."""

    model: ModelFacts
    kv_dtype: str
    block_size: int
    context: int
    sequences: int
    bytes_per_token: dict[str, dict[str, int]]
    """KV dtype -> attention kind (`MHA`, `GQA`, `MQA`, as this model could be built) -> bytes."""
    block_bytes: int
    sequence_bytes: int
    total_bytes: int
    tiers: list[TierPlan]
    notes: list[str]


def make_plan(facts: ModelFacts, options: PlanOptions) -> KVPlan:
    """Compute the plan of one model."""
    dtype = options.kv_dtype or facts.kv_dtype
    layout = facts.layout(dtype, options.block_size)
    context = options.context or facts.context
    per_sequence = layout.blocks_for(context) * layout.block_bytes
    return KVPlan(
        model=facts,
        kv_dtype=dtype,
        block_size=options.block_size,
        context=context,
        sequences=options.sequences,
        bytes_per_token={row: bytes_by_kind(facts, row) for row in KV_DTYPES},
        block_bytes=layout.block_bytes,
        sequence_bytes=per_sequence,
        total_bytes=per_sequence * options.sequences,
        tiers=plan_tiers(facts, layout, context, options),
        notes=notes(facts, layout, options),
    )


def bytes_by_kind(facts: ModelFacts, dtype: str) -> dict[str, int]:
    """KV bytes of a token if this model had all its heads, its own, or one KV head."""
    heads = {"MHA": facts.num_heads, facts.attention: facts.num_kv_heads, "MQA": 1}
    layout = facts.layout(dtype, block_size=16)
    return {
        kind: dataclasses.replace(layout, num_kv_heads=n, windows=()).bytes_per_token
        for kind, n in heads.items()
    }


def plan_tiers(
    facts: ModelFacts, layout: KVLayout, context: int, options: PlanOptions
) -> list[TierPlan]:
    """One entry for each tier whose size was given."""
    sizes = {TierName.CPU: options.cpu_memory, TierName.NVME: options.nvme}
    plans = []
    if options.gpu_memory is not None:
        room = int(int(options.gpu_memory) * options.gpu_memory_utilization)
        kv_bytes = max(0, room - facts.weights_bytes)
        plans.append(fill(TierName.GPU, kv_bytes, layout.block_bytes, layout, context))
    for tier, size in sizes.items():
        if size is not None:
            plans.append(fill(tier, int(size), layout.slot_bytes, layout, context))
    return plans


def fill(
    tier: TierName, kv_bytes: int, slot_bytes: int, layout: KVLayout, context: int
) -> TierPlan:
    """How much fits into `kv_bytes` of a tier."""
    blocks = kv_bytes // slot_bytes
    return TierPlan(
        tier=tier.value,
        kv_bytes=kv_bytes,
        blocks=blocks,
        tokens=blocks * layout.block_size,
        sequences=blocks // layout.blocks_for(context),
    )


def notes(facts: ModelFacts, layout: KVLayout, options: PlanOptions) -> list[str]:
    """What the numbers do not say by themselves."""
    found = []
    if (options.context or 0) > facts.context:
        found.append(
            f"the model's positions end at {facts.context:,}: `serve` refuses longer sequences."
        )
    windows = [window for window in layout.windows if window is not None]
    if windows and layout.common_window is None:
        found.append(
            f"{len(windows)} of {layout.num_layers} layers see a window of {max(windows):,} tokens"
            " only; blocks hold all layers, so all blocks of a sequence are kept."
        )
    elif windows:
        found.append(
            f"every layer sees a window of at most {max(windows):,} tokens: blocks behind it are"
            " freed while a sequence runs, so longer sequences need less than shown."
        )
    if options.gpu_memory is not None:
        found.append("the GPU also needs room for activations, which is not counted here.")
        if int(options.gpu_memory) * options.gpu_memory_utilization < facts.weights_bytes:
            found.append("the weights alone do not fit the GPU memory given.")
    return found


def size_text(num_bytes: int) -> str:
    """A byte count for people: `320 KiB`, `2.5 GiB`."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    value, power = float(num_bytes), 0
    while value >= 1024 and power < len(units) - 1:
        value, power = value / 1024, power + 1
    return f"{value:.4g} {units[power]}"


def table(rows: list[list[str]]) -> str:
    """Rows as text, the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  " + "   ".join(cells).rstrip())
    return "\n".join(lines)


def report(plan: KVPlan) -> str:
    """The plan as text."""
    facts = plan.model
    kinds = list(plan.bytes_per_token[KV_DTYPES[0]])
    heading = [
        f"{kind}, {'this model' if kind == facts.attention else 'for comparison'}" for kind in kinds
    ]
    per_token = [
        ["KV bytes per token", *heading],
        *(
            [dtype, *(size_text(by_kind[kind]) for kind in kinds)]
            for dtype, by_kind in plan.bytes_per_token.items()
        ),
    ]
    parts = [
        f"{facts.name}: {facts.model_type}, {facts.num_layers} layers, {facts.num_heads} heads,"
        f" {facts.num_kv_heads} KV heads ({facts.attention}), head_dim {facts.head_dim},"
        f" context {facts.context:,}",
        f"weights: {size_text(facts.weights_bytes)} ({facts.weights_source})",
        table(per_token),
        f"With {plan.kv_dtype} KV and blocks of {plan.block_size} tokens\n"
        + table(
            [
                ["one block", size_text(plan.block_bytes)],
                [f"one sequence of {plan.context:,} tokens", size_text(plan.sequence_bytes)],
                [f"{plan.sequences:,} of them", size_text(plan.total_bytes)],
            ]
        ),
    ]
    if plan.tiers:
        parts.append(tier_table(plan))
    parts += [f"note: {note}" for note in plan.notes]
    return "\n\n".join(parts)


def tier_table(plan: KVPlan) -> str:
    """What fits on each tier, as text."""
    header = ["tier", "for KV", "blocks", "tokens", f"sequences of {plan.context:,}"]
    rows = [
        [t.tier, size_text(t.kv_bytes), f"{t.blocks:,}", f"{t.tokens:,}", f"{t.sequences:,}"]
        for t in plan.tiers
    ]
    return table([header, *rows])


def make_parser() -> Parser:
    """The parser of `tierkv plan`."""
    parser = Parser(prog="tierkv plan", description=(__doc__ or "").strip(), epilog=EXAMPLES)
    parser.add_argument("MODEL", nargs="?", help="model directory, hub id or well-known name")
    add_config_flag(parser)
    add_flags(parser, PlanOptions)
    return parser


def run(namespace: argparse.Namespace) -> int:
    """Print the plan."""
    values: dict[str, Any] = read_options(namespace, PlanOptions)
    take_model(namespace, values)
    options = PlanOptions(**values)
    plan = make_plan(read_facts(options.model), options)
    print(json.dumps(dataclasses.asdict(plan), indent=2) if options.json else report(plan))
    return 0
