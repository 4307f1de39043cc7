"""Plans as integers, blocks in parts, what ranks have in common, what cannot be shared."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field, replace

import pytest
import torch
from tiny_models import FAMILIES

from tierkv.cache.layout import KVLayout
from tierkv.config import EngineConfig
from tierkv.engine.plan import Plan, PlanRow
from tierkv.engine.tp import ranks
from tierkv.engine.tp.common import RankTiers, common_tiers
from tierkv.engine.tp.port import join_block, split_block
from tierkv.engine.tp.ranks import check_ranks
from tierkv.engine.tp.steps import StepDecoder, StepEncoder
from tierkv.errors import ConfigError, UnsupportedModelError
from tierkv.model.shard import Shard, check_shardable, rank_in_environment
from tierkv.types import BlockCopy, TierName

CPU, NVME = TierName.CPU, TierName.NVME


@dataclass
class Text:
    """What a plan's row reads of its sequence."""

    seq_id: int
    token_ids: list[int]
    block_table: list[int] = field(default_factory=list)
    table_version: int = 0
    epoch: int = 0


def test_steps_arrive_as_they_were_planned() -> None:
    rng = random.Random(5)
    encoder, decoder = StepEncoder(), StepDecoder()
    texts: dict[int, Text] = {}
    gone: list[int] = []
    for step in range(200):
        if len(texts) < 6:
            texts[step] = Text(step, [rng.randrange(1 << 31) for _ in range(300)])
        plan = Plan(copies=[BlockCopy(*rng.sample(range(99), 2), 3)] * rng.randrange(3))
        for text in rng.sample(list(texts.values()), rng.randint(1, len(texts))):
            if rng.random() < 0.2:  # preempted: the table is made anew
                text.table_version += 1
                text.block_table = [rng.randrange(1 << 40) for _ in range(rng.randint(1, 9))]
            text.block_table += [rng.randrange(1 << 40) for _ in range(rng.randrange(3))]
            start, count = rng.randrange(200), rng.choice([1, 1, 40])
            plan.rows.append(PlanRow(text, start, count, rng.randrange(3), rng.randint(0, count)))
        found, forgotten = decoder.decode(encoder.encode(plan))
        assert (found.copies, forgotten) == (plan.copies, gone)
        assert found.num_tokens == sum(row.num_tokens for row in plan.rows)
        for row, mirrored in zip(plan.rows, found.rows, strict=True):
            for name in ("start", "num_tokens", "num_samples", "num_logit_rows"):
                assert getattr(mirrored, name) == getattr(row, name)
            end = row.start + row.num_tokens
            assert mirrored.seq.token_ids[row.start : end] == row.seq.token_ids[row.start : end]
            assert mirrored.seq.token_ids[row.start] == row.seq.token_ids[row.start]
            assert mirrored.seq.block_table == row.seq.block_table
            assert mirrored.seq.table_version == row.seq.table_version
        gone = [row.seq.seq_id for row in plan.rows if rng.random() < 0.1]
        for seq_id in gone:
            encoder.forget(seq_id)
            del texts[seq_id]
    encoder.forget(12345)  # never ran
    assert decoder.decode(encoder.encode(Plan()))[1] == gone


def test_a_step_of_decoding_is_small() -> None:
    """A long context's table is not sent again with every token."""
    encoder, text = StepEncoder(), Text(1, list(range(5000)), list(range(300)))
    encoder.encode(Plan([PlanRow(text, 0, 4799, 1, 1)]))
    assert len(encoder.encode(Plan([PlanRow(text, 4799, 1, 1, 1)]))) == 8 * (3 + 8 + 1)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_blocks_come_apart_and_together(size: int) -> None:
    whole = KVLayout(3, 4, 8, 16, "bfloat16")
    part = replace(whole, num_kv_heads=4 // size, shard=f"0/{size}")
    block = random.Random(size).randbytes(whole.block_bytes)
    parts = split_block(block, part, whole)
    assert [len(p) for p in parts] == [part.block_bytes] * size
    assert join_block(parts, part, whole) == block
    plane = 16 * 8 * 2  # one head's keys of one layer
    for rank, mine in enumerate(parts):
        own = 4 // size * plane
        assert mine[:own] == block[rank * own : (rank + 1) * own]
        assert mine[own : 2 * own] == block[4 * plane + rank * own :][:own]


def test_blocks_that_every_rank_has_whole() -> None:
    whole = KVLayout(3, 4, 8, 16, "bfloat16")
    part = replace(whole, shard="1/2")
    block = random.Random(0).randbytes(whole.block_bytes)
    assert split_block(block, part, whole) == [block, block]
    assert join_block([block, block], part, whole) == block


def test_layouts_of_ranks_differ_and_keys_do_not() -> None:
    layout = KVLayout(3, 2, 8, 16, "float32", shard="1/3")
    assert (layout.rank, layout.num_shards) == (1, 3)
    assert layout.shards[1] == layout
    assert len({part.fingerprint for part in layout.shards}) == 3


def test_what_ranks_have_in_common() -> None:
    a, b, c = b"a" * 16, b"b" * 16, b"c" * 16
    first = RankTiers({CPU: 9, NVME: 5}, [(0, a), (1, b), (2, c)])
    second = RankTiers({CPU: 8, NVME: 7}, [(0, a), (2, b), (3, c)])
    assert common_tiers([first, second]) == RankTiers({CPU: 8, NVME: 5}, [(0, a)])
    assert common_tiers([first]) == first
    assert common_tiers([first, RankTiers({CPU: 3}, [])]) == RankTiers({CPU: 3}, [])
    assert common_tiers([RankTiers({}, []), first]) == RankTiers({}, [])


@pytest.mark.parametrize(
    ("family", "size", "message"),
    [
        ("stablelm", 2, "no tensor-parallel plan"),
        ("gpt2", 2, "no tensor-parallel plan"),
        ("llama-mqa", 2, "1 key/value heads do not divide"),
        ("llama", 3, "key/value heads do not divide by it; choose a divisor of"),
    ],
)
def test_models_that_cannot_be_shared(family: str, size: int, message: str) -> None:
    config = FAMILIES[family]()
    check_shardable(config, Shard())
    with pytest.raises(ConfigError, match=message) as caught:
        check_shardable(config, Shard(0, size))
    is_refusal = isinstance(caught.value, UnsupportedModelError)
    assert caught.value.option == ("model" if is_refusal else "tensor_parallel_size")


def test_models_that_can() -> None:
    for family in ("llama", "qwen3", "mixtral", "gemma2"):
        check_shardable(FAMILIES[family](), Shard(1, 2))


def test_options_that_cannot_be_met() -> None:
    with pytest.raises(ConfigError, match="tensor_parallel_size=0: must be a whole number"):
        EngineConfig(tensor_parallel_size=0)
    on_cpu = {"tensor_parallel_size": 2, "device": "cpu"}
    with pytest.raises(ConfigError, match="cuda_graph_sizes='1,2': steps of several ranks"):
        check_ranks(EngineConfig(cuda_graph_sizes="1,2", **on_cpu))
    with pytest.raises(ConfigError, match="quantization='fp8': weights that ranks share"):
        check_ranks(EngineConfig(quantization="fp8", **on_cpu))


@pytest.mark.parametrize(
    ("device", "num_gpus", "message"),
    [
        ("cuda", 1, "tensor_parallel_size=2: there are 1 GPUs; choose at most that"),
        ("cpu", 2, "device='cpu': ranks on a machine with GPUs use these"),
    ],
)
def test_ranks_and_gpus_must_fit(
    device: str, num_gpus: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "choose_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    with pytest.raises(ConfigError, match=message):
        check_ranks(EngineConfig(tensor_parallel_size=2, device=device))


def test_the_environment_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "mine")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with rank_in_environment(Shard(1, 2)):
        assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("1", "2")
    assert os.environ["RANK"] == "mine" and "LOCAL_RANK" not in os.environ
