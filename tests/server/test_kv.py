"""`/kv/*` and `kv_hints` over a real engine with lower tiers."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_app import LiveApp, live_app

from tierkv.server.app import AppSettings
from tierkv.server.kv_transfer import most_bytes
from tierkv.server.tenants import Caller, Tenant

KEY, ADMIN = "user-key", "admin-key"
LONG = "a prompt that is longer than four blocks of sixteen tokens each, by a good deal"


@pytest.fixture(scope="module")
def kv(servable: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveApp]:
    """An application with two tiers below a small pool."""
    settings = AppSettings(["tiny"], api_key=KEY, admin_api_key=ADMIN, max_sequences=40)
    tiers = f"cpu=4MiB,nvme=16MiB:{tmp_path_factory.mktemp('kv-store')}"
    options: dict[str, Any] = {"num_gpu_blocks": 64, "num_threads": 1, "dtype": "float32"}
    with live_app(servable, settings, offload=tiers, load_policy="load", **options) as app:
        yield app


def call(app: LiveApp, path: str, key: str = KEY, **fields: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"}
    return app.http.post(f"/kv/{path}", json=fields, headers=headers)


def done(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def refused(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    return str(response.json()["error"]["message"])


def complete(app: LiveApp, prompt: str, **fields: Any) -> tuple[str, int]:
    """The answer and how many tokens of the prompt were cached."""
    body = {"prompt": prompt, "temperature": 0, "max_tokens": 8, "ignore_eos": True, **fields}
    response = app.post("completions", **body)
    assert response.status_code == 200, response.text
    reply = response.json()
    return reply["choices"][0]["text"], reply["usage"]["prompt_tokens_details"]["cached_tokens"]


# -- prefixes --------------------------------------------------------------------------------------


def test_a_warm_prompt_is_found(kv: LiveApp) -> None:
    prompt = "warm " + LONG
    found = done(call(kv, "warm", prompt=prompt))
    assert found["tokens"] == found["computed_tokens"] == len(prompt)
    assert found["cached_tokens"] == found["cached_tokens_by_tier"]["gpu"] == len(prompt) // 16 * 16
    _, cached = complete(kv, prompt + " and more")
    assert cached >= found["cached_tokens"]
    assert done(call(kv, "warm", prompt=prompt))["computed_tokens"] < 17


def test_a_conversation_is_warmed_as_chat_completions_write_it(kv: LiveApp) -> None:
    messages: Any = [{"role": "system", "content": "talk " + LONG}]
    found = done(call(kv, "warm", messages=messages))
    messages.append({"role": "user", "content": "hello"})
    response = kv.post("chat/completions", messages=messages, max_tokens=2)
    details = response.json()["usage"]["prompt_tokens_details"]
    assert details["cached_tokens"] >= found["cached_tokens"] >= 64


def test_token_ids_and_salts(kv: LiveApp) -> None:
    tokenizer = kv.engine.tokenizer
    assert tokenizer is not None
    prompt = "salted " + LONG
    found = done(call(kv, "warm", prompt=tokenizer.encode(prompt), cache_salt="s"))
    assert found["cached_tokens"] >= 64
    assert complete(kv, prompt)[1] == 0
    assert complete(kv, prompt, cache_salt="s")[1] >= 64


def test_pin_unpin_and_their_numbers(kv: LiveApp) -> None:
    prompt = "pinned " + LONG
    assert "warm it first" in refused(call(kv, "pin", prompt=prompt), 404)
    block = done(kv.http.get("/kv/stats"))["block_bytes"]
    found = done(call(kv, "warm", prompt=prompt, pin=True, ttl=1000))
    blocks = len(prompt) // 16
    assert (found["pinned_tokens"], found["pinned_bytes"]) == (blocks * 16, blocks * block)
    assert done(kv.http.get("/kv/stats"))["pins"]["count"] == 1
    assert done(call(kv, "pin", prompt=prompt))["pinned_bytes"] == blocks * block
    assert done(call(kv, "ttl", prompt=prompt, ttl=5)) == {"tokens": blocks * 16}
    assert done(call(kv, "unpin", prompt=prompt)) == {"unpinned": True}
    assert "not pinned" in refused(call(kv, "unpin", prompt=prompt), 404)
    assert done(kv.http.get("/kv/stats"))["pins"] | {"budget_bytes": 0} == {
        "count": 0, "pinned_bytes": 0, "budget_bytes": 0
    }  # fmt: skip


@pytest.mark.parametrize(
    ("path", "fields", "name"),
    [
        ("warm", {}, "prompt"),
        ("pin", {"prompt": "x", "session_id": "s"}, "session_id"),
        ("warm", {"session_id": "s"}, "prompt"),
        ("pin", {"prompt": 7}, "prompt"),
        ("pin", {"prompt": [1, "x"]}, "prompt"),
        ("pin", {"prompt": "short"}, "prompt"),
        ("pin", {"prompt": LONG, "ttl": "soon"}, "ttl"),
        ("pin", {"prompt": LONG, "ttl": -1}, "ttl"),
        ("unpin", {"prompt": LONG, "ttl": 3}, "ttl"),
        ("pin", {"messages": [{"role": "pirate", "content": LONG}]}, "messages"),
        ("pin", {"prompt": LONG, "pinn": True}, "pinn"),
        ("warm", {"prompt": LONG, "priority": 1000}, "priority"),
    ],
)
def test_bad_requests_are_named(kv: LiveApp, path: str, fields: dict[str, Any], name: str) -> None:
    response = call(kv, path, **fields)
    assert response.status_code == 400, response.text
    assert name in response.json()["error"]["param"]


@pytest.mark.parametrize("token_id", [-1, 259, 2**31, 2**32, 2**63, 10**30])
@pytest.mark.parametrize("path", ["warm", "pin", "unpin", "ttl"])
def test_token_ids_that_the_model_does_not_have(kv: LiveApp, path: str, token_id: int) -> None:
    refused(call(kv, path, prompt=[token_id] * 32), 400)
    assert kv.http.get("/health").status_code == 200


@pytest.mark.parametrize("path", ["pin", "unpin", "ttl"])
def test_a_prefix_longer_than_any_request(kv: LiveApp, path: str) -> None:
    length = kv.engine.info.max_model_len + 1
    assert "max_model_len" in refused(call(kv, path, prompt=[1] * length), 400)
    talk = [{"role": "user", "content": "a" * length}]
    assert "max_model_len" in refused(call(kv, path, messages=talk), 400)


def test_another_model_is_404(kv: LiveApp) -> None:
    assert "other" in refused(call(kv, "warm", prompt=LONG, model="other"), 404)


# -- hints -----------------------------------------------------------------------------------------


def test_no_store_keeps_nothing(kv: LiveApp) -> None:
    prompt = "forgotten " + LONG
    for _ in range(2):
        assert complete(kv, prompt, kv_hints={"no_store": True})[1] == 0
    complete(kv, prompt)
    assert complete(kv, prompt, kv_hints={"no_store": True})[1] > 0


@pytest.mark.parametrize("path", ["completions", "chat/completions", "responses", "messages"])
def test_every_api_takes_hints(kv: LiveApp, path: str) -> None:
    said = {
        "completions": {"prompt": LONG},
        "chat/completions": {"messages": [{"role": "user", "content": LONG}]},
        "responses": {"input": LONG, "max_output_tokens": 2},
        "messages": {"messages": [{"role": "user", "content": LONG}], "max_tokens": 2},
    }[path]
    hints = {"ttl": 60, "priority": 3, "session_id": path, "turn": "end"}
    response = kv.post(path, model="tiny", **said, kv_hints=hints)
    assert response.status_code == 200, response.text
    assert done(call(kv, "ttl", session_id=path, ttl=None))["tokens"] >= 64
    for bad in ({"ttl": "x"}, {"priority": 101}, {"turn": "over"}, {"what": 1}, 3):
        response = kv.post(path, model="tiny", **said, kv_hints=bad)
        assert response.status_code == 400, response.text
        assert "kv_hints" in response.text


def test_a_conversation_cannot_choose_its_tenant(kv: LiveApp) -> None:
    for name in ("tenant", "kv_hints", "cache_salt"):
        response = kv.post(
            "chat/completions",
            messages=[{"role": "user", "content": "x"}],
            chat_template_kwargs={name: "other"},
        )
        assert response.status_code == 400


# -- administrators --------------------------------------------------------------------------------

ADMIN_ENDPOINTS = [
    ("POST", "/kv/flush"),
    ("GET", "/kv/export?session_id=s"),
    ("POST", "/kv/import"),
    ("POST", "/kv/sleep"),
    ("POST", "/kv/wake"),
    ("POST", "/sleep"),
    ("POST", "/wake_up"),
    ("GET", "/is_sleeping"),
]


@pytest.mark.parametrize(("method", "path"), ADMIN_ENDPOINTS)
def test_they_need_the_key_of_an_administrator(kv: LiveApp, method: str, path: str) -> None:
    statuses = {"": 401, KEY: 403, "nonsense": 401}
    for key, status in statuses.items():
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        response = httpx.request(method, f"{kv.url}{path}", headers=headers)
        assert response.status_code == status


def test_without_one_the_answer_says_what_to_configure(app: LiveApp) -> None:
    for method, path in ADMIN_ENDPOINTS:
        assert "--admin-api-key" in refused(app.http.request(method, path), 403)


def test_flush_returns_when_everything_has_arrived(kv: LiveApp) -> None:
    complete(kv, "flushed " + LONG)
    found = done(call(kv, "flush", ADMIN))
    assert found == {"flushed": True, "moves": 0, "offers": 0, "erasures": 0}
    assert done(call(kv, "flush", ADMIN, timeout=5))["flushed"]
    assert "timeout" in refused(call(kv, "flush", ADMIN, timeout=-1), 400)
    headers = {"Authorization": f"Bearer {ADMIN}"}
    for parts, status in (([b'{"timeout"', b": -1}"], 400), ([b'{"timeout": 5}'], 200), ([], 200)):
        response = kv.http.post("/kv/flush", content=iter(parts), headers=headers)
        assert response.status_code == status, "its length comes last"


def test_stats(kv: LiveApp) -> None:
    complete(kv, LONG)
    done(call(kv, "flush", ADMIN))
    found = done(kv.http.get("/kv/stats"))
    assert list(found["tiers"]) == ["gpu", "cpu", "nvme"]
    for tier in found["tiers"].values():
        assert 0 < tier["used_bytes"] <= tier["capacity_bytes"]
    assert (found["state"], found["block_size"], found["tenants"]) == ("awake", 16, {})


def test_sleep_under_load_then_wake(kv: LiveApp) -> None:
    prompts = [f"sleeper {i} {LONG}"[: 40 + 10 * i] for i in range(5)]
    before = [complete(kv, prompt, max_tokens=200)[0] for prompt in prompts]
    done(call(kv, "flush", ADMIN))
    answers: dict[int, str] = {}

    def ask(number: int) -> None:
        answers[number] = complete(kv, prompts[number], max_tokens=200, cache_salt="again")[0]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(5)]
    for thread in threads[:4]:
        thread.start()
    kv.wait_for(lambda metrics: metrics["running"] == 4)
    found = done(call(kv, "sleep", ADMIN))
    assert found["state"] == "asleep" and found["bytes_given_back"] > 0
    assert not answers
    threads[4].start()
    kv.wait_for(lambda metrics: metrics["waiting"] == 5)
    headers = {"Authorization": f"Bearer {ADMIN}"}
    assert done(kv.http.get("/is_sleeping", headers=headers)) == {"is_sleeping": True}
    assert kv.metrics()["gpu_blocks_free"] == 64
    assert done(call(kv, "wake", ADMIN)) == {"state": "awake", "bytes_given_back": 0}
    for thread in threads:
        thread.join(300)
    assert [answers[i] for i in range(5)] == before
    for path in ("/sleep", "/wake_up"):
        assert kv.http.post(path, headers=headers).status_code == 200
    refused(kv.http.post("/sleep?level=2", headers=headers), 400)
    assert complete(kv, prompts[0], max_tokens=200)[0] == before[0]


# -- files -----------------------------------------------------------------------------------------


def export(app: LiveApp, session: str) -> bytes:
    headers = {"Authorization": f"Bearer {ADMIN}"}
    response = app.http.get("/kv/export", params={"session_id": session}, headers=headers)
    assert response.status_code == 200, response.text
    return response.content


def upload(app: LiveApp, data: bytes) -> httpx.Response:
    return app.http.post("/kv/import", content=data, headers={"Authorization": f"Bearer {ADMIN}"})


def test_a_session_goes_and_comes_back(kv: LiveApp) -> None:
    prompt = "exported " + LONG
    text, _ = complete(kv, prompt, kv_hints={"session_id": "file"})
    data = export(kv, "file")
    found = done(upload(kv, data))
    assert found["imported_blocks"] == 0 and found["is_complete"]
    headers = {"Authorization": f"Bearer {ADMIN}"}
    assert kv.http.post("/reset_prefix_cache", headers=headers).status_code == 200
    damaged = bytearray(data)
    damaged[len(data) // 2] ^= 1
    for bad in (data[:-1], data[: len(data) // 2], bytes(damaged), b"", b"no file", data + b"x"):
        assert "nothing of it was used" in refused(upload(kv, bad), 400)
    assert done(kv.http.get("/kv/stats"))["tiers"]["gpu"]["used_bytes"] == 0
    found = done(upload(kv, data))
    assert found["imported_blocks"] == found["tokens"] // 16 >= 5
    assert (found["session_id"], found["known_blocks"]) == ("file", 0)
    again, cached = complete(kv, prompt)
    assert again == text and cached >= 80
    assert done(call(kv, "pin", session_id="file"))["pinned_tokens"] == found["tokens"]
    done(call(kv, "unpin", session_id="file"))


def test_files_of_others_are_refused_with_what_differs(kv: LiveApp) -> None:
    complete(kv, "mismatch " + LONG, kv_hints={"session_id": "mismatch"})
    data = export(kv, "mismatch")
    fields = data[16 : 16 + int.from_bytes(data[12:16], "little")]
    model = kv.engine.info.fingerprint.hex().encode()
    layout = kv.engine.info.layout.encode()
    for old, new, name in (
        (model, b"0" * len(model), "model"),
        (layout, b"0" * len(layout), "layout"),
        (b'"block_size": 16', b'"block_size": 32', "block_size"),
    ):
        other = data.replace(fields, fields.replace(old, new))
        assert f"another {name}" in refused(upload(kv, other), 409)


HEADER: dict[str, Any] = {
    **{"model": "m", "layout": "l", "block_size": 16, "block_bytes": 9216},
    **{"salt": "", "session_id": "s"},
}


@pytest.mark.parametrize(
    "fields",
    [
        b"[" * 100_000,
        json.dumps({**HEADER, "salt": "\ud800"}).encode(),
        json.dumps({**HEADER, "session_id": "\udfff"}).encode(),
        json.dumps({**HEADER, "session_id": "s" * 257}).encode(),
        json.dumps({**HEADER, "block_size": 2**30, "block_bytes": 2**30}).encode(),
        json.dumps({**HEADER, "block_size": True}).encode(),
        json.dumps({**HEADER, "model": "m" * 100_000}).encode(),
        b'{"block_size": ' + b"9" * 5000 + b"}",
    ],
)
def test_headers_of_an_enemy(kv: LiveApp, fields: bytes) -> None:
    data = b"TIERKVSF\x01\0\0\0" + len(fields).to_bytes(4, "little") + fields + bytes(100)
    response = upload(kv, data)
    assert response.status_code in (400, 409), response.text
    assert len(response.text) < 1000
    assert kv.http.get("/health").status_code == 200


def test_a_file_that_no_session_could_fill_is_not_kept(kv: LiveApp) -> None:
    info = kv.engine.info
    most = most_bytes(info)
    assert most > info.max_model_len // info.block_size * info.block_bytes
    sent: list[int] = []

    def parts() -> Iterator[bytes]:
        for _ in range(most // 2**16 + 16):
            sent.append(2**16)
            yield bytes(2**16)

    headers = {"Authorization": f"Bearer {ADMIN}"}
    response = kv.http.post("/kv/import", content=parts(), headers=headers)
    assert "over" in refused(response, 413)
    assert sum(sent) > most


def test_a_client_that_leaves_in_the_middle_of_its_file(
    kv: LiveApp, caplog: pytest.LogCaptureFixture
) -> None:
    head = f"POST /kv/import HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ADMIN}\r\n"
    host, port = kv.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}Content-Length: 1000\r\n\r\nTIERKVSF".encode())
        time.sleep(0.2)
    counted = 'tierkv_http_requests_total{method="POST",route="/kv/import",status="499"} 1.0'
    deadline = time.monotonic() + 60
    while counted not in kv.http.get("/metrics").text:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert "Traceback" not in caplog.text


def test_what_is_not_there_cannot_be_exported(kv: LiveApp) -> None:
    headers = {"Authorization": f"Bearer {ADMIN}"}
    response = kv.http.get("/kv/export?session_id=nobody", headers=headers)
    assert "session_id" in refused(response, 404)
    assert kv.http.get("/kv/export", headers=headers).status_code in (400, 422)


# -- tenants ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(servable: Path) -> Iterator[LiveApp]:
    """An application with tenants; the shared client's key is the plain one."""
    quota = {"gpu": 16 * 9216}
    tenants = {
        "key-a": Caller(Tenant("a", "tenant a", quota=quota)),
        "key-b": Caller(Tenant("b", "tenant b", 3.0)),
        "key-root": Caller(Tenant("b", "tenant b", 3.0), is_admin=True),
    }
    settings = AppSettings(["tiny"], api_key=KEY, tenants=tenants, max_sequences=6)
    options: dict[str, Any] = {"num_gpu_blocks": 256, "num_threads": 1, "max_num_seqs": 2}
    with live_app(servable, settings, scheduling_policy="fair", **options) as app:
        yield app


def cached_by(app: LiveApp, key: str, path: str = "completions", **fields: Any) -> int:
    said = {"prompt": LONG} if path == "completions" else {}
    response = httpx.post(
        f"{app.url}/v1/{path}",
        json={"model": "tiny", **said, **fields},
        headers={"Authorization": f"Bearer {key}"},
        timeout=300,
    )
    assert response.status_code == 200, response.text
    usage = response.json()["usage"]
    if "cache_read_input_tokens" in usage:
        return int(usage["cache_read_input_tokens"])
    details = usage.get("prompt_tokens_details") or usage["input_tokens_details"]
    return int(details["cached_tokens"])


@pytest.mark.parametrize("path", ["completions", "chat/completions", "responses", "messages"])
def test_no_api_lets_tenants_see_what_others_have_cached(shared: LiveApp, path: str) -> None:
    said: dict[str, Any] = {
        "completions": {"max_tokens": 2},
        "chat/completions": {"messages": [{"role": "user", "content": path + LONG}]},
        "responses": {"input": path + LONG, "max_output_tokens": 2},
        "messages": {"messages": [{"role": "user", "content": path + LONG}], "max_tokens": 2},
    }[path]
    for key in ("key-a", "key-b", KEY):
        assert cached_by(shared, key, path, **said) <= 1  # the template's first, of requests before
        assert cached_by(shared, key, path, **said) >= 64
    assert cached_by(shared, "key-root", path, **said) >= 64, "the same tenant"
    salt = Tenant("a", "tenant a").salt("")
    assert cached_by(shared, "key-b", path, **said, cache_salt=salt) <= 1
    assert cached_by(shared, KEY, path, **said, cache_salt=salt) <= 1


def test_tenants_see_their_own_numbers(shared: LiveApp) -> None:
    def stats(key: str) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {key}"}
        return done(httpx.get(f"{shared.url}/kv/stats", headers=headers))

    cached_by(shared, "key-a", max_tokens=2)
    assert list(stats("key-a")["tenants"]) == list(stats("key-root")["tenants"]) == ["a"]
    assert stats("key-a")["tenants"]["a"]["used_bytes"]["gpu"] > 0
    assert stats("key-b")["tenants"] == {}


def test_a_flood_of_one_tenant_leaves_room_in_the_queue_for_others(shared: LiveApp) -> None:
    stop, refused = threading.Event(), threading.Event()

    def flood() -> None:
        while not stop.is_set():
            response = httpx.post(
                f"{shared.url}/v1/completions",
                json={"prompt": "flood", "max_tokens": 100, "ignore_eos": True},
                headers={"Authorization": "Bearer key-a"},
                timeout=300,
            )
            if response.status_code == 503:
                refused.set()

    threads = [threading.Thread(target=flood) for _ in range(10)]
    for thread in threads:
        thread.start()
    try:
        assert refused.wait(60), "the queue of a is full"
        for _ in range(5):
            cached_by(shared, "key-b", max_tokens=2)
    finally:
        stop.set()
        for thread in threads:
            thread.join(300)
