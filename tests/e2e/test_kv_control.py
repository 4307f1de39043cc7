"""The cache of a running `tierkv serve`, steered by `tierkv kv` and by requests."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from servable import ServerProcess, running_server

ADMIN = "admin-key"
KEYS = """
key-one: one
key-two: {tenant: two, weight: 2, quota: {gpu: 1MiB}}
"""
POOL = 128


@pytest.fixture(scope="module")
def servers(
    servable: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[ServerProcess]]:
    """Two servers of the same model, each with its own tiers; the first has tenants."""
    folder = tmp_path_factory.mktemp("kv-control")
    (folder / "keys.yaml").write_text(KEYS)
    common = (
        *(str(servable), "--num-gpu-blocks", str(POOL), "--num-threads", "1"),
        *("--dtype", "float32", "--admin-api-key", ADMIN, "--load-policy", "load"),
        *("--max-num-seqs", "4", "--pin-budget", "2MiB"),
    )
    first = (*common, "--api-keys", str(folder / "keys.yaml"), "--api-key", "plain")
    with (
        running_server(*first, "--offload", f"cpu=4MiB,nvme=12MiB:{folder / 'a'}") as one,
        running_server(*common, "--offload", f"cpu=8MiB,nvme=16MiB:{folder / 'b'}") as other,
    ):
        yield [one, other]


def text_of(number: int, length: int = 600) -> str:
    """Texts that share no block."""
    return (f"{number:03} says something that nobody else says. " * 40)[:length]


def ask(
    server: ServerProcess, prompt: str, key: str = "plain", tokens: int = 4, **fields: Any
) -> tuple[str, int]:
    """The answer, and how many of the prompt's tokens were cached."""
    response = httpx.post(
        f"{server.url}/v1/completions",
        json={
            "prompt": prompt,
            "temperature": 0,
            "max_tokens": tokens,
            "ignore_eos": True,
            **fields,
        },
        headers={"Authorization": f"Bearer {key}"},
        timeout=300,
    )
    assert response.status_code == 200, response.text
    reply = response.json()
    return reply["choices"][0]["text"], reply["usage"]["prompt_tokens_details"]["cached_tokens"]


def kv(server: ServerProcess, *arguments: str, key: str = "plain", status: int = 0) -> str:
    """What `tierkv kv` prints."""
    command = [sys.executable, "-P", "-m", "tierkv", "kv", *arguments]
    environment = {**os.environ, "TIERKV_API_KEY": key}
    ended = subprocess.run(
        [*command, "--url", server.url],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=300,
    )
    assert ended.returncode == status, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


def stats(server: ServerProcess) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {ADMIN}"}
    found: dict[str, Any] = httpx.get(f"{server.url}/kv/stats", headers=headers).json()
    return found


def press(server: ServerProcess, first: int, key: str = "plain") -> None:
    """More than all tiers hold."""
    for number in range(first, first + 50):
        ask(server, text_of(number), key, tokens=1)
    kv(server, "flush", key=ADMIN)


def test_a_pinned_prefix_survives_what_evicts_others(servers: list[ServerProcess]) -> None:
    server = servers[0]
    pinned, other, timed = text_of(1), text_of(2), text_of(3)
    for prompt in (other, timed):
        ask(server, prompt)
    assert "pinned tokens: 592" in kv(server, "warm", "--prompt", pinned, "--pin")
    assert "tokens: 592" in kv(server, "ttl", "--prompt", timed, "--ttl", "0")
    found = stats(server)
    capacity = sum(tier["capacity_bytes"] for tier in found["tiers"].values())
    press(server, 100)
    assert 50 * 37 * found["block_bytes"] > capacity
    assert ask(server, pinned)[1] >= 592
    assert ask(server, other)[1] < 16
    assert "unpinned: True" in kv(server, "unpin", "--prompt", pinned)
    press(server, 200)
    assert ask(server, pinned)[1] <= 64  # the policy may hold on to the first blocks of a prompt


def test_what_has_expired_goes_before_what_was_used_earlier(servers: list[ServerProcess]) -> None:
    server = servers[1]
    kept, timed = text_of(10), text_of(11)
    ask(server, kept)
    ask(server, timed, kv_hints={"ttl": 0.1})
    time.sleep(0.3)
    for number in (300, 301):  # the second needs room: by use alone `kept` would go
        ask(server, text_of(number), tokens=1)
    body = {"prompt": kept, "max_tokens": 1}
    usage = httpx.post(f"{server.url}/v1/completions", json=body, timeout=300).json()["usage"]
    assert usage["prompt_tokens_details"]["gpu_tokens"] >= 592


def test_a_session_moves_from_one_server_to_another(
    servers: list[ServerProcess], tmp_path: Path
) -> None:
    old, new = servers
    prompt, file = text_of(20), tmp_path / "moved.tierkv"
    text, _ = ask(old, prompt, tokens=24, kv_hints={"session_id": "moved"})
    kv(old, "export", "--session-id", "moved", "--output", str(file), status=1)
    assert not file.exists()
    kv(old, "export", "--session-id", "moved", "--output", str(file), key=ADMIN)
    assert "is complete: True" in kv(new, "import", str(file), key=ADMIN)
    again, cached = ask(new, prompt, tokens=24)
    assert again == text and cached >= 592
    assert "known blocks: 38" in kv(new, "import", str(file), key=ADMIN)
    file.write_bytes(file.read_bytes()[:-1])
    assert "nothing of it was used" in kv(new, "import", str(file), key=ADMIN, status=1)
    assert "no request of it" in kv(new, "pin", "--session-id", "unknown", status=1)


def test_sleep_under_load_gives_memory_back_and_then_equal_tokens(
    servers: list[ServerProcess],
) -> None:
    server = servers[1]
    prompts = [text_of(30 + i, 200 + 30 * i) for i in range(4)]
    before = [ask(server, prompt, tokens=300, cache_salt="x")[0] for prompt in prompts]
    answers: dict[int, str] = {}

    def run(number: int) -> None:
        answers[number] = ask(server, prompts[number], tokens=300, cache_salt="y")[0]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    (engine,) = psutil.Process(server.process.pid).children()
    while httpx.get(f"{server.url}/load").json()["server_load"] < 4:
        time.sleep(0.01)
    used = engine.memory_info().rss
    assert "state: asleep" in kv(server, "sleep", key=ADMIN)
    found = stats(server)
    pool = found["tiers"]["gpu"]
    assert pool["used_bytes"] == 0
    assert used - engine.memory_info().rss > pool["capacity_bytes"] // 4
    assert not answers
    kv(server, "sleep", key=ADMIN)
    assert "state: awake" in kv(server, "wake", key=ADMIN)
    for thread in threads:
        thread.join(300)
    assert [answers[i] for i in range(4)] == before


def test_a_pin_cannot_wedge_the_pool(servers: list[ServerProcess]) -> None:
    server, number = servers[1], 40
    while True:
        prompt = text_of(number)
        ask(server, prompt, tokens=1)
        response = httpx.post(f"{server.url}/kv/pin", json={"prompt": prompt})
        if response.status_code != 200:
            break
        number += 1
    assert response.status_code == 409 and "are pinned" in response.text
    assert number > 43
    whole = text_of(60, 16 * POOL - 40)
    text, _ = ask(server, whole, tokens=20)
    assert ask(server, whole, tokens=20, cache_salt="z")[0] == text
    for done in range(40, number):
        assert ask(server, text_of(done))[1] >= 592
        kv(server, "unpin", "--prompt", text_of(done))


def test_tenants_do_not_find_each_others_prompts(servers: list[ServerProcess]) -> None:
    server, prompt = servers[0], text_of(70)
    for key in ("key-one", "key-two", "plain"):
        assert ask(server, prompt, key)[1] < 16
        assert ask(server, prompt, key)[1] >= 592
    headers = {"Authorization": "Bearer wrong"}
    assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 401
    kv(server, "flush", key="key-one", status=1)


def test_a_flood_of_one_tenant_takes_no_more_than_its_share(servers: list[ServerProcess]) -> None:
    """Sixty clients of one tenant, sixteen of the other, whose weight is twice as much."""
    server, served = servers[0], list[str]()

    def client(key: str, number: int) -> None:
        while len(served) < 90:
            ask(server, text_of(number, 40), key, tokens=60, kv_hints={"no_store": True})
            served.append(key)

    clients = [("key-one", i) for i in range(60)] + [("key-two", 60 + i) for i in range(16)]
    threads = [threading.Thread(target=client, args=who) for who in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    share = served[30:90].count("key-two")
    assert 32 <= share <= 48, served
