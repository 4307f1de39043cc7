"""Chats that need four times the pool: what are swap and prefetch worth?

Chats of 8 turns, all alive at once, whose contexts together need four times the pool. Each turn
sends the whole chat again. Compared: a pool that holds everything, one tier (what was evicted is
computed again), lower tiers with swap but without prefetch, and with prefetch (`lookahead`). Where
there is NVMe, the CPU tier is as large as the pool, so that half of the chats lie on the disk.

As many chats as the pool can hold are answered at once, in every variant: a larger pool also allows
a larger batch, which no tier gives back. What that is worth is the last variant.

    python benchmarks/oversubscribe.py [--quick] [--repeats 3] [--model llama-150m]
"""

from __future__ import annotations

import random
import tempfile
from typing import Any

from common.models import cache_dir, model_dir
from common.runs import alternate, parse, parser, print_table, write
from common.systems import make_llm
from common.tiers import settle
from common.workloads import prompt, tokens
from transformers import AutoConfig

from tierkv import LLM, SamplingParams

SHARE = 4
SWAP: dict[str, Any] = {"preemption_mode": "swap"}
NO_PREFETCH: dict[str, Any] = {**SWAP, "prefetch_policy": "none"}
ALL_AT_ONCE = "unlimited pool, all at once"
TARGETS = {"of the unlimited pool": 0.9, "of recompute": 2.0}


class Chats:
    """The work: chats, turns, tokens said and answered."""

    def __init__(self, count: int, turns: int, said: int, answered: int, opening: int) -> None:
        self.count, self.turns, self.said, self.answered = count, turns, said, answered
        self.opening = opening

    @property
    def num_tokens(self) -> int:
        """Tokens of one chat at its end."""
        return self.opening + self.turns * (self.said + self.answered)

    def blocks(self, block_size: int = 16) -> int:
        return self.count * -(-self.num_tokens // block_size)


def block_bytes(model: str) -> int:
    """Bytes of one block of 16 tokens in bf16."""
    config = AutoConfig.from_pretrained(model_dir(model))
    heads = config.num_key_value_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return int(2 * config.num_hidden_layers * heads * 16 * 2)


def variants_of(
    chats: Chats, model: str, pool: int, at_once: int, folder: str
) -> dict[str, dict[str, Any]]:
    """Engine options by name."""
    limited = {"num_gpu_blocks": pool, "max_num_seqs": at_once}
    unlimited = {"num_gpu_blocks": chats.blocks() + 64}
    cpu = {**limited, "offload": "cpu=2GiB"}
    both = {**limited, "cpu_cache_size": pool * block_bytes(model)}
    return {
        "unlimited pool": {**unlimited, "max_num_seqs": at_once},
        "recompute": {**limited, "preemption_mode": "recompute"},
        "swap, cpu": {**cpu, **NO_PREFETCH},
        "swap + lookahead, cpu": {**cpu, **SWAP},
        "swap, cpu + nvme": {**both, **NO_PREFETCH, "offload": f"cpu,nvme=2GiB:{folder}/a"},
        "swap + lookahead, cpu + nvme": {**both, **SWAP, "offload": f"cpu,nvme=2GiB:{folder}/b"},
        ALL_AT_ONCE: unlimited,
    }


def play(llm: LLM, chats: Chats) -> dict[str, Any]:
    """All chats, turn by turn, each round in the same order; times of first tokens."""
    settle(llm)
    llm.reset_prefix_cache()
    rng = random.Random(3)
    texts = [prompt(rng, chats.opening) for _ in range(chats.count)]
    params = SamplingParams(temperature=0.0, max_tokens=chats.answered, ignore_eos=True)
    before, first_s = llm.metrics(), []
    for _ in range(chats.turns):
        texts = [text + tokens(rng, chats.said) for text in texts]
        outputs = llm.generate([{"prompt_token_ids": t} for t in texts], params, use_tqdm=False)
        for text, output in zip(texts, outputs, strict=True):
            text.extend(output.outputs[0].token_ids)
            times = output.metrics
            assert times is not None and times.first_token_s is not None
            first_s.append(times.first_token_s - times.arrival_s)
    after = llm.metrics()
    first_s.sort()
    return {
        "generated_tokens": chats.count * chats.turns * chats.answered,
        "ttft_p50_s": round(first_s[len(first_s) // 2], 4),
        "ttft_p99_s": round(first_s[int(len(first_s) * 0.99)], 4),
        **{
            name: after[name] - before[name]
            for name in ("computed_tokens", "preemptions", "swaps", "hit_tokens")
        },
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__, repeats=3)
    options.add_argument("--model", default="llama-150m", help="shape of the model")
    args = parse(options, argv)
    model = "tiny" if args.quick else args.model
    chats = Chats(4, 2, 8, 4, 32) if args.quick else Chats(16, 8, 64, 24, 512)
    pool = max(chats.blocks() // SHARE, chats.blocks() // chats.count + 8)
    at_once = max(1, pool * chats.count // chats.blocks())
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
        llms = {
            name: make_llm(model, max_model_len=chats.num_tokens + 64, **settings)
            for name, settings in variants_of(chats, model, pool, at_once, folder).items()
        }
        samples = alternate(
            {name: lambda llm=llm: play(llm, chats) for name, llm in llms.items()},  # type: ignore[misc]
            args.repeats,
            warm=False,
            quiet_s=args.quiet_s,
        )
        for llm in llms.values():
            llm.close()
    variants = {
        name: {
            **s.as_dict(),
            "tokens_per_s": round(s.notes["generated_tokens"] / s.median_s, 1),
        }
        for name, s in samples.items()
    }
    rows: list[list[object]] = [
        [name, v["tokens_per_s"], v["ttft_p50_s"], v["ttft_p99_s"], v["computed_tokens"]]
        for name, v in variants.items()
    ]
    print_table(
        [f"{at_once} of {chats.count} chats", "tokens/s", "TTFT p50", "p99", "computed"], rows
    )
    result = {
        "model": model,
        "pool_blocks": pool,
        "chats_at_once": at_once,
        "working_set_blocks": chats.blocks(),
        "targets": TARGETS,
        "variants": variants,
        "ratios": ratios_of({name: v["tokens_per_s"] for name, v in variants.items()}),
    }
    return write(args.out, "oversubscribe", result)


def ratios_of(rates: dict[str, float]) -> dict[str, dict[str, float]]:
    """What swap with lookahead reaches, for each set of tiers."""
    bases = {
        "of the unlimited pool": "unlimited pool",
        "of recompute": "recompute",
        "of the unlimited pool with a larger batch": ALL_AT_ONCE,
    }
    return {
        tiers: {
            title: round(rates[f"swap + lookahead, {tiers}"] / rates[base], 3)
            for title, base in bases.items()
        }
        for tiers in ("cpu", "cpu + nvme")
    }


if __name__ == "__main__":
    main()
