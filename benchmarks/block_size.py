"""Which block size? Throughput and waste of 32 mixed requests at block sizes 1 to 256.

Throughput is of the real model (prompts of 32-512 tokens, outputs of 16-128, bf16), all block
sizes in turn; waste is sampled from the same engine, step by step, in a run that is not timed.

    python benchmarks/block_size.py [--quick] [--repeats 3] [--model llama-150m]
"""

from __future__ import annotations

from functools import partial
from typing import Any

from common import plots
from common.models import model_dir
from common.occupancy import Arrival, play
from common.runs import alternate, parse, parser, print_table, write
from common.workloads import Request, mixed

from tierkv import SamplingParams
from tierkv.config import EngineConfig
from tierkv.engine.core import EngineCore, EngineRequest

BLOCK_SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256]


def params(request: Request) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=request.num_new, ignore_eos=True)


def make_engine(name: str, block_size: int) -> EngineCore:
    config = EngineConfig(
        model=str(model_dir(name)),
        dtype="bfloat16",
        block_size=block_size,
        max_model_len=1024,
        kv_cache_memory="1GiB",
    )
    return EngineCore.from_config(config)


def run(core: EngineCore, requests: list[Request]) -> dict[str, Any]:
    """All requests from an empty cache to their ends."""
    core.reset_prefix_cache()
    for number, request in enumerate(requests):
        core.add_request(EngineRequest(str(number), request.prompt, params(request)))
    while core.has_work:
        core.step()
    return {}


def kept_share(core: EngineCore, requests: list[Request]) -> float:
    """Share of positions in held blocks that hold tokens, over the run's steps."""
    core.reset_prefix_cache()
    return play(core, [Arrival(0, r.prompt, params(r)) for r in requests]).paged_share


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__, repeats=3)
    options.add_argument("--model", default="llama-150m", help="shape of the model")
    args = parse(options, argv)
    name = "tiny" if args.quick else args.model
    requests = mixed(6, (8, 40), (2, 8)) if args.quick else mixed()
    engines = {size: make_engine(name, size) for size in BLOCK_SIZES}
    shares = {size: kept_share(core, requests) for size, core in engines.items()}
    samples = alternate(
        {str(size): partial(run, core, requests) for size, core in engines.items()},
        args.repeats,
        warm=False,  # the sampled run was one
        quiet_s=args.quiet_s,
    )
    num_tokens = sum(r.num_new for r in requests)
    sizes = {
        str(size): {
            **samples[str(size)].as_dict(),
            "tokens_per_s": round(num_tokens / samples[str(size)].median_s, 1),
            "waste": round(1 - shares[size], 4),
        }
        for size in BLOCK_SIZES
    }
    rows = [
        [f"block size {size}", f["tokens_per_s"], f"{f['waste']:.1%}"] for size, f in sizes.items()
    ]
    print_table([f"{name}, 32 mixed requests", "tokens/s", "waste"], rows)
    if args.out is not None:
        plots.lines(
            args.out / "block_size.png",
            BLOCK_SIZES,
            {"throughput": [f["tokens_per_s"] for f in sizes.values()]},
            title=f"Throughput and waste by block size ({name} shape)",
            left_label="generated tokens/s",
            right={"waste": [100 * f["waste"] for f in sizes.values()]},
            right_label="% of reserved positions without a token",
        )
    result = {"model": name, "dtype": "bfloat16", "block_sizes": sizes}
    return write(args.out, "block_size", result)


if __name__ == "__main__":
    main()
