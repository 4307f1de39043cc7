"""Forks writers to a store and kills each with SIGKILL at a random moment (see test_crash.py).

Reads lines `store_path log_path capacity seed`, answers `killed` or how else the writer ended.
A writer is a fork of this small process, so one life costs milliseconds and loads no torch.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # `-P` kept it out

from store_blocks import open_nvme
from store_ledger import work

from tierkv.storage.base import BlockStore


def live(path: Path, log_path: Path, capacity: int, seed: int) -> None:
    """Write until killed, in two threads with slots of their own; now and then close and reopen."""
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    chance = random.Random(seed)
    middle = capacity // 2

    def some_work(store: BlockStore, slots: range, own: random.Random) -> None:
        for _ in range(own.randint(1, 40)):
            work(store, own, slots, lambda line: os.write(log, f"{line}\n".encode()))

    while True:
        store = open_nvme(path, capacity)
        threads = [
            threading.Thread(target=some_work, args=(store, slots, random.Random(chance.random())))
            for slots in (range(middle), range(middle, capacity))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        store.close()


def main() -> None:
    assert "torch" not in sys.modules
    for line in sys.stdin:
        path, log, capacity, seed = line.split()
        writer = os.fork()
        if writer == 0:
            try:
                live(Path(path), Path(log), int(capacity), int(seed))
            finally:
                os._exit(1)
        time.sleep(random.Random(int(seed)).uniform(0.0, 0.12))
        os.kill(writer, signal.SIGKILL)
        _, status = os.waitpid(writer, 0)
        is_killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        print("killed" if is_killed else f"status {status}", flush=True)


if __name__ == "__main__":
    main()
