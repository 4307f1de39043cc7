"""A server as its users start it, its clients, and what its processes use."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from common.models import LAST_TOKEN, cache_dir, model_dir

LOADING_S = 300.0
_READY = re.compile(r"ready at (http://\S+)")
_LETTERS = "etaoinshrdlucmfw"


def servable_dir(name: str) -> Path:
    """A benchmark model with a tokenizer: each of its tokens is one word, three letters and a
    space, so that there is text to send."""
    target = cache_dir() / f"{name}-with-words"
    if not (target / "tokenizer.json").exists():
        target.mkdir(parents=True, exist_ok=True)
        for file in model_dir(name).iterdir():
            shutil.copy(file, target)
        words = ["<unk>", "<s>", "</s>", "<pad>"]
        words += [_word(number) for number in range(len(words), LAST_TOKEN + 1)]
        backend = Tokenizer(
            models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>")
        )
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        backend.decoder = decoders.WordPiece()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
        )
        tokenizer.save_pretrained(target)
    return target


def _word(number: int) -> str:
    letters = []
    while number or not letters:
        number, letter = divmod(number, len(_LETTERS))
        letters.append(_LETTERS[letter])
    return "".join(letters)


@dataclass(frozen=True, slots=True)
class Usage:
    """What processes use at a moment.

    Attributes:
        cpu_s: seconds of CPU, since they started.
        rss_bytes: resident memory.
        descriptors: open files and sockets.
    """

    cpu_s: float
    rss_bytes: int
    descriptors: int

    @classmethod
    def of(cls, process: psutil.Process) -> Usage:
        times = process.cpu_times()
        return cls(times.user + times.system, process.memory_info().rss, process.num_fds())


@dataclass(slots=True)
class Server:
    """A running `tierkv serve`.

    Attributes:
        url: where it answers.
        log: its lines.
    """

    process: subprocess.Popen[str]
    url: str = ""
    log: list[str] = field(default_factory=list)

    def usage(self) -> dict[str, Usage]:
        """Of the process that answers and of the engine's."""
        front = psutil.Process(self.process.pid)
        (engine,) = front.children()
        return {"server": Usage.of(front), "engine": Usage.of(engine)}

    def metrics(self) -> dict[str, float]:
        """The samples of `/metrics` by name, those with labels by `name{labels}`."""
        samples = {}
        for line in httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                samples[name] = float(value)
        return samples


@contextmanager
def serving(*arguments: str) -> Iterator[Server]:
    """Start `tierkv serve` on a free port; it has ended afterwards.

    Raises:
        RuntimeError: it does not come up.
    """
    command = [sys.executable, "-P", "-m", "tierkv", "serve", "--port", "0", *arguments]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    server, ready = Server(process), threading.Event()
    reader = threading.Thread(target=_read, args=(server, ready), daemon=True)
    reader.start()
    try:
        if not ready.wait(LOADING_S) or not server.url:
            raise RuntimeError(f"the server did not come up: {''.join(server.log[-20:])}")
        yield server
    finally:
        _end(process)
        reader.join()


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _read(server: Server, ready: threading.Event) -> None:
    assert server.process.stdout is not None
    with server.process.stdout as lines:
        for line in lines:
            server.log.append(line)
            if match := _READY.search(line):
                server.url = match.group(1)
                ready.set()
    ready.set()


@dataclass(slots=True)
class Answer:
    """What a client saw of one streamed request.

    Attributes:
        begun: when it was sent; of `time.perf_counter`, as are the others.
        first: when the first text came; None before.
        last: when the stream ended.
        chunks: events with text.
        usage: as the server reported it.
    """

    begun: float
    first: float | None = None
    last: float = 0.0
    chunks: int = 0
    usage: dict[str, Any] = field(default_factory=dict)


async def stream(
    client: httpx.AsyncClient, url: str, body: dict[str, Any], answer: Answer
) -> AsyncIterator[None]:
    """Stream a completion into `answer`; yields after each event, so that a caller may leave.

    Raises:
        httpx.HTTPError: the connection broke, or the status is not 200.
        RuntimeError: the server sent an error, or ended without `[DONE]`.
    """
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                answer.last = time.perf_counter()
                return
            if line.startswith("data: "):
                _note(answer, json.loads(line[6:]))
                yield
    raise RuntimeError("the stream ended before [DONE]")


def _note(answer: Answer, event: dict[str, Any]) -> None:
    if "error" in event:
        raise RuntimeError(f"the server answered {event['error']}")
    if event["choices"]:
        answer.first = answer.first or time.perf_counter()
        answer.chunks += 1
    else:
        answer.usage = event["usage"]
