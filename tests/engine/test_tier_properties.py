"""Random histories over three tiers whose moves end at any time, in any order, or fail.

Every pool position that attention reads is compared with the history it must hold, every law is
checked after every step, and each request gets the same tokens as with one tier.
"""

from __future__ import annotations

import os
import random
from collections import Counter

from histories import Run, operations, relaxed
from hypothesis import given
from hypothesis import strategies as st
from ledger import VOCAB

from tierkv.cache.lower_tiers import MoveLimits

engines = st.fixed_dictionaries(
    {
        "num_blocks": st.integers(9, 40),
        "block_size": st.sampled_from([1, 2, 4, 8]),
        "cpu_blocks": st.sampled_from([0, 3, 12, 60]),
        "nvme_blocks": st.sampled_from([0, 5, 40, 200]),
        "window": st.sampled_from([None, None, None, 5]),
        "max_num_batched_tokens": st.sampled_from([4, 16, 64]),
        "max_num_seqs": st.sampled_from([4, 32]),
        "async_scheduling": st.booleans(),
        "eviction_policy": st.sampled_from(
            ["lru", "reuse", "gpu=lru,cpu=s3fifo,nvme=tinylfu", "gpu=sieve,cpu=arc,nvme=gdsf"]
        ),
        "admission_policy": st.sampled_from(["write-through", "write-back", "second-hit"]),
        "scheduling_policy": st.sampled_from(["fcfs", "priority", "lpm"]),
        "preemption_victim": st.sampled_from(["latest", "priority", "largest"]),
        "preemption_mode": st.sampled_from(["recompute", "swap", "auto"]),
        "load_policy": st.sampled_from(["load", "recompute", "split", "auto"]),
        "prefetch_policy": st.sampled_from(["none", "queue", "lookahead"]),
        "load_timeout": st.sampled_from([0.5, 3.0, 100.0]),
        "time_slice": st.sampled_from([1, 3]),
        "oversubscribe": st.booleans(),
        "mover": st.fixed_dictionaries(
            {
                "seed": st.integers(0, 5),
                "failures": st.sampled_from([0.0, 0.0, 0.1, 0.5]),
                "is_eager": st.booleans(),
            }
        ),
    }
).filter(lambda engine: engine["cpu_blocks"] or engine["nvme_blocks"])


@relaxed
@given(engines, operations)
def test_any_history_over_three_tiers_gives_each_request_its_own_tokens(
    engine: dict[str, object], history: list[tuple[object, ...]]
) -> None:
    run = Run(engine)
    run.play(history)
    run.finish()


def random_engine(rng: random.Random) -> dict[str, object]:
    """A pool that is too small for the work, over tiers of any size."""
    cpu, nvme = rng.choice([(0, 40), (12, 0), (60, 0), (6, 30), (12, 200), (40, 40), (200, 200)])
    return {
        "num_blocks": rng.choice([30, 40, 60]),
        "block_size": rng.choice([2, 4]),
        "cpu_blocks": cpu,
        "nvme_blocks": nvme,
        "window": rng.choice([None, None, None, None, 5, 16]),
        "max_num_batched_tokens": rng.choice([8, 16, 64]),
        "max_num_seqs": rng.choice([4, 8, 32]),
        "eviction_policy": rng.choice(
            ["lru", "gpu=lru,cpu=s3fifo,nvme=tinylfu", "gpu=sieve,cpu=arc,nvme=gdsf", "lfu"]
        ),
        "admission_policy": rng.choice(
            ["write-through", "write-through", "write-back", "second-hit", "nvme=second-hit"]
        ),
        "scheduling_policy": rng.choice(["fcfs", "priority", "lpm"]),
        "preemption_victim": rng.choice(["latest", "priority", "largest", "cheapest"]),
        "preemption_mode": rng.choice(["recompute", "swap", "swap", "auto"]),
        "load_policy": rng.choice(["load", "load", "recompute", "split", "auto"]),
        "prefetch_policy": rng.choice(["none", "queue", "lookahead"]),
        "limits": MoveLimits(
            load_timeout_s=rng.choice([0.5, 3.0, 100.0, 100.0]),
            step_bytes=rng.choice([4, 1000]),
            link_bytes=rng.choice([4, 1000]),
            room=rng.choice([0.02, 0.3]),
        ),
        "time_slice": rng.choice([1, 4]),
        "oversubscribe": rng.random() < 0.5,
        "async_scheduling": rng.random() < 0.5,
        "mover": {
            "seed": rng.randrange(1000),
            "failures": rng.choice([0.0, 0.0, 0.02, 0.3]),
            "is_eager": rng.random() < 0.3,
        },
    }


def random_history(rng: random.Random) -> list[tuple[object, ...]]:
    """Conversations that come back, strangers, aborts at any moment."""
    history: list[tuple[object, ...]] = []
    for _ in range(rng.randint(20, 60)):
        kind = rng.random()
        if kind < 0.5:
            suffix = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 8))]
            which, length = rng.randrange(3), rng.choice([10, 23, 40, 60])
            n = rng.choice([1, 1, 1, 2, 4])
            history.append((which, length, suffix, rng.randint(1, 12), n, rng.randrange(3)))
        elif kind < 0.9:
            history.append(("step", rng.randint(1, 12)))
        elif kind < 0.98:
            history.append(("abort", rng.randrange(6)))
        else:
            history.append(("reset", 0))
    return history


NUM_STORMS = int(os.environ.get("TIERKV_STORMS", "150"))


def test_storms_use_every_way_between_the_tiers() -> None:
    """As above with denser work; in sum, everything that can happen has happened."""
    total: Counter[str] = Counter()
    for seed in range(NUM_STORMS):
        rng = random.Random(seed)
        run = Run(random_engine(rng))
        try:
            run.play(random_history(rng))
            run.finish()
        except BaseException as error:
            error.add_note(f"storm {seed}")
            raise
        total.update(tally(run))
    print(dict(total))
    for name in (
        *("gpu->cpu", "gpu->nvme", "cpu->nvme", "cpu->gpu", "nvme->gpu", "nvme->cpu"),
        *("late", "corrupt", "swaps", "loads_chosen", "recomputes_chosen"),
        *("joined", "prefetched", "tails_resumed", "preemptions", "rescued"),
    ):
        assert total[name] > 0, f"no storm had {name}: {dict(total)}"


def tally(run: Run) -> Counter[str]:
    cache, metrics = run.core.cache, run.core.metrics()
    assert cache.moves is not None
    counts: Counter[str] = Counter()
    for (source, destination), stats in cache.moves.stats.items():
        counts[f"{source.value}->{destination.value}"] += stats.num_moves
        counts.update({failure.value: n for failure, n in stats.failures.items()})
    for name in ("swaps", "preemptions", "loads_chosen", "recomputes_chosen"):
        counts[name] += metrics[name]
    loads = cache.loads
    counts["joined"], counts["prefetched"] = loads.num_joined, loads.num_prefetched
    counts["tails_resumed"] = loads.num_tails
    counts["rescued"] = cache.moves.num_rescued
    return counts
