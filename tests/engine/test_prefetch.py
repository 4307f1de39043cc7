"""What is brought up for the queue: the blocks that will be used next, and each of them once."""

from __future__ import annotations

from ledger import VOCAB, ledger_engine

from tierkv.engine.core import EngineCore, EngineRequest
from tierkv.engine.sampling_params import SamplingParams

BLOCK = 4
CHATS, TURNS = 8, 3
PROMPT, SAID, ANSWERED = 10 * BLOCK, BLOCK, BLOCK


class Chats:
    """Chats that all send their next turn together, two of them answered at once."""

    def __init__(self, **engine: object) -> None:
        options: dict[str, object] = {
            "num_blocks": 40,
            "block_size": BLOCK,
            "max_num_seqs": 2,
            "mover": {"is_eager": True, "is_ordered": True},
            "load_policy": "load",
            "eviction_policy": "lru",
        }
        self.core, _, self._clock = ledger_engine(**{**options, **engine})  # type: ignore[arg-type]
        self.texts = [[(31 * i + j) % VOCAB for j in range(PROMPT)] for i in range(CHATS)]

    def play(self) -> None:
        for turn in range(TURNS):
            for i, text in enumerate(self.texts):
                text.extend((i + turn + j) % VOCAB for j in range(SAID))
                params = SamplingParams(max_tokens=ANSWERED)
                self.core.add_request(EngineRequest(f"{turn}.{i}", list(text), params, 0))
            while self.core.has_work:
                self._step()
            self.core.flush(timeout_s=10.0)

    def _step(self) -> None:
        self._clock.time += 1.0
        for output in self.core.step():
            _, _, chat = output.request_id.partition(".")
            self.texts[int(chat)].extend(output.new_token_ids)
        self.core.check()


def moved(core: EngineCore, link: str) -> int:
    return int(core.metrics().get(f"moves_{link}", 0))


def most_needed() -> int:
    """Blocks of all turns after the first: what there is to bring up, at most."""
    per_turn = SAID + ANSWERED
    return sum(CHATS * (PROMPT + turn * per_turn) // BLOCK for turn in range(1, TURNS))


def test_a_block_is_brought_up_once_for_its_next_use() -> None:
    chats = Chats(cpu_blocks=200)
    chats.play()
    metrics = chats.core.metrics()
    assert metrics["prefetch_issued"] > 0
    assert moved(chats.core, "cpu_gpu") <= most_needed()
    assert metrics["recomputed_tokens"] == 0


def test_prefetch_leaves_room_for_what_already_waits_in_the_pool() -> None:
    """The second in the queue must not push out the first, nor the third the second."""
    prefetched = Chats(cpu_blocks=200)
    prefetched.play()
    on_demand = Chats(cpu_blocks=200, prefetch_policy="none")
    on_demand.play()
    assert moved(prefetched.core, "cpu_gpu") <= moved(on_demand.core, "cpu_gpu") * 1.1


def test_blocks_of_the_queue_are_staged_from_nvme_in_half_of_the_cpu_tier() -> None:
    chats = Chats(cpu_blocks=40, nvme_blocks=400)
    staged: list[int] = []
    begin = chats.core.cache.lower.promote  # type: ignore[union-attr]

    def promote(block: object) -> int:
        staged.append(0)
        return begin(block)  # type: ignore[arg-type]

    chats.core.cache.lower.promote = promote  # type: ignore[union-attr, method-assign, assignment]
    chats.play()
    assert 0 < moved(chats.core, "nvme_cpu") <= len(staged)
    assert moved(chats.core, "nvme_cpu") + moved(chats.core, "nvme_gpu") <= 1.5 * most_needed()


def test_without_a_prefetch_policy_nothing_is_brought_up_early() -> None:
    chats = Chats(cpu_blocks=200, nvme_blocks=400, prefetch_policy="none")
    chats.play()
    assert chats.core.metrics()["prefetch_issued"] == 0
    assert moved(chats.core, "nvme_cpu") == 0


def test_loads_and_recomputations_are_compared_with_what_they_were_expected_to_take() -> None:
    loading = Chats(cpu_blocks=200, prefetch_policy="none")
    loading.play()
    metrics = loading.core.metrics()
    assert metrics["load_predicted_s"] > 0
    assert metrics["load_actual_s"] > 0
    assert metrics["recompute_actual_s"] == 0
    computing = Chats(cpu_blocks=200, prefetch_policy="none", load_policy="recompute")
    computing.play()
    metrics = computing.core.metrics()
    assert metrics["load_actual_s"] == 0
    assert metrics["recompute_predicted_s"] > 0
    assert metrics["recompute_actual_s"] > 0


def test_what_nobody_waits_for_any_more_is_like_any_other_block() -> None:
    chats = Chats(cpu_blocks=200)
    chats.play()
    core = chats.core
    for i, text in enumerate(chats.texts):
        core.add_request(EngineRequest(f"9.{i}", list(text), SamplingParams(max_tokens=9)))
    for _ in range(4):
        core.step()
    wanted = [b for b in core.cache.tree if any(c.wanted for c in b.copies.values())]
    assert wanted
    core.abort([f"9.{i}" for i in range(1, CHATS)])
    while core.has_work:
        core.step()
    assert not [b for b in core.cache.tree if any(c.wanted for c in b.copies.values())]
