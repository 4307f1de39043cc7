"""`tierkv top`: watch a server's tiers, what moves between them, and its requests.

It shows what the page at `/dashboard` shows. Ctrl-C ends it. Without a terminal it prints one frame
after the other.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http import client
from typing import Any, TextIO

from tierkv.cli.options import CommandError, Parser
from tierkv.cli.serve import KEY_VARIABLE
from tierkv.cli.top_frame import Event, Screen, Style, frame
from tierkv.errors import ConfigError

EXAMPLES = """\
examples:
  tierkv top
  tierkv top --url http://gpu-box:8000 --api-key KEY
  tierkv top --once
"""
ONCE_SNAPSHOTS = 5  # until speeds mean something
SILENCE_S = 10.0  # the server says something every two seconds
RETRY_S = 1.0
ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
HOME, END_OF_LINE, END_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"


class ConnectionLost(Exception):
    """The stream ended, or cannot be had now; it is worth trying again."""


@dataclass(slots=True)
class Source:
    """The event stream of one server.

    Attributes:
        url: the server's address.
        api_key: what it asks for, if it does.
    """

    url: str
    api_key: str | None

    def events(self) -> Iterator[Event]:
        """Events until the stream ends.

        Raises:
            CommandError: the server refuses, or is none of ours.
            ConnectionLost: it does not answer, or not any more.
        """
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        request = urllib.request.Request(f"{self.url}/dashboard/events", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=SILENCE_S) as response:
                for line in response:
                    if line.startswith(b"data: "):
                        yield json.loads(line[6:])
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from None
        except (OSError, client.HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            raise ConnectionLost(f"no answer from {self.url}: {reason}") from None
        raise ConnectionLost(f"{self.url} closed the connection")

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        with error:
            body = error.read(4096)
        if error.code == 403:
            return CommandError(f"{self.url}: {message_in(body)}")
        if error.code == 401:
            fix = f"give it with --api-key, or as {KEY_VARIABLE} in the environment"
            return CommandError(f"{self.url} asks for its API key: {fix}")
        if error.code == 404:
            return CommandError(f"{self.url} has no /dashboard: is it a tierkv server?")
        return ConnectionLost(f"{self.url} answered {error.code}")


def message_in(body: bytes) -> str:
    """What an error's body says."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return "the server refuses this key"


def make_parser() -> Parser:
    """The parser of `tierkv top`."""
    parser = Parser(prog="tierkv top", description=(__doc__ or "").strip(), epilog=EXAMPLES)
    parser.add_argument(
        "--url",
        default="http://127.0.0.1:8000",
        help="address of the server (default: http://127.0.0.1:8000)",
    )
    parser.add_argument("--api-key", metavar="KEY", help="the server's key, if it has one")
    parser.add_argument("--once", action="store_true", help="print one frame and end")
    parser.add_argument(
        "--interval", type=float, default=1.0, metavar="SECONDS", help="between two frames"
    )
    parser.add_argument("--no-color", action="store_true", help="print no colours")
    return parser


def run(namespace: argparse.Namespace) -> int:
    """Watch until Ctrl-C; with `--once`, print one frame."""
    key = checked_key(namespace.api_key or os.environ.get(KEY_VARIABLE))
    source = Source(checked_url(namespace.url), key)
    if not 0.1 <= namespace.interval <= 3600:
        raise ConfigError("interval", namespace.interval, "must be from 0.1 to 3600 seconds")
    has_color = sys.stdout.isatty() and not namespace.no_color and not os.environ.get("NO_COLOR")
    if namespace.once:
        print_once(source, has_color)
        return 0
    try:
        watch(source, namespace.interval, has_color)
    except KeyboardInterrupt:
        return 0
    return 0


def checked_url(url: str) -> str:
    """The address without what follows the host and the path.

    Raises:
        ConfigError: not an address.
    """
    parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError("url", url, "give an address such as http://127.0.0.1:8000")
    return f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/").removesuffix("/dashboard")


def checked_key(key: str | None) -> str | None:
    """The key, as HTTP can carry it.

    Raises:
        CommandError: it cannot.
    """
    if key and not (key.isascii() and key.isprintable()):
        raise CommandError(
            "the API key holds characters that HTTP cannot carry: check for a copy that went wrong"
        )
    return key or None


def style_of(out: TextIO, *, has_color: bool) -> Style:
    """What the terminal can show; a wide page where there is none."""
    size = shutil.get_terminal_size((110, 50))
    try:
        "█▁→…".encode(out.encoding or "ascii")
        is_plain = False
    except UnicodeEncodeError:
        is_plain = True
    return Style(size.columns, size.lines, has_color, is_plain)


def print_once(source: Source, has_color: bool) -> None:
    """One frame, once speeds mean something.

    Raises:
        CommandError: there is no server.
    """
    screen, seen = Screen(), 0
    try:
        for event in source.events():
            screen.take(event)
            seen += event["type"] == "snapshot"
            if seen == ONCE_SNAPSHOTS or screen.trouble:
                break
    except ConnectionLost as error:
        raise CommandError(str(error)) from None
    if not screen.snapshot:
        raise CommandError(f"{source.url}: {screen.trouble or 'the server sent nothing'}")
    show(screen, sys.stdout, has_color=has_color, is_live=False)


def watch(source: Source, interval: float, has_color: bool) -> None:
    """Frame after frame, connecting again when the connection is lost."""
    is_live, screen = sys.stdout.isatty(), Screen()
    if is_live:
        sys.stdout.write(ENTER)
    try:
        while True:
            follow(source, screen, interval, has_color=has_color, is_live=is_live)
            show(screen, sys.stdout, has_color=has_color, is_live=is_live)
            time.sleep(RETRY_S)
    finally:
        if is_live:
            sys.stdout.write(LEAVE)
            sys.stdout.flush()


def follow(
    source: Source, screen: Screen, interval: float, *, has_color: bool, is_live: bool
) -> None:
    """One connection, until it is lost."""
    due = time.monotonic()
    try:
        for event in source.events():
            screen.take(event)
            if event["type"] == "snapshot" and time.monotonic() >= due:
                show(screen, sys.stdout, has_color=has_color, is_live=is_live)
                due = time.monotonic() + interval
    except ConnectionLost as error:
        screen.trouble = screen.trouble or f"{error}; trying again"


def show(screen: Screen, out: TextIO, *, has_color: bool, is_live: bool) -> None:
    """Write a frame: over the last one in a terminal, below it elsewhere."""
    style = style_of(out, has_color=has_color)
    lines: list[Any] = frame(screen, style)
    if style.is_plain:
        lines = [line.replace("…", "~") for line in lines]
    if is_live:
        body = "\n".join(line + END_OF_LINE for line in lines[: style.lines - 1])
        out.write(HOME + body + "\n" + END_OF_SCREEN)
    else:
        out.write("\n".join(lines) + "\n\n")
    out.flush()
