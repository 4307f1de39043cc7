"""The page at `/dashboard` in a real browser, over a real server with requests in flight."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from servable import ServerProcess, running_server

sync_api = pytest.importorskip("playwright.sync_api")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PATIENCE_MS = 60_000
WORDS = ["the", "king", "went", "to", "sea", "and", "told", "his", "brother", "that", "ship"]
SMALL = ("--num-gpu-blocks", "256", "--num-threads", "1")


class Traffic:
    """Clients that keep a server busy with prompts that share their beginnings."""

    def __init__(self, url: str, num_clients: int) -> None:
        self._url = url
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(num_clients)]
        for thread in self._threads:
            thread.start()

    def _ask(self, number: int) -> None:
        rng = random.Random(number)
        with httpx.Client(timeout=300) as client:
            while not self._is_over.is_set():
                document = random.Random(rng.randrange(8))
                prompt = " ".join(document.choices(WORDS, k=300)) + f" {rng.random()}"
                body = {"prompt": prompt, "max_tokens": 120, "ignore_eos": True}
                client.post(f"{self._url}/v1/completions", json=body)

    def end(self) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()


@pytest.fixture(scope="module")
def busy_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The demo model with a pool that is too small for what is asked of it."""
    folder = tmp_path_factory.mktemp("kv")
    arguments = (
        "demo", *("--num-gpu-blocks", "160"), *("--num-threads", "1"), "--oversubscribe",
        *("--offload", f"cpu=16MiB,nvme=48MiB:{folder}"), *("--max-num-batched-tokens", "256"),
    )  # fmt: skip
    with running_server(*arguments) as server:
        traffic = Traffic(server.url, 6)
        try:
            yield server.url
        finally:
            traffic.end()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        path = CHROMIUM or playwright.chromium.executable_path
        if not Path(path).exists():
            pytest.skip("there is no chromium")
        running = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield running
        running.close()


@contextmanager
def opened(browser: Any, url: str, *, width: int = 1280, **options: Any) -> Iterator[Any]:
    """The page in a window of its own; anything that its console complains of is a failure."""
    complaints: list[str] = []
    context = browser.new_context(viewport={"width": width, "height": 800}, **options)
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else 0)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(f"{url}/dashboard")
    try:
        yield page
        assert not complaints
    finally:
        context.close()


def wait_until_live(page: Any) -> None:
    page.wait_for_selector("#status[data-state=live]")
    page.wait_for_selector(".tier canvas")


def overflow(page: Any) -> int:
    return int(page.evaluate("document.documentElement.scrollWidth - innerWidth"))


def pixels(page: Any, tier: str) -> str:
    return str(page.evaluate(f"document.querySelector('[data-tier={tier}] canvas').toDataURL()"))


def number(page: Any, selector: str) -> float:
    found = re.search(r"[\d.]+", page.inner_text(selector).replace(",", ""))
    return float(found.group()) if found else 0.0


# ---------------------------------------------------------------------- under load


def test_blocks_move_and_figures_come(browser: Any, busy_server: str) -> None:
    with opened(browser, busy_server) as page:
        wait_until_live(page)
        assert page.title() == "demo · tierkv"
        assert page.locator(".tier h3").all_inner_texts() == ["GPU pool", "CPU", "NVMe"]
        page.wait_for_selector(".links g[data-flows]", state="attached")
        page.wait_for_selector(".row[data-state=decode]")
        looks = set()
        for _ in range(10):
            looks.add(pixels(page, "gpu"))
            page.wait_for_timeout(200)
        assert len(looks) > 4
        assert number(page, ".tier[data-tier=gpu] .counts li:first-child b") > 0
        sync_api.expect(page.locator(".chart-head b").first).to_have_text(re.compile("[1-9]"))
        assert (
            page.locator(".tier[data-tier=gpu] canvas")
            .get_attribute("aria-label")
            .startswith("160 blocks: ")
        )
        assert "GB/s" in page.inner_text("#flows") or "B/s" in page.text_content("#flows")
        assert overflow(page) <= 0


def test_a_request_is_selected_with_the_keyboard(browser: Any, busy_server: str) -> None:
    with opened(browser, busy_server) as page:
        wait_until_live(page)
        page.wait_for_selector(".row[data-state=decode]")
        stops = tab_stops(page, 7)
        assert stops[:2] == ["skip", "theme"] and "row" in stops
        while "row" not in focused(page):
            page.keyboard.press("Tab")
        first = page.evaluate("document.activeElement.querySelector('.id').textContent")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowUp")
        page.keyboard.press("ArrowDown")
        assert "row" in focused(page)
        assert page.evaluate("document.activeElement.querySelector('.id').textContent") != first
        page.keyboard.press("Enter")
        page.wait_for_selector("#detail-body:not([hidden])")
        assert page.locator(".lane i").count() > 0
        assert page.inner_text("#detail-facts").split()[1:3] == ["prompt", "tokens"]
        assert page.locator("#phases li").count() > 0
        page.keyboard.press("Escape")
        page.wait_for_selector("#detail-body", state="hidden")
        assert page.is_visible("#detail-hint")


def focused(page: Any) -> str:
    return str(
        page.evaluate("document.activeElement.className || document.activeElement.id || 'body'")
    )


def tab_stops(page: Any, count: int) -> list[str]:
    """What Tab reaches; each must show that it has the focus."""
    stops = []
    for _ in range(count):
        page.keyboard.press("Tab")
        ring = page.evaluate(
            "(() => { const e = document.activeElement, n = e.nextElementSibling;"
            " const shown = e.matches('input[type=radio]') ? n : e;"
            " return getComputedStyle(shown).outlineStyle; })()"
        )
        name = page.evaluate("document.activeElement.id || document.activeElement.className")
        if name:
            assert ring == "solid", name
        stops.append(name)
    return stops


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(browser: Any, busy_server: str, scheme: str) -> None:
    with opened(browser, busy_server, width=390, color_scheme=scheme, has_touch=True) as page:
        wait_until_live(page)
        page.wait_for_selector(".row")
        page.locator(".row").first.click()
        page.wait_for_selector("#detail-body:not([hidden])")
        assert overflow(page) <= 0
        right = "Math.max(...[...document.querySelectorAll('main *')]"
        right += ".filter(e => !e.closest('svg') && !e.closest('.row, .lane, .unseen'))"
        right += ".map(e => e.getBoundingClientRect().right))"
        assert page.evaluate(right) <= 390
        assert is_dark(page) == (scheme == "dark")


def is_dark(page: Any) -> bool:
    color = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return int(re.findall(r"\d+", color)[0]) < 128


def test_the_theme_can_be_chosen_and_stays(browser: Any, busy_server: str) -> None:
    with opened(browser, busy_server, color_scheme="dark") as page:
        wait_until_live(page)
        assert is_dark(page)
        page.click("#theme")
        assert not is_dark(page)
        assert page.get_attribute("#theme", "aria-label") == "Colours: light"
        page.reload()
        wait_until_live(page)
        assert not is_dark(page)
        page.click("#theme")
        assert is_dark(page)


def test_blocks_can_be_coloured_by_request(browser: Any, busy_server: str) -> None:
    with opened(browser, busy_server) as page:
        wait_until_live(page)
        page.wait_for_selector(".row[data-state=decode]")
        colors = "(() => { const c = document.querySelector('[data-tier=gpu] canvas');"
        colors += " const o = new OffscreenCanvas(c.width, c.height);"
        colors += " const x = o.getContext('2d', {willReadFrequently: true}); x.drawImage(c, 0, 0);"
        colors += " const d = x.getImageData(0, 0, c.width, c.height).data;"
        colors += " const s = new Set(); for (let i = 0; i < d.length; i += 4)"
        colors += " if (d[i + 3] === 255) s.add((d[i] >> 5) * 64 + (d[i + 1] >> 5) * 8"
        colors += " + (d[i + 2] >> 5)); return s.size; })()"
        page.wait_for_timeout(1000)
        before = page.evaluate(colors)
        page.focus("input[value=state]")
        page.keyboard.press("ArrowRight")
        page.wait_for_timeout(1000)
        assert page.evaluate(colors) > before


def test_motion_is_still_for_those_who_want_that(browser: Any, busy_server: str) -> None:
    with opened(browser, busy_server, reduced_motion="reduce") as page:
        wait_until_live(page)
        page.wait_for_selector(".links g[data-flows]", state="attached")
        running = "document.getAnimations().filter(a => a.playState === 'running').length"
        assert page.evaluate(running) == 0


def test_what_the_page_computes(browser: Any, busy_server: str) -> None:
    """Its modules alone: numbers for people, phases of a request, shapes of grids."""
    with opened(browser, busy_server) as page:

        def call(module: str, expression: str) -> Any:
            source = f"import('./dashboard/static/{module}.js').then((m) => {expression})"
            return page.evaluate(source)

        shown = "[0, 0.00432, 0.25, 1.24, 34.4, 119, 200, 9000].map(m.seconds)"
        assert call("format", shown) == [
            "0.0 ms", "4.3 ms", "0.25 s", "1.2 s", "34 s", "119 s", "3 min", "2 h",
        ]  # fmt: skip
        assert call("format", "[0, 999, 1.24e9, 9.999e8].map(m.bytesPerSecond)") == [
            ["0", "B/s"], ["999", "B/s"], ["1.24", "GB/s"], ["1.00", "GB/s"],
        ]  # fmt: skip
        assert call("format", "[0, 0.004, 0.999, 1].map(m.percent)") == ["0", "<1", "99", "100"]
        assert call("format", "['a/b/7', 'a'].map(m.shortId)") == ["a/b", "a"]
        events = [
            [0, 0, "queued"], [1, 0, "loading"], [2, 0, "running"], [2, 0, "chunk", 3, 0, 8],
            [5, 0, "preempted"], [6, 0, "running"], [6, 0, "chunk", 7, 0, 9], [9, 0, "finished"],
        ]  # fmt: skip
        parts = call("timeline", f"m.phasesOf({json.dumps(events)}, 3, 9)")
        assert [(part["phase"], part["from"], part["to"]) for part in parts] == [
            ("queued", 0, 1), ("loading", 1, 2), ("prefill", 2, 3), ("decode", 3, 5),
            ("preempted", 5, 6), ("decode", 6, 9), ("prefill", 2, 3), ("prefill", 6, 7),
        ]  # fmt: skip
        for count in (1, 7, 96, 512, 1000, 1024):
            for width, height in ((308, 160), (530, 160), (200, 132), (1200, 160)):
                grid = call("grid", f"m.shape({count}, {width}, {height})")
                num_rows = -(-count // grid["columns"])
                assert grid["columns"] * grid["width"] <= width
                assert num_rows * grid["height"] <= height


# ---------------------------------------------------------------------- without load


@pytest.mark.full
def test_the_key_is_asked_for_and_kept_for_the_tab_only(browser: Any, servable: Path) -> None:
    with running_server(str(servable), *SMALL, "--api-key", "open sesame") as server:
        context = browser.new_context()
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.goto(f"{server.url}/dashboard")
        page.wait_for_selector("#key[open]")
        assert page.evaluate("document.activeElement.id") == "key-value"
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#key-error:not(:empty)")
        page.keyboard.press("Escape")
        assert page.is_visible("#key")
        page.fill("#key-value", "open sesame")
        page.keyboard.press("Enter")
        wait_until_live(page)
        assert not page.is_visible("#key")
        page.reload()
        wait_until_live(page)
        assert page.evaluate("localStorage.length") == 0
        context.close()


@pytest.mark.full
def test_a_lost_connection_is_told_and_mended(browser: Any, servable: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    with running_server(str(servable), *SMALL, "--no-offload", "--port", port) as server:
        page.goto(f"{server.url}/dashboard")
        wait_until_live(page)
        assert page.locator(".tier").count() == 1
        assert page.inner_text(".alone").startswith("There is no tier below")
        server.process.kill()
        page.wait_for_selector("#status[data-state=lost]")
        assert "reconnecting" in page.inner_text("#status")
    with running_server(str(servable), *SMALL, "--no-offload", "--port", port):
        wait_until_live(page)
    context.close()


@pytest.mark.full
def test_a_server_with_watchers_ends_at_once(servable: Path) -> None:
    with running_server(str(servable), *SMALL, "--shutdown-timeout", "60") as server:
        seen: list[str] = []
        watcher = threading.Thread(target=watch_to_the_end, args=(server, seen))
        watcher.start()
        while not seen:
            time.sleep(0.05)
        start = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
        watcher.join()
        assert time.monotonic() - start < 30
        assert "the server is stopping" in seen[-1]
        assert "Traceback" not in "".join(server.log)


def watch_to_the_end(server: ServerProcess, seen: list[str]) -> None:
    with httpx.stream("GET", f"{server.url}/dashboard/events", timeout=60) as response:
        seen.extend(line for line in response.iter_lines() if line.startswith("data: "))
