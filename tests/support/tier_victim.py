"""Forks engines with lower tiers and kills each with SIGKILL (see test_tier_crash.py).

Reads lines of JSON (`Life`), answers with how the life ended. An engine is a fork of this process,
which has imported torch but computed nothing, so that a life costs a second and not five.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

from tierkv.config import EngineConfig
from tierkv.engine.build import build_engine
from tierkv.engine.core import EngineCore, EngineRequest
from tierkv.engine.sampling_params import SamplingParams

NUM_PROMPTS, MAX_TOKENS = 24, 8
NUM_LIVE = 4  # requests at once
READY = "ready"


@dataclass(slots=True)
class Life:
    """One engine's life.

    Attributes:
        model, store: directories.
        log: file for a line `ready`, and a line of JSON per finished request.
        size: of the NVMe tier.
        seed: of which requests come.
        lives_s: from `ready` (or from the fork) to the kill; None: every prompt once, and a clean
            end.
        from_fork: kill while it opens, maybe.
    """

    model: str
    store: str
    log: str
    size: str
    seed: int
    lives_s: float | None
    from_fork: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def prompts(vocab_size: int = 200) -> list[list[int]]:
    """What all engines are asked: openings that are shared, and ends that are not."""
    rng = random.Random(11)
    openings = [[rng.randrange(vocab_size) for _ in range(64)] for _ in range(4)]
    return [
        rng.choice(openings)[: rng.choice([20, 44, 64])]
        + [rng.randrange(vocab_size) for _ in range(rng.randint(1, 24))]
        for _ in range(NUM_PROMPTS)
    ]


def config(model: str, **options: object) -> EngineConfig:
    """Of all engines here: the tiers are what differs."""
    common = {"dtype": "float32", "block_size": 4, "verify_model": False, "num_threads": 1}
    return EngineConfig.from_mapping({"model": model, **common, **options})


def serve(core: EngineCore, numbers: list[int]) -> dict[int, list[int]]:
    """Answer these prompts, all at once."""
    asked, found = prompts(), {number: list[int]() for number in numbers}
    for number in numbers:
        params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
        core.add_request(EngineRequest(str(number), asked[number], params))
    while core.has_work:
        for output in core.step():
            found[int(output.request_id)] += output.new_token_ids
    return found


def live(life: Life) -> None:
    """Serve until killed, or once."""
    log = os.open(life.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    core = build_engine(
        config(
            life.model,
            num_gpu_blocks=64,
            offload=f"cpu=512KiB,nvme={life.size}:{life.store}",
            load_policy="load",
        )
    )
    os.write(log, f"{READY}\n".encode())
    rng, rest = random.Random(life.seed), list(range(NUM_PROMPTS))
    while life.lives_s is not None or rest:
        if life.lives_s is not None:
            numbers = rng.sample(range(NUM_PROMPTS), NUM_LIVE)
        else:
            numbers, rest = rest[:NUM_LIVE], rest[NUM_LIVE:]
        answers = serve(core, numbers)
        core.check()
        hits = core.metrics()["hit_tokens_nvme"]
        os.write(log, f"{json.dumps([hits, list(answers.items())])}\n".encode())
    core.close()


def wait_for_ready(life: Life, victim: int) -> None:
    """Return when the log says so, or when the victim has ended."""
    start = Path(life.log).stat().st_size if Path(life.log).exists() else 0
    while not Path(life.log).exists() or Path(life.log).stat().st_size <= start:
        if os.waitid(os.P_PID, victim, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.002)


def run(life: Life) -> str:
    """Fork an engine, kill it in time; how it ended."""
    victim = os.fork()
    if victim == 0:
        status = 1
        try:
            live(life)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if life.lives_s is not None:
        if not life.from_fork:
            wait_for_ready(life, victim)
        time.sleep(life.lives_s)
        os.kill(victim, signal.SIGKILL)
    _, status = os.waitpid(victim, 0)
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return f"status {os.waitstatus_to_exitcode(status)}"


def main() -> None:
    for line in sys.stdin:
        print(run(Life(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
