"""Engines over a store on a device that can be made sick and well while they run."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from tier_victim import NUM_PROMPTS, config, prompts, serve

import tierkv.engine.tiers as tiers
from tierkv.cache.mover import ThreadMover
from tierkv.engine.core import EngineCore, EngineRequest
from tierkv.engine.sampling_params import SamplingParams
from tierkv.storage.faults import FaultPlan, FaultyIo
from tierkv.storage.io import IoEngine, OpenIo
from tierkv.storage.io_posix import PosixIo
from tierkv.storage.quarantine import QuarantinedStore, QuarantineLimits

LIMITS = QuarantineLimits(threshold=2, first_pause_s=0.05, max_pause_s=0.1, slow_s=0.4)
MOST_STEPS = 20_000

__all__ = ["NUM_PROMPTS", "SickIo", "SparseIo", "Ward", "prompts", "serve", "watchdog"]


@contextmanager
def watchdog(limit_s: float) -> Iterator[None]:
    """An error in the main thread, wherever it hangs."""

    def bark(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"this took longer than {limit_s} s")

    before = signal.signal(signal.SIGALRM, bark)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class SparseIo(PosixIo):
    """On a file system that cannot preallocate: the disk may fill up later."""

    def _resize(self, num_bytes: int) -> bool:
        os.ftruncate(self._fd, num_bytes)
        return False


class SickIo:
    """An `IoEngine` whose operations ask a doctor first.

    Args:
        inner: the device.
        ward: says whether it is sick, and how.
    """

    def __init__(self, inner: IoEngine, ward: Ward) -> None:
        self._inner, self._ward = inner, ward

    @property
    def is_direct(self) -> bool:
        return self._inner.is_direct

    def _io(self) -> IoEngine:
        plan = self._ward.plan
        return FaultyIo(self._inner, plan) if plan is not None else self._inner

    def preadv(self, buffers: Sequence[memoryview], offset: int) -> int:
        self._ward.call("read")
        return self._io().preadv(buffers, offset)

    def pwritev(self, buffers: Sequence[memoryview], offset: int) -> None:
        self._ward.call("write")
        self._io().pwritev(buffers, offset)

    def sync(self) -> None:
        self._io().sync()

    def close(self) -> None:
        self._inner.close()


class Ward:
    """Makes engines whose store can be made sick, and watches its quarantine.

    Args:
        monkeypatch: of the test; the engine's seams are replaced.
        make_io: the device.

    Attributes:
        plan: of faults, while the device is sick.
        interfere: called before a read or a write with its name; may block or raise.
        guards: the quarantined stores made, the latest last.
        was_quarantined: whether reads or writes were, at the end of any step.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, make_io: OpenIo = PosixIo) -> None:
        self.plan: FaultPlan | None = None
        self.interfere: Callable[[str], None] | None = None
        self.guards: list[QuarantinedStore] = []
        self.was_quarantined: set[str] = set()
        self.well = threading.Event()

        def open_io(path: Path, num_bytes: int) -> SickIo:
            return SickIo(make_io(path, num_bytes), self)

        def guard(store: Any, now: Callable[[], float]) -> QuarantinedStore:
            self.guards.append(QuarantinedStore(store, now, LIMITS))
            return self.guards[-1]

        monkeypatch.setattr(tiers, "io_engine", lambda config: open_io)
        monkeypatch.setattr(tiers, "QuarantinedStore", guard)
        monkeypatch.setattr(tiers, "ThreadMover", partial(ThreadMover, close_timeout_s=0.3))
        monkeypatch.setattr(tiers, "_CLOSE_S", 0.3)
        monkeypatch.setattr("tierkv.engine.core._CLOSE_S", 0.5)

    def call(self, name: str) -> None:
        if self.interfere is not None:
            self.interfere(name)

    def stick(self, *names: str) -> None:
        """From now on these calls do not return until `release`."""
        self.well.clear()

        def wait(name: str) -> None:
            if name in names:
                self.well.wait(60)

        self.interfere = wait

    def release(self) -> None:
        """The device is well again."""
        self.plan = self.interfere = None
        self.well.set()

    def engine(
        self, model: Path, store: Path, offload: str = "nvme=64MiB", **more: Any
    ) -> EngineCore:
        """An engine with a pool for two or three of the prompts."""
        options = {"load_policy": "load", "load_timeout": 0.3, "num_gpu_blocks": 64, **more}
        return EngineCore.from_config(
            config(str(model), offload=offload, nvme_path=str(store), **options)
        )

    def play(self, core: EngineCore, numbers: Sequence[int]) -> dict[int, list[int]]:
        """Answer these prompts, three at a time; every law is checked after every step."""
        asked, waiting = prompts(), list(numbers)
        found: dict[int, list[int]] = {number: [] for number in numbers}
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        for _ in range(MOST_STEPS):
            while waiting and len(core.scheduler.requests) < 3:
                number = waiting.pop(0)
                core.add_request(EngineRequest(str(number), asked[number], params))
            if not core.has_work:
                return found
            for output in core.step():
                found[int(output.request_id)] += output.new_token_ids
            core.check()
            self.look()
        raise AssertionError(f"not done after {MOST_STEPS} steps")

    def look(self) -> None:
        """Note what is quarantined now."""
        guard = self.guards[-1]
        for name, breaker in (("reads", guard.reads), ("writes", guard.writes)):
            if breaker.is_quarantined:
                self.was_quarantined.add(name)

    def settle(self, core: EngineCore, limit_s: float = 5.0) -> bool:
        """Let all moves end; whether they did."""
        end = time.monotonic() + limit_s
        while core.has_background_work and time.monotonic() < end:
            core.work_in_background()
            core.cache.wait(0.005)
            self.look()
        return not core.has_background_work
