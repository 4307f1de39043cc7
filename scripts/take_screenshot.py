"""Take docs/images/dashboard.png: the page at `/dashboard` over the demo model under load.

python scripts/take_screenshot.py [--scheme light] [--out FILE.png]

Clients ask about documents that share their beginnings; there are more of them than the pool and
the CPU tier hold, so blocks move on every link. Needs playwright, and a chromium.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TARGET = Path(__file__).resolve().parent.parent / "docs" / "images" / "dashboard.png"
OPTIONS = (
    *("--num-gpu-blocks", "240", "--max-num-seqs", "4", "--max-num-batched-tokens", "256"),
    *("--oversubscribe", "--time-slice", "32", "--load-policy", "load"),
)
CLIENTS, DOCUMENTS = 9, 20
WORDS = ["the", "king", "went", "to", "sea", "and", "told", "his", "brother", "that", "ship"]
LOADING_S, PATIENCE_S = 300.0, 300.0
CHARTS_MS = 120_000
MOVING_LINKS = 4
SIZE = {"width": 1280, "height": 800}


class Load:
    """Clients that ask until it is over."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._is_over = threading.Event()
        for number in range(CLIENTS):
            threading.Thread(target=self._ask, args=(number,), daemon=True).start()

    def _ask(self, number: int) -> None:
        rng = random.Random(number)
        while not self._is_over.is_set():
            document = random.Random(rng.randrange(DOCUMENTS))
            length = document.randrange(300, 900)
            prompt = " ".join(document.choices(WORDS, k=length)) + f" {rng.random()}"
            fields = {"prompt": prompt, "max_tokens": rng.randrange(80, 240), "ignore_eos": True}
            try:
                self._post(fields)
            except OSError:
                return  # the server has ended

    def _post(self, fields: dict[str, Any]) -> None:
        request = urllib.request.Request(
            f"{self._url}/v1/completions",
            data=json.dumps(fields).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
            response.read()

    def end(self) -> None:
        self._is_over.set()


@contextmanager
def demo_server() -> Iterator[str]:
    """A server with three tiers; yields its address."""
    command = [sys.executable, "-P", "-m", "tierkv", "serve", "demo", "--port", "0", *OPTIONS]
    with tempfile.TemporaryDirectory() as folder:
        command += ["--offload", f"cpu=24MiB,nvme=56MiB:{folder}", "--shutdown-timeout", "0"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            yield url_of(process)
        finally:
            process.terminate()
            process.wait()


def url_of(process: subprocess.Popen[str]) -> str:
    """The address that the server announces."""
    assert process.stdout is not None
    for line in process.stdout:
        if match := re.search(r"ready at (http://\S+)", line):
            return match.group(1)
    raise SystemExit("the server did not start; see its messages above")


def chromium() -> str | None:
    """The browser of this machine, if it has one; else playwright's own is used."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


def is_lively(page: Any) -> bool:
    """Whether there is something to see: every tier filled, links that flow, a queue."""
    flows = page.locator(".links g[data-flows]").count()
    full = [float(text) for text in page.locator(".tier .full b").all_inner_texts()]
    running = page.locator(".row[data-state=decode]").count()
    queued = page.locator(".row[data-state=queued], .row[data-state=swapped]").count()
    return flows >= MOVING_LINKS and min(full) > 50 and running >= 3 and queued >= 3


def wait_until_lively(page: Any) -> None:
    """Return when there is something to see, or patience is over."""
    deadline = time.monotonic() + PATIENCE_S
    while not is_lively(page) and time.monotonic() < deadline:
        page.wait_for_timeout(250)


def take(url: str, out: Path, scheme: str) -> None:
    """Open the page, select a running request, and take its picture."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium(), args=["--no-sandbox", "--hide-scrollbars"]
        )
        options: Any = {"viewport": SIZE, "color_scheme": scheme}
        page = browser.new_page(**options)
        page.set_default_timeout(LOADING_S * 1000)
        page.goto(f"{url}/dashboard")
        page.wait_for_selector(".row[data-state=decode]")
        page.wait_for_timeout(CHARTS_MS)
        wait_until_lively(page)
        page.locator(".row[data-state=decode]").first.click()
        page.wait_for_selector("#detail-body:not([hidden])")
        page.mouse.move(4, 4)
        page.wait_for_timeout(1500)
        wait_until_lively(page)
        out.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=out)
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=TARGET, metavar="FILE.png")
    parser.add_argument("--scheme", choices=("dark", "light"), default="dark")
    namespace = parser.parse_args()
    with demo_server() as url:
        load = Load(url)
        try:
            take(url, namespace.out, namespace.scheme)
        finally:
            load.end()
    print(f"{namespace.out}: {namespace.out.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
