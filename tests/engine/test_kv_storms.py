"""Random histories of tenants, hints, pins, sleep and transfers, with moves that end anyhow or
fail: every law holds after every step, and every request gets the tokens it would get alone.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from typing import Any

from kv_run import BLOCK, KvRun, prompt_of

from tierkv.cache.lower_tiers import MoveLimits
from tierkv.engine.sleep import SleepState
from tierkv.errors import CapacityError, ConflictError, NotFoundError

NUM_STORMS = int(os.environ.get("TIERKV_STORMS", "120"))
TENANTS = ["", "a", "b"]


def random_engine(rng: random.Random) -> dict[str, Any]:
    cpu, nvme = rng.choice([(0, 0), (0, 40), (12, 0), (60, 0), (6, 30), (40, 200)])
    return {
        "num_blocks": rng.choice([16, 30, 50]),
        "cpu_blocks": cpu,
        "nvme_blocks": nvme,
        "window": rng.choice([None, None, None, 6]),
        "max_num_batched_tokens": rng.choice([8, 32]),
        "max_num_seqs": rng.choice([3, 8]),
        "eviction_policy": rng.choice(
            ["lru", "s3fifo", "gpu=lru,cpu=arc,nvme=tinylfu", "gpu=sieve,cpu=lfu,nvme=gdsf"]
        ),
        "admission_policy": rng.choice(["write-through", "write-back", "second-hit"]),
        "scheduling_policy": rng.choice(["fair", "fair", "fcfs", "priority"]),
        "preemption_mode": rng.choice(["recompute", "swap", "auto"]),
        "load_policy": rng.choice(["load", "recompute", "split"]),
        "pin_budget": rng.choice([None, 1 << 20]),
        "oversubscribe": bool(cpu or nvme) and rng.random() < 0.3,
        "time_slice": 3,
        "async_scheduling": rng.random() < 0.5,
        "limits": MoveLimits(
            load_timeout_s=rng.choice([2.0, 100.0]),
            step_bytes=rng.choice([4, 1000]),
            link_bytes=rng.choice([4, 1000]),
            room=rng.choice([0.02, 0.3]),
        ),
        "mover": {
            "seed": rng.randrange(1000),
            "failures": rng.choice([0.0, 0.0, 0.05, 0.3]),
            "is_eager": rng.random() < 0.3,
            "is_ordered": rng.random() < 0.5,
        },
    }


class Storm:
    """One history."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.run = KvRun(**random_engine(self.rng))
        self.run.set_tenants(
            weights={"a": 1.0, "b": 2.0},
            a={t.value: self.rng.choice([0, 4, 12]) for t in self.run.cache.evictors},
            b={} if self.rng.random() < 0.5 else {"gpu": 9},
        )
        self.done: Counter[str] = Counter()
        self.exported: list[tuple[str, tuple[bytes, ...]]] = []

    def play(self) -> None:
        actions = [self.request] * 8 + [self.steps] * 8
        actions += [
            self.pin,
            self.unpin,
            self.ttl,
            self.sleep,
            self.transfer,
            self.abort,
            self.wait,
        ]
        for _ in range(self.rng.randint(20, 60)):
            self.rng.choice(actions)()
            self.run.core.check()
        self.run.control.wake()
        self.run.finish()
        self.done["preemptions"] = self.run.core.metrics()["preemptions"]

    def prompt(self) -> list[int]:
        number = self.rng.randrange(4)
        return prompt_of(number, 60)[: self.rng.randint(1, 40)]

    def request(self) -> None:
        rng = self.rng
        hints = {
            "ttl": rng.choice([None, None, 0, 3.0, 50.0]),
            "priority": rng.choice([0, 0, 5, -5]),
            "no_store": rng.random() < 0.2,
            "session_id": rng.choice(["", "s", "t"]),
        }
        tokens = [rng.randrange(50) for _ in range(rng.randint(1, 6))]
        try:
            self.run.add(
                self.prompt() + tokens,
                tokens=rng.randint(1, 9),
                tenant=rng.choice(TENANTS),
                **hints,
            )
            self.done["requests"] += 1
        except CapacityError:
            self.done["refused"] += 1

    def steps(self) -> None:
        for _ in range(self.rng.randint(1, 8)):
            self.run.step()

    def wait(self) -> None:
        self.run.pass_time(self.rng.choice([0.5, 5.0, 60.0]))

    def abort(self) -> None:
        live = list(self.run.core.scheduler.requests)
        if live:
            self.run.core.abort([self.rng.choice(live)])

    def pin(self) -> None:
        tenant, session = self.rng.choice(TENANTS), self.rng.choice([None, "s"])
        prompt = None if session else self.prompt() + [0] * BLOCK
        try:
            self.run.control.pin(tenant, tenant, prompt, session, self.rng.choice([None, 5.0]))
            self.done["pinned"] += 1
        except (ConflictError, NotFoundError) as error:
            self.done[type(error).__name__] += 1

    def unpin(self) -> None:
        keeps = self.run.cache.keeps
        if keeps.pins:
            keeps.unpin(self.rng.choice(list(keeps.pins)))

    def ttl(self) -> None:
        tenant = self.rng.choice(TENANTS)
        prompt = prompt_of(self.rng.randrange(4), 40)
        self.done["ttl"] += self.run.control.ttl(
            tenant, tenant, prompt, None, self.rng.choice([None, 0, 10.0])
        )["tokens"]

    def sleep(self) -> None:
        control = self.run.control
        control.sleep()
        for _ in range(self.rng.randint(0, 300)):
            self.run.core.work_in_background()
            self.run.core.check()
        self.done[control.sleeper.state.value] += 1
        if control.sleeper.state is SleepState.ASLEEP:
            assert self.run.cache.num_empty == self.run.cache.num_blocks
        if self.rng.random() < 0.5:
            self.request()
        control.wake()

    def transfer(self) -> None:
        """What some session had before comes in again, as far as it fits."""
        for salt, record in self.exported:
            answer = self.run.control.import_block(salt, *record)
            self.done[f"import {answer}"] += 1
            self.run.core.check()
        try:
            salt, keys = self.run.control.session_keys(*self.rng.choice([("", "s"), ("a", "s")]))
        except NotFoundError:
            return
        self.exported = []
        for key in keys:
            found = self.run.control.export_block(key)
            if not found:
                break
            self.exported.append((salt, (key, *found)))


def test_storms_of_everything() -> None:
    total: Counter[str] = Counter()
    for seed in range(NUM_STORMS):
        storm = Storm(seed)
        try:
            storm.play()
        except BaseException as error:
            error.add_note(f"storm {seed}")
            raise
        total.update(storm.done)
    print(dict(total))
    for name in (
        *("requests", "pinned", "ConflictError", "NotFoundError", "ttl", "preemptions"),
        *("asleep", "falling asleep", "import taken", "import known", "import busy", "import lost"),
    ):
        assert total[name] > 0, f"no storm had {name}: {dict(total)}"
