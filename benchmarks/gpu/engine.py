"""The whole engine on a GPU: the same tokens as transformers, and how fast.

tokens        greedy tokens in fp32 of small models, with pressure and lower tiers
small_model   the folklore benchmark, done fairly: OPT-125m, one prompt, 256 tokens
large_model   the shape of Llama-3-8B, random weights: one sequence, 256 sequences
first_token   a prompt of 32k tokens whose prefix is in the pool, below it, nowhere
working_set   chats that need four times the pool
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common.models import model_dir
from common.systems import check_lengths, run_continuous, run_tierkv, token_ids
from common.tiers import settle
from common.workloads import Request, prompt
from oversubscribe import Chats, play
from tier_ttft import UNIQUE, Place, timed
from tier_ttft import first_token as ask
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

from gpu.setup import Rows, Setup, plain_row, shown, target_row, tried, wall_s
from tierkv import LLM

_SIZES: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 4096, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


# ---------------------------------------------------------------------- tokens


def small_configs() -> dict[str, Any]:
    """Families whose attention differs: grouped heads, windows, soft caps, no rotary embedding."""
    from transformers import Gemma2Config, MistralConfig, OPTConfig, Qwen3Config

    grouped = {**_SIZES, "num_key_value_heads": 2}
    return {
        "llama": LlamaConfig(**grouped, tie_word_embeddings=True),
        "qwen3": Qwen3Config(**grouped, head_dim=32),
        "mistral, window": MistralConfig(**grouped, sliding_window=64),
        "gemma2": Gemma2Config(**grouped, head_dim=64, sliding_window=64, query_pre_attn_scalar=64),
        "opt": OPTConfig(
            vocab_size=512, hidden_size=128, ffn_dim=256, num_hidden_layers=3,
            num_attention_heads=4, max_position_embeddings=4096, word_embed_proj_dim=128,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ),
        "gpt2": GPT2Config(
            vocab_size=512, n_embd=128, n_layer=3, n_head=4, n_positions=4096,
            bos_token_id=1, eos_token_id=2,
        ),
    }  # fmt: skip


def tokens(setup: Setup) -> dict[str, Any]:
    """Models and settings with which a token differs from transformers' own."""
    configs = small_configs()
    names = setup.size(list(configs), ["llama"])
    wrong: list[str] = []
    for name in names:
        folder = setup.folder / name.replace(", ", "-")
        torch.manual_seed(len(name))
        AutoModelForCausalLM.from_config(configs[name], dtype=torch.float32).save_pretrained(folder)
        requests = [
            Request(prompt_of(random.Random(i), setup.size(150 + 37 * i, 20 + i)), 24)
            for i in range(setup.size(8, 2))
        ]
        expected = expected_tokens(setup, folder, requests)
        for label, options in token_settings(setup, folder).items():
            with LLM(str(folder), dtype="float32", device=setup.device.type, **options) as llm:
                for turn in ("cold", "again"):
                    if token_ids(run_tierkv(llm, requests)) != expected:
                        wrong.append(f"{name}, {label}, {turn}")
    return {"models": names, "wrong": wrong}


def prompt_of(rng: random.Random, count: int) -> list[int]:
    return [1, *(rng.randrange(4, 512) for _ in range(count - 1))]


def token_settings(setup: Setup, folder: Path) -> dict[str, dict[str, Any]]:
    tiers = {"offload": f"cpu=64MiB,nvme=256MiB:{folder}-store", "num_gpu_blocks": 70}
    return {
        "blocks of 16": {"num_gpu_blocks": 400},
        "blocks of 64": {"num_gpu_blocks": 100, "block_size": 64},
        "no graphs": {"num_gpu_blocks": 400, "enforce_eager": True},
        "overlapped": {"num_gpu_blocks": 400, "async_scheduling": True},
        "in turn": {"num_gpu_blocks": 400, "async_scheduling": False},
        "profiled pool": setup.size({"gpu_memory_utilization": 0.2}, {"kv_cache_memory": "4MiB"}),
        "tiers, swap": {**tiers, "preemption_mode": "swap"},
        "tiers, recompute": {**tiers, "preemption_mode": "recompute"},
    }


@torch.inference_mode()
def expected_tokens(setup: Setup, folder: Path, requests: Sequence[Request]) -> list[list[int]]:
    """transformers' greedy tokens with eager attention, one request at a time."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).to(setup.device)
    found = []
    for request in requests:
        ids = torch.tensor([request.prompt], device=setup.device)
        out = model.generate(ids, **exactly(request.num_new))
        found.append(out[0, len(request.prompt) :].tolist())
    return found


def exactly(num_new: int) -> dict[str, Any]:
    """Greedy, so many tokens, whatever they are."""
    return {
        "max_new_tokens": num_new,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }


def tokens_rows(found: dict[str, Any]) -> Rows:
    wrong = found["wrong"]
    yield "tokens unlike transformers'", "; ".join(wrong) or "0", "<= 0", "no" if wrong else "yes"


# ---------------------------------------------------------------------- OPT-125m


def small_model(setup: Setup) -> dict[str, Any]:
    """Seconds for one prompt of 21 tokens and 256 new ones, by transformers and by tierkv."""
    name, num_new = setup.size(("opt-125m", 256), ("tiny", 8))
    request = Request(prompt(random.Random(1), 21), num_new)
    model = AutoModelForCausalLM.from_pretrained(model_dir(name), dtype=torch.bfloat16)
    model = model.to(setup.device).eval()
    ids = torch.tensor([request.prompt], device=setup.device)

    @torch.inference_mode()
    def generate() -> None:
        model.generate(ids, **exactly(num_new))
        setup.synchronize()

    with engine(setup, model_dir(name), max_model_len=512, num_gpu_blocks=256) as llm:

        def own() -> None:
            llm.reset_prefix_cache()
            check_lengths([request], token_ids(run_tierkv(llm, [request])))

        times: dict[str, list[float]] = {"generate": [], "tierkv": []}
        for run in (generate, own):
            run()
        for _ in range(setup.size(5, 1)):
            times["generate"].append(wall_s(generate))
            times["tierkv"].append(wall_s(own))
    medians = {key: round(statistics.median(values), 4) for key, values in times.items()}
    return {"seconds": medians, "ratio": round(medians["generate"] / medians["tierkv"], 2)}


def small_model_rows(found: dict[str, Any]) -> Rows:
    for name, seconds in found["seconds"].items():
        yield plain_row(f"OPT-125m, 21 + 256 tokens, {name}", seconds, "s")
    yield target_row("OPT-125m, faster than `generate`", found["ratio"], 10)


# ---------------------------------------------------------------------- Llama-3-8B's shape


def large_config(setup: Setup) -> LlamaConfig:
    """Llama-3.1-8B without its limit on positions' scaling; tiny in a dry run."""
    if setup.is_dry:
        return LlamaConfig(**{**_SIZES, "vocab_size": 8192}, num_key_value_heads=2)
    return LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072,
        rope_theta=500000.0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def large_dir(setup: Setup) -> Path:
    """A folder with the config alone: weights are random."""
    folder = setup.folder / "large"
    if not folder.exists():
        large_config(setup).save_pretrained(folder)
    return folder


def free_memory(setup: Setup) -> None:
    """Give the device back what nobody uses; an engine is a cycle, which only `gc` finds."""
    gc.collect()
    if setup.device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def engine(setup: Setup, model: Path, **options: Any) -> Iterator[LLM]:
    """tierkv on the device; its memory is free again afterwards, once the caller has let go of it
    too: so one function opens one engine."""
    free_memory(setup)
    llm = LLM(str(model), dtype="bfloat16", device=setup.device.type, **options)
    if (moves := llm._engine.cache.moves) is not None:
        moves._mover.warm_up(60.0)  # type: ignore[attr-defined]  # its memory is registered
    del moves
    try:
        yield llm
    finally:
        llm.close()
        del llm


@contextmanager
def large_engine(setup: Setup, **options: Any) -> Iterator[LLM]:
    with engine(setup, large_dir(setup), load_format="dummy", **options) as llm:
        yield llm


def large_model(setup: Setup) -> dict[str, Any]:
    """A token of one sequence; tokens per second of 256; a step beyond the GPU's work."""
    many, num_prompt, num_new = setup.size((256, 128, 128), (4, 16, 8))
    requests = [Request(prompt(random.Random(i), num_prompt), num_new) for i in range(many)]
    found = own_figures(setup, requests)
    free_memory(setup)  # or the peer would have less of it
    found["continuous_batching_tokens_per_s"] = tried(partial(continuous, setup, requests))
    return found


def own_figures(setup: Setup, requests: list[Request]) -> dict[str, Any]:
    """Those of `large_model` that are tierkv's."""
    many, longest = len(requests), max(len(r.prompt) + r.num_new for r in requests)
    blocks = many * -(-(longest + 16) // 16) + 64
    with large_engine(setup, num_gpu_blocks=blocks, max_num_seqs=many) as llm:
        found: dict[str, Any] = {"one_ms_per_token": round(1000 * one_token_s(setup, llm), 3)}
        weights = sum(p.numel() * p.element_size() for p in weights_of(llm))
        if limit := setup.limits.get("copy_gb_per_s"):
            found["floor_ms"] = weights / limit / 1e6
        run_tierkv(llm, requests[:2])
        for ending in ("_in_turn", ""):  # what overlapping steps is worth
            llm._engine.steps.is_overlapped = not ending
            steps = StepTimes(setup, llm)
            llm.reset_prefix_cache()
            seconds = wall_s(lambda: check_lengths(requests, token_ids(run_tierkv(llm, requests))))
            found[f"many_tokens_per_s{ending}"] = round(
                sum(r.num_new for r in requests) / seconds, 1
            )
            found[f"step_ms{ending}"] = steps.result()
    return found


def weights_of(llm: LLM) -> Iterator[torch.nn.Parameter]:
    """All that a decode step reads: not the embedding, of which it reads a few rows."""
    model: PreTrainedModel = llm._engine.steps.executor.loaded.model  # type: ignore[attr-defined]
    embedding = model.get_input_embeddings().weight
    output = model.get_output_embeddings()
    tied = output is not None and output.weight is embedding
    return (p for p in model.parameters() if p is not embedding or tied)


def one_token_s(setup: Setup, llm: LLM) -> float:
    """Seconds per further token of one sequence: that of a long answer less that of a short one."""
    short, long = setup.size((16, 144), (2, 6))
    ids = prompt(random.Random(99), 64)
    times = {count: [] for count in (short, long)}  # type: dict[int, list[float]]
    for _ in range(setup.size(5, 1)):
        for count in times:
            times[count].append(wall_s(lambda n=count: run_tierkv(llm, [Request(ids, n)])))  # type: ignore[misc]
    return (statistics.median(times[long]) - statistics.median(times[short])) / (long - short)


class StepTimes:
    """Wraps the engine's executor: how long the device worked for each step of decode rows, and
    how long the whole step took.

    The device's time is that of the step's graph alone. Around the executor's whole call it would
    count what the CPU does there before the device has anything to do.
    """

    def __init__(self, setup: Setup, llm: LLM) -> None:
        self._setup, self._executor = setup, llm._engine.steps.executor
        self._run = self._executor.run
        self._marks: list[tuple[int, float, Any]] = []
        self._events: Any = None
        graphs = getattr(self._executor, "graphs", None)
        self._replays: dict[int, Callable[[], Any]] = {} if graphs is None else graphs._replays
        self._plain = dict(self._replays)
        self._replays.update({n: partial(self._replay, run) for n, run in self._plain.items()})
        self._executor.run = self._timed  # type: ignore[method-assign]

    def _replay(self, replay: Callable[[], Any]) -> None:
        first, last = self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        first.record()
        replay()
        last.record()

    def _timed(self, plan: Any) -> Any:
        self._events = None
        logits = self._run(plan)
        self._marks.append((len(plan.rows), time.perf_counter(), self._events))
        return logits

    def result(self) -> dict[str, float]:
        """Medians over steps of the largest batch that was a graph; empty where none was."""
        self._executor.run = self._run  # type: ignore[method-assign]
        self._replays.update(self._plain)
        self._setup.synchronize()
        largest = max((size for size, _, events in self._marks if events), default=0)
        pairs = [
            (at - before[1], events[0].elapsed_time(events[1]) / 1000)
            for before, (size, at, events) in zip(self._marks, self._marks[1:], strict=False)
            if events and before[2] and before[0] == size == largest
        ]
        if not pairs:
            return {}
        whole, gpu = (1000 * statistics.median(times) for times in zip(*pairs, strict=True))
        return {"whole": round(whole, 3), "gpu": round(gpu, 3), "beyond": round(whole - gpu, 3)}


def continuous(setup: Setup, requests: list[Request]) -> float:
    """Tokens per second of transformers' continuous batching on a model of the same shape."""
    with torch.device(setup.device):
        model = AutoModelForCausalLM.from_config(large_config(setup), dtype=torch.bfloat16).eval()
    run_continuous(model, requests[:2])
    free_memory(setup)  # its cache takes a share of what is free
    outputs, seconds = run_continuous(model, requests)
    return round(check_lengths(requests, outputs) / seconds, 1)


def large_model_rows(found: dict[str, Any]) -> Rows:
    yield plain_row("8B, one sequence, per token", found["one_ms_per_token"], "ms")
    if "floor_ms" in found:
        ratio = found["one_ms_per_token"] / found["floor_ms"]
        yield target_row("8B, one sequence, of weights / bandwidth", ratio, 1.15, at_most=True)
    own, peer = found["many_tokens_per_s"], found["continuous_batching_tokens_per_s"]
    yield plain_row("8B, 256 sequences", own, "tokens/s")
    in_turn = found["many_tokens_per_s_in_turn"]
    yield plain_row("8B, 256 sequences, steps not overlapped", in_turn, "tokens/s")
    yield "8B, 256 sequences, transformers' continuous batching", shown(peer, "tokens/s"), "", ""
    if isinstance(peer, float):
        yield target_row("8B, 256 sequences, faster than that", own / peer, 2.0)
    if found["step_ms"]:
        beyond = found["step_ms"]["beyond"]
        yield target_row("step of 256 beyond the GPU's time, ms", beyond, 2.0, at_most=True)


# ---------------------------------------------------------------------- first token


def first_token(setup: Setup) -> dict[str, Any]:
    """Seconds until the first token of a prompt of 32k, by where its prefix is."""
    length = setup.size(32768, 256)
    prefix = prompt(random.Random(7), length - UNIQUE)
    sizes = setup.size(("16GiB", "16GiB"), ("64MiB", "256MiB"))
    options: dict[str, Any] = {
        "num_gpu_blocks": length // 16 + 256,
        "max_model_len": length + 64,
        "max_num_batched_tokens": setup.size(8192, 128),
        "offload": f"cpu={sizes[0]},nvme={sizes[1]}",
        "nvme_path": str(setup.folder / "first-token"),
        "load_policy": "load",
        "prefetch_policy": "none",
    }
    seconds = seconds_by_place(setup, prefix, options)
    seconds["restart"] = after_restart(setup, prefix, options)
    return {"length": length, "seconds": seconds}


def seconds_by_place(setup: Setup, prefix: list[int], options: dict[str, Any]) -> dict[str, float]:
    seconds: dict[str, float] = {}
    with large_engine(setup, **options) as llm:
        ask(llm, prefix[:100])
        for where in ("cold", "gpu", "cpu", "nvme"):
            place = Place(llm, prefix, where)
            runs = [place() for _ in range(setup.size(3, 1))]
            seconds[where] = round(statistics.median(run["_seconds"] for run in runs), 4)
        settle(llm)
    return seconds


def after_restart(setup: Setup, prefix: list[int], options: dict[str, Any]) -> float:
    with large_engine(setup, **options) as llm:
        ask(llm, [1, 5, 6])
        return round(timed(partial(ask, llm, prefix + [5] * UNIQUE))[0], 4)


def first_token_rows(found: dict[str, Any]) -> Rows:
    for where, seconds in found["seconds"].items():
        yield plain_row(f"8B, first token after {found['length']}, {where}", seconds, "s")
    ratio = found["seconds"]["cold"] / found["seconds"]["cpu"]
    yield target_row("8B, first token, CPU hit faster than cold", ratio, 10)


# ---------------------------------------------------------------------- working set


def working_set(setup: Setup) -> dict[str, Any]:
    """Tokens per second of chats with a pool for all of them, and with a quarter of it."""
    chats = setup.size(Chats(32, 4, 256, 64, 4096), Chats(4, 2, 8, 4, 32))
    pool = chats.blocks() // 4
    at_once = max(1, chats.count // 4)
    shared: dict[str, Any] = {"max_num_seqs": at_once, "max_model_len": chats.num_tokens + 64}
    variants: dict[str, dict[str, Any]] = {
        "unlimited pool": {"num_gpu_blocks": chats.blocks() + 64},
        "recompute": {"num_gpu_blocks": pool, "preemption_mode": "recompute"},
        "swap + lookahead": {
            "num_gpu_blocks": pool,
            "preemption_mode": "swap",
            "offload": f"cpu={setup.size('24GiB', '64MiB')}",
        },
    }
    return {name: played(setup, chats, {**shared, **own}) for name, own in variants.items()}


def played(setup: Setup, chats: Chats, options: dict[str, Any]) -> dict[str, Any]:
    with large_engine(setup, **options) as llm:
        start = time.perf_counter()
        notes = play(llm, chats)
        seconds = time.perf_counter() - start
    return {"tokens_per_s": round(notes["generated_tokens"] / seconds, 1), **notes}


def working_set_rows(found: dict[str, Any]) -> Rows:
    for name, entry in found.items():
        yield plain_row(f"8B, chats of four pools, {name}", entry["tokens_per_s"], "tokens/s")
    own, full = (found[n]["tokens_per_s"] for n in ("swap + lookahead", "unlimited pool"))
    yield target_row("8B, chats of four pools, of the unlimited pool", own / full, 0.9)
