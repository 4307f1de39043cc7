"""`/dashboard`: its files, its event stream, and what it costs when nobody looks."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import re
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute
from live_app import LiveApp

from tierkv.engine.core import EngineInfo
from tierkv.engine.observe import ROW
from tierkv.errors import EngineDeadError
from tierkv.server import feed as feed_module
from tierkv.server.app import AppSettings
from tierkv.server.feed import HEARTBEAT, MOST_WATCHERS, PERIOD_S, Feed
from tierkv.server.feed_rates import MOST_SAMPLES, SAMPLE, Rates
from tierkv.server.routes import dashboard
from tierkv.server.tenants import Caller, Callers, Tenant

WORDS = "sesame opens nothing here"
Event = dict[str, Any]


def events(app: LiveApp, client: httpx.Client | None = None) -> Iterator[Event]:
    with (client or app.http).stream("GET", "/dashboard/events") as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line.startswith("data: "):
                yield json.loads(line.removeprefix("data: "))


def rows_of(hello: Event, snapshot: Event) -> list[dict[str, Any]]:
    return [dict(zip(hello["row"], row, strict=True)) for row in snapshot["rows"]]


# ---------------------------------------------------------------------- the page


def test_the_page_and_its_files_need_no_key_and_are_locked_down(app: LiveApp) -> None:
    page = httpx.get(f"{app.url}/dashboard")
    assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    names = set(re.findall(r'"dashboard/static/([\w.-]+)"', page.text))
    assert {"main.js", "base.css"} <= names
    seen: set[str] = set()
    while names - seen:
        name = (names - seen).pop()
        seen.add(name)
        found = httpx.get(f"{app.url}/dashboard/static/{name}")
        assert found.status_code == 200, name
        kind = "text/javascript" if name.endswith(".js") else "text/css"
        assert found.headers["content-type"] == f"{kind}; charset=utf-8"
        names |= set(re.findall(r'from "\./([\w.-]+)"', found.text))
        assert "https://" not in found.text, name


def test_every_file_of_the_page_is_packaged_and_short(repository: Path) -> None:
    folder = repository / "tierkv" / "server" / "static"
    files = list(folder.iterdir())
    assert len(files) > 8 and all(path.is_file() for path in files)  # `static/*` takes no folders
    too_long = {path.name: n for path in files if (n := len(path.read_text().splitlines())) > 500}
    assert not too_long


def test_a_file_that_the_client_has_is_not_sent_again(app: LiveApp) -> None:
    url = f"{app.url}/dashboard/static/main.js"
    tag = httpx.get(url).headers["etag"]
    again = httpx.get(url, headers={"If-None-Match": tag})
    assert again.status_code == 304 and not again.content


@pytest.mark.parametrize("name", ["none.js", "..%2fapp.py", "%2e%2e/app.py", "static/main.js"])
def test_other_files_are_not_there(app: LiveApp, name: str) -> None:
    assert httpx.get(f"{app.url}/dashboard/static/{name}").status_code == 404


@pytest.mark.parametrize("path", ["/dashboard/events", "/dashboard/request?id=x"])
@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}])
def test_what_it_shows_needs_the_key(app: LiveApp, path: str, headers: dict[str, str]) -> None:
    found = httpx.get(app.url + path, headers=headers)
    assert found.status_code == 401 and found.json()["error"]["code"] == "invalid_api_key"


def test_where_there_are_tenants_only_administrators_watch() -> None:
    """It shows the requests of all of them."""
    tenants = {"one": Caller(Tenant("a")), "two": Caller(Tenant("b"), is_admin=True)}
    context: Any = SimpleNamespace(engine=None, settings=AppSettings(["m"]), is_exiting=False)
    context.check_key, context.check_admin = (lambda: "key"), (lambda: "admin key")
    for callers, check in (
        (Callers(tenants=tenants), context.check_admin),
        (Callers("k"), context.check_key),
    ):
        context.callers = callers
        guards = {
            route.path: [guard.dependency for guard in route.dependencies]
            for route in dashboard.router(context).routes
            if isinstance(route, APIRoute)
        }
        assert guards == {
            "/dashboard": [],
            "/dashboard/static/{name}": [],
            "/dashboard/events": [check],
            "/dashboard/request": [check],
        }


# ---------------------------------------------------------------------- the stream


def test_a_stream_says_what_it_is_and_then_how_things_are(app: LiveApp) -> None:
    stream = events(app)
    hello, first, second = (next(stream) for _ in range(3))
    assert hello["type"] == "hello" and hello["model"] == "tiny"
    assert hello["row"] == list(ROW) and hello["sample"] == list(SAMPLE)
    assert hello["block_size"] == app.engine.info.block_size
    (pool,) = first["tiers"]
    assert pool["capacity"] == 256 and pool["name"] == "gpu"
    kinds = ("empty", "filling", "cached", "draining", "in_use")
    assert sum(pool[kind] for kind in kinds) == 256
    assert len(base64.b64decode(pool["cells"])) == 256
    assert len(base64.b64decode(pool["owners"])) == 512
    assert second["t"] - first["t"] >= PERIOD_S
    stream.close()


def test_a_running_request_is_seen_and_nothing_that_it_says(app: LiveApp) -> None:
    body: Event = {"model": "tiny", "prompt": WORDS, "max_tokens": 1500, "ignore_eos": True}
    seen: list[Event] = []
    stream = events(app)
    hello = next(stream)
    with app.http.stream("POST", "/v1/completions", json=body | {"stream": True}):
        row = live_row(hello, stream, seen)
        known = app.http.get("/dashboard/request", params={"id": row["request"]}).json()
    stream.close()
    assert row["prompt_tokens"] == len(WORDS) and row["max_tokens"] == 1500
    assert row["owner"] > 0 and row["gpu"] == row["blocks"] > 0
    assert known["cells"]["gpu"] and known["ended_s"] is None
    assert [event[2] for event in known["events"]][:2] == ["queued", "running"]
    told = json.dumps([seen, known])
    assert WORDS not in told and "sesame" not in told
    assert str(list(WORDS.encode()))[1:-1] not in told


def live_row(hello: Event, stream: Iterator[Event], seen: list[Event]) -> dict[str, Any]:
    for snapshot in stream:
        seen.append(snapshot)
        for row in rows_of(hello, snapshot):
            if row["prompt_tokens"] == len(WORDS):
                assert row["state"] != "finished", "it was over too soon"
                if row["state"] == "decode":
                    return row
    raise AssertionError("the stream ended")


def test_a_finished_request_is_remembered_and_an_unknown_one_is_404(app: LiveApp) -> None:
    reply = app.post("completions", model="tiny", prompt="soon over", max_tokens=3).json()
    stream = events(app)
    hello, snapshot = next(stream), next(stream)
    stream.close()
    (row,) = [r for r in rows_of(hello, snapshot) if r["request"].startswith(reply["id"])]
    assert row["state"] == "finished"
    found = app.http.get("/dashboard/request", params={"id": row["request"]}).json()
    assert found["events"][-1][2] == "finished" and found["ended_s"] is not None
    for unknown in ({"id": "none"}, {}):
        assert app.http.get("/dashboard/request", params=unknown).status_code == 404


def test_the_engine_is_asked_only_while_somebody_watches(
    app: LiveApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    ask = app.engine.snapshot

    async def counted() -> dict[str, Any]:
        asked.append(time.monotonic())
        return await ask()

    monkeypatch.setattr(app.engine, "snapshot", counted)
    time.sleep(3 * PERIOD_S)
    assert not asked

    def watch() -> None:
        with httpx.Client(base_url=app.url, headers=app.http.headers, timeout=60) as client:
            stream = events(app, client)
            for _ in range(7):
                next(stream)
            stream.close()

    watchers = [threading.Thread(target=watch) for _ in range(3)]
    for watcher in watchers:
        watcher.start()
    for watcher in watchers:
        watcher.join()
    gaps = [b - a for a, b in itertools.pairwise(asked)]
    assert 6 <= len(asked) <= 12 and min(gaps) >= PERIOD_S * 0.95  # three share one look
    time.sleep(3 * PERIOD_S)
    before = len(asked)
    time.sleep(3 * PERIOD_S)
    assert len(asked) == before


# ---------------------------------------------------------------------- the feed, alone


class FakeEngine:
    """Snapshots that count; it may die, fail or be slow."""

    def __init__(self) -> None:
        self.info = EngineInfo("m", "", 100, 10, [], 4, 16, "float32", "cpu")
        self.count = 0
        self.ends_after = 10**9
        self.error: Exception = EngineDeadError("it was killed")
        self.delay_s = 0.0

    async def snapshot(self) -> dict[str, Any]:
        await asyncio.sleep(self.delay_s)
        self.count += 1
        if self.count > self.ends_after:
            raise self.error
        return make_snapshot(float(self.count), generated=10 * self.count)


def make_snapshot(t: float, **changes: int) -> dict[str, Any]:
    names = ("generated_tokens", "computed_tokens", "queried_tokens", "hit_tokens")
    counters = {name: changes.get(name.removesuffix("_tokens"), 0) for name in names}
    counters |= {f"hit_tokens_{tier}": changes.get(f"hit_{tier}", 0) for tier in ("cpu", "nvme")}
    return {
        "t": t,
        "tiers": [],
        "links": [["gpu", "cpu", 1, changes.get("moved", 0), 0, 0]],
        "counters": counters,
        "running": 2,
        "loading": 1,
        "waiting": 3,
        "swapped": 4,
        "rows": [],
    }


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "PERIOD_S", 0.01)
    monkeypatch.setattr(feed_module, "HEARTBEAT_S", 0.05)


def make_feed(engine: FakeEngine, is_exiting: Callable[[], bool] = lambda: False) -> Feed:
    return Feed(engine, "m", is_exiting)  # type: ignore[arg-type]


async def take(stream: AsyncGenerator[bytes, None], count: int) -> list[Event]:
    found = [await anext(stream) for _ in range(count)]
    return [json.loads(event.removeprefix(b"data: ")) for event in found]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (EngineDeadError("it was killed"), b"it was killed"),
        (ValueError("a bug"), b"failed to watch its engine; see its log"),
    ],
)
def test_a_dead_engine_ends_the_stream_with_the_reason(error: Exception, reason: bytes) -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        engine.ends_after, engine.error = 2, error
        feed = make_feed(engine)
        found = [event async for event in feed.events()]
        kinds = [json.loads(event.removeprefix(b"data: "))["type"] for event in found]
        assert kinds[0] == "hello" and kinds[-1] == "end" and reason in found[-1]
        assert feed.num_watchers == 0

    asyncio.run(scenario())


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("delay_s", [0.0, 60.0])
def test_a_stopping_server_ends_the_stream_even_when_the_engine_is_silent(delay_s: float) -> None:
    async def scenario() -> None:
        engine, flag = FakeEngine(), [False]
        engine.delay_s = delay_s
        stream = make_feed(engine, lambda: flag[0]).events()
        await anext(stream)
        flag[0] = True
        rest = [event async for event in stream]
        assert b"the server is stopping" in rest[-1]

    asyncio.run(asyncio.wait_for(scenario(), 10))


@pytest.mark.usefixtures("quick")
def test_a_silent_engine_gives_heartbeats() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        engine.delay_s = 60.0
        stream = make_feed(engine).events()
        await anext(stream)
        assert [await anext(stream) for _ in range(3)] == [HEARTBEAT] * 3
        await stream.aclose()

    asyncio.run(scenario())


@pytest.mark.usefixtures("quick")
def test_a_slow_reader_gets_the_latest() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        stream = make_feed(engine).events()
        await take(stream, 2)
        await asyncio.sleep(0.2)
        seen = engine.count
        (late,) = await take(stream, 1)
        assert seen > 4 and late["t"] == seen
        await stream.aclose()

    asyncio.run(scenario())


@pytest.mark.usefixtures("quick")
def test_who_comes_later_gets_what_others_have_seen() -> None:
    async def scenario() -> None:
        feed = make_feed(FakeEngine())
        first = feed.events()
        await take(first, 4)
        second = feed.events()
        (hello,) = await take(second, 1)
        assert [sample[0] for sample in hello["history"]][:3] == [1.0, 2.0, 3.0]
        assert not feed.is_full and feed.num_watchers == 2
        await first.aclose()
        await second.aclose()

    asyncio.run(scenario())


@pytest.mark.usefixtures("quick")
def test_watchers_are_bounded() -> None:
    async def scenario() -> None:
        feed = make_feed(FakeEngine())
        streams = [feed.events() for _ in range(MOST_WATCHERS)]
        for stream in streams:
            await anext(stream)
        assert feed.is_full
        for stream in streams:
            await stream.aclose()
        assert not feed.is_full

    asyncio.run(scenario())


# ---------------------------------------------------------------------- speeds and shares


def test_speeds_are_means_over_two_seconds() -> None:
    rates = Rates()
    assert rates.add(make_snapshot(100.0))["sample"][1:] == [None] * 5 + [2, 8]
    for i in range(1, 40):
        moved = 1000 * min(i, 20)
        snapshot = make_snapshot(100.0 + i / 4, generated=5 * i, computed=30 * i, moved=moved)
        found = rates.add(snapshot)
        if i == 16:
            assert found["speeds"]["links"] == {("gpu", "cpu"): 4000}
    assert found["speeds"]["generated"] == 20 and found["speeds"]["prompt"] == 100
    assert found["speeds"]["links"] == {("gpu", "cpu"): 0}
    assert dict(zip(SAMPLE, found["sample"], strict=True))["t"] == 109.75


def test_long_steps_do_not_make_speeds_jump() -> None:
    """Snapshots come with steps; the mean is over the steps that were."""
    rates = Rates()
    for i in range(5):
        found = rates.add(make_snapshot(5.0 * i, generated=5 * i))
    assert found["speeds"]["generated"] == 1.0


def test_shares_say_where_prompts_were_found() -> None:
    rates = Rates()
    rates.add(make_snapshot(0.0, queried=1000, hit=500))
    after = {"queried": 1200, "hit": 600, "hit_cpu": 30, "hit_nvme": 20}
    found = rates.add(make_snapshot(1.0, **after))["sample"]
    assert dict(zip(SAMPLE, found, strict=True)) | {"t": 0} == {
        "t": 0, "generated": 0, "prompt": 0, "hit_gpu": 0.25, "hit_cpu": 0.15, "hit_nvme": 0.1,
        "running": 2, "queued": 8,
    }  # fmt: skip
    soon = rates.add(make_snapshot(8.0, **after))["sample"]
    later = rates.add(make_snapshot(40.0, **after))["sample"]
    assert soon[3] is not None and later[3:6] == [None, None, None]


def test_history_is_bounded_and_a_pause_is_no_mean() -> None:
    rates = Rates()
    for i in range(MOST_SAMPLES + 20):
        rates.add(make_snapshot(i / 4, generated=i))
    assert len(rates.history) == MOST_SAMPLES
    rates.restart()
    assert rates.add(make_snapshot(10_000.0, generated=10**6))["speeds"]["generated"] is None
    found = rates.add(make_snapshot(10_000.5, generated=10**6 + 4))
    assert found["speeds"]["generated"] == 8.0
