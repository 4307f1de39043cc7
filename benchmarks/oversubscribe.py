"""Chats that need four times the pool: what are swap and prefetch worth?

Chats of 8 turns, all alive at once, whose contexts together need four times the pool. Each turn
sends the whole chat again. Compared: a pool that holds everything, one tier (what was evicted is
computed again), a CPU tier with swap but without prefetch, and with prefetch (`lookahead`).

    python benchmarks/oversubscribe.py [--quick] [--repeats 3] [--model llama-150m]
"""

from __future__ import annotations

import random
from typing import Any

from common.runs import alternate, parse, parser, print_table, write
from common.systems import make_llm
from common.tiers import settle
from common.workloads import prompt, tokens

from tierkv import LLM, SamplingParams

SHARE = 4
VARIANTS: dict[str, dict[str, Any]] = {
    "unlimited pool": {},
    "recompute": {"preemption_mode": "recompute"},
    "swap": {"offload": "cpu=2GiB", "preemption_mode": "swap", "prefetch_policy": "none"},
    "swap, lookahead": {"offload": "cpu=2GiB", "preemption_mode": "swap"},
}
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
    llms = {
        name: make_llm(
            model,
            num_gpu_blocks=chats.blocks() + 64 if name == "unlimited pool" else pool,
            max_model_len=chats.num_tokens + 64,
            **settings,
        )
        for name, settings in VARIANTS.items()
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
    rates = {name: v["tokens_per_s"] for name, v in variants.items()}
    rows: list[list[object]] = [
        [name, v["tokens_per_s"], v["ttft_p50_s"], v["ttft_p99_s"], v["computed_tokens"]]
        for name, v in variants.items()
    ]
    print_table(["chats in 1/4 of the pool", "tokens/s", "TTFT p50", "p99", "computed"], rows)
    result = {
        "model": model,
        "pool_blocks": pool,
        "working_set_blocks": chats.blocks(),
        "targets": TARGETS,
        "variants": variants,
        "ratios": {
            "of the unlimited pool": round(rates["swap, lookahead"] / rates["unlimited pool"], 3),
            "of recompute": round(rates["swap, lookahead"] / rates["recompute"], 3),
        },
    }
    return write(args.out, "oversubscribe", result)


if __name__ == "__main__":
    main()
