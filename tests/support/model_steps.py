"""Drives a `ModelRunner` without an engine: sequences with hand-made, scattered block tables."""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq
from pathlib import Path

import torch
from torch import Tensor

from tierkv.cache.pools import GpuPool
from tierkv.config import EngineConfig
from tierkv.engine.plan import Plan, PlanRow
from tierkv.engine.request import Request, Sequence
from tierkv.engine.sampling_params import SamplingParams
from tierkv.model.loaded import LoadedModel
from tierkv.model.loader import load_model
from tierkv.model.runner import ModelRunner


def load_tiny(directory: Path, **options: object) -> LoadedModel:
    """Load in fp32 (unless told otherwise), without the probe; threads do not help tiny models."""
    values = {
        "model": str(directory),
        "dtype": "float32",
        "verify_model": False,
        "num_threads": 1,
        **options,
    }
    return load_model(EngineConfig.from_mapping(values))


def make_runner(loaded: LoadedModel, block_size: int, num_blocks: int) -> ModelRunner:
    """A runner over a new pool."""
    return ModelRunner(loaded, GpuPool(loaded.layout(block_size), num_blocks, loaded.device))


def make_sequence(seq_id: int, token_ids: list[int], block_table: list[int]) -> Sequence:
    """A sequence that owns these blocks."""
    request = Request(str(seq_id), token_ids, SamplingParams(), max_tokens=1)
    seq = Sequence(seq_id, request, 0, token_ids)
    seq.block_table = block_table
    return seq


def random_texts(lengths: Seq[int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Token ids, one list per length."""
    generator = random.Random(seed)
    return [[generator.randrange(vocab_size) for _ in range(length)] for length in lengths]


def run_chunked(
    runner: ModelRunner, texts: list[list[int]], max_chunk: int, seed: int = 0
) -> list[Tensor]:
    """Every text's logits `[len(text), vocab_size]`, computed in packed steps.

    Each step takes a random subset of the texts, from each a chunk of 1..max_chunk tokens (the
    last third of a text token by token, as in decoding); block tables grow as needed, from blocks
    in random order.
    """
    generator = random.Random(seed)
    block_size = runner.pool.layout.block_size
    empty = list(range(1, runner.pool.num_blocks))
    generator.shuffle(empty)
    seqs = [make_sequence(i, list(text), []) for i, text in enumerate(texts)]
    done = [0] * len(texts)
    parts: list[list[Tensor]] = [[] for _ in texts]
    while True:
        left = [i for i, text in enumerate(texts) if done[i] < len(text)]
        if not left:
            return [torch.cat(logits) for logits in parts]
        chosen = generator.sample(left, generator.randint(1, len(left)))
        rows = []
        for i in chosen:
            is_decoding = done[i] >= len(texts[i]) * 2 // 3
            size = 1 if is_decoding else generator.randint(1, max_chunk)
            size = min(size, len(texts[i]) - done[i])
            while len(seqs[i].block_table) * block_size < done[i] + size:
                seqs[i].block_table.append(empty.pop())
            rows.append(PlanRow(seqs[i], done[i], size, 0, size))
            done[i] += size
        logits = runner.run(Plan(rows=rows, num_tokens=sum(row.num_tokens for row in rows)))
        sizes = [row.num_tokens for row in rows]
        for i, part in zip(chosen, logits.split(sizes), strict=True):
            parts[i].append(part)


@torch.inference_mode()
def eager_logits(loaded: LoadedModel, text: list[int]) -> Tensor:
    """`[len(text), vocab_size]` by transformers' own eager attention on the same weights."""
    model = loaded.model
    model.set_attn_implementation("eager")
    try:
        logits: Tensor = model(input_ids=torch.tensor([text]), use_cache=False).logits[0]
        return logits.float()
    finally:
        model.set_attn_implementation("tierkv")
