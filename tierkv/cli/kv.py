"""`tierkv kv ACTION`: look at and steer the KV cache of a running server.

A prefix is named by --prompt, --prompt-file, --messages FILE.json or --session-id. `flush`,
`export`, `import`, `sleep` and `wake` need the key of an administrator.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shutil
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from tierkv.cli.options import CommandError, Parser
from tierkv.cli.plan import size_text, table
from tierkv.cli.serve import ADMIN_KEY_VARIABLE, KEY_VARIABLE
from tierkv.cli.top import checked_key, checked_url

EXAMPLES = """\
examples:
  tierkv kv stats
  tierkv kv warm --prompt-file manual.txt --pin
  tierkv kv ttl --session-id job-7 --ttl 60
  TIERKV_ADMIN_API_KEY=... tierkv kv export --session-id job-7 --output job-7.tierkv
"""
TIMEOUT_S = 3700.0  # the server waits for an hour at most
Json = dict[str, Any]


class Server:
    """A server's address and the key it is given."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self.url = checked_url(url)
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def get(self, path: str) -> Json:
        """What a path answers."""
        return self._json(self._request(path))

    def post(self, path: str, fields: Json) -> Json:
        """What a path answers to these fields."""
        request = self._request(path, json.dumps(fields).encode(), "application/json")
        return self._json(request)

    def download(self, path: str, out: BinaryIO) -> int:
        """Write what a path answers into a file; returns bytes."""
        with self._open(self._request(path)) as response:
            shutil.copyfileobj(response, out)
        return out.tell()

    def open(self, path: str, timeout_s: float) -> Any:
        """What a path answers, as it comes; `timeout_s` is the longest silence."""
        return self._open(self._request(path), timeout_s)

    def upload(self, path: str, file: BinaryIO, size: int) -> Json:
        """What a path answers to the content of a file."""
        request = self._request(path, file, "application/octet-stream")
        request.add_header("Content-Length", str(size))
        return self._json(request)

    def _request(
        self, path: str, data: bytes | BinaryIO | None = None, kind: str | None = None
    ) -> urllib.request.Request:
        headers = self._headers | ({"Content-Type": kind} if kind else {})
        return urllib.request.Request(f"{self.url}{path}", data=data, headers=headers)

    def _json(self, request: urllib.request.Request) -> Json:
        with self._open(request) as response:
            found: Json = json.load(response)
        return found

    def _open(self, request: urllib.request.Request, timeout_s: float = TIMEOUT_S) -> Any:
        try:
            return urllib.request.urlopen(request, timeout=timeout_s)
        except urllib.error.HTTPError as error:
            with error:
                raise CommandError(f"{self.url}: {_message(error)}") from None
        except (OSError, http.client.HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            raise CommandError(f"no answer from {self.url}: {reason}") from None


def _message(error: urllib.error.HTTPError) -> str:
    """What the server says is wrong."""
    try:
        text = json.load(error)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        text = f"it answered {error.code}"
    return str(text)


def stats(server: Server, namespace: argparse.Namespace) -> None:
    """A line for each tier, and what is pinned."""
    found = server.get("/kv/stats")
    if namespace.json:
        print(json.dumps(found, indent=2))
        return
    rows = [["tier", "used", "of", "evictable", "blocks evicted"]]
    for tier, of in found["tiers"].items():
        sizes = [size_text(of[f"{name}_bytes"]) for name in ("used", "capacity", "evictable")]
        rows.append([tier, *sizes, f"{of['evicted_blocks']:,}"])
    print(table(rows))
    pins = found["pins"]
    print(f"\npinned: {size_text(pins['pinned_bytes'])} of {size_text(pins['budget_bytes'])}")
    print(f"on its way: {found['moves']} moves, {found['offers']} offers; {found['state']}")
    for tenant, share in found["tenants"].items():
        quota = {tier: size_text(size) for tier, size in share["quota_bytes"].items()}
        used = {tier: size_text(share["used_bytes"][tier]) for tier in quota}
        print(f"{tenant}: " + ", ".join(f"{t} {used[t]} of {quota[t]}" for t in quota))


def warm(server: Server, namespace: argparse.Namespace) -> None:
    """Compute a prefix."""
    fields = prefix_fields(namespace) | {"pin": namespace.pin} | given(namespace, "ttl")
    show(server.post("/kv/warm", fields))


def pin(server: Server, namespace: argparse.Namespace) -> None:
    """Keep a prefix."""
    show(server.post("/kv/pin", prefix_fields(namespace) | given(namespace, "ttl")))


def unpin(server: Server, namespace: argparse.Namespace) -> None:
    """Let it go."""
    show(server.post("/kv/unpin", prefix_fields(namespace)))


def ttl(server: Server, namespace: argparse.Namespace) -> None:
    """Let it be the first to go."""
    show(server.post("/kv/ttl", prefix_fields(namespace) | given(namespace, "ttl")))


def flush(server: Server, namespace: argparse.Namespace) -> None:
    """Wait for what goes down."""
    found = server.post("/kv/flush", given(namespace, "timeout"))
    show(found)
    if not found["flushed"]:
        raise CommandError("not all has arrived in time")


def sleep(server: Server, namespace: argparse.Namespace) -> None:
    """Send the server to sleep."""
    show(server.post("/kv/sleep", given(namespace, "timeout")))


def wake(server: Server, namespace: argparse.Namespace) -> None:
    """Wake it."""
    show(server.post("/kv/wake", {}))


def export(server: Server, namespace: argparse.Namespace) -> None:
    """A session into a file, which is there only if it is whole."""
    if namespace.session_id is None:
        raise CommandError("name the session with --session-id")
    query = {"session_id": namespace.session_id, **given(namespace, "tenant")}
    target = Path(namespace.output or f"{namespace.session_id}.tierkv")
    part = target.with_name(f"{target.name}.part")
    try:
        with part.open("wb") as file:
            size = server.download(f"/kv/export?{urllib.parse.urlencode(query)}", file)
        part.replace(target)
    except OSError as error:
        raise CommandError(f"{target}: {error.strerror or error}") from None
    except http.client.IncompleteRead:
        raise CommandError("the server broke off; nothing was written") from None
    finally:
        part.unlink(missing_ok=True)
    print(f"{target}: {size_text(size)}")


def import_file(server: Server, namespace: argparse.Namespace) -> None:
    """A session from a file."""
    if namespace.FILE is None:
        raise CommandError("name the file: tierkv kv import FILE")
    query = urllib.parse.urlencode(given(namespace, "tenant"))
    try:
        with Path(namespace.FILE).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            found = server.upload(f"/kv/import?{query}", file, size)
    except OSError as error:
        raise CommandError(f"{namespace.FILE}: {error.strerror or error}") from None
    show(found)


ACTIONS: dict[str, Callable[[Server, argparse.Namespace], None]] = {
    "stats": stats,
    "warm": warm,
    "pin": pin,
    "unpin": unpin,
    "ttl": ttl,
    "flush": flush,
    "export": export,
    "import": import_file,
    "sleep": sleep,
    "wake": wake,
}


ADMINS = ("flush", "export", "import", "sleep", "wake")
"""Actions for which the server wants the key of an administrator."""


def key_for(namespace: argparse.Namespace) -> str | None:
    """The key that was given, else the one in the environment that the action needs."""
    names = (ADMIN_KEY_VARIABLE, KEY_VARIABLE) if namespace.ACTION in ADMINS else (KEY_VARIABLE,)
    found = [namespace.api_key, *map(os.environ.get, names)]
    return checked_key(next((key for key in found if key), None))


def prefix_fields(namespace: argparse.Namespace) -> Json:
    """The fields that name a prefix."""
    fields = given(namespace, "prompt", "session_id", "cache_salt")
    try:
        if namespace.prompt_file is not None:
            fields["prompt"] = Path(namespace.prompt_file).read_text(encoding="utf-8")
        if namespace.messages is not None:
            fields["messages"] = json.loads(Path(namespace.messages).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CommandError(f"the prefix cannot be read: {error}") from None
    return fields


def given(namespace: argparse.Namespace, *names: str) -> Json:
    """Options that were given, under their own names."""
    found = {name: getattr(namespace, name) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def show(found: Json) -> None:
    """One line for each field of an answer."""
    for name, value in found.items():
        print(f"{name.replace('_', ' ')}: {value}")


def make_parser() -> Parser:
    """The parser of `tierkv kv`."""
    parser = Parser(prog="tierkv kv", description=(__doc__ or "").strip(), epilog=EXAMPLES)
    parser.add_argument("ACTION", choices=ACTIONS, help=", ".join(ACTIONS))
    parser.add_argument("FILE", nargs="?", help="what to import")
    address = "http://127.0.0.1:8000"
    about_keys = f"also in ${KEY_VARIABLE}; for administrators in ${ADMIN_KEY_VARIABLE}"
    parser.add_argument("--url", default=address, help=f"the server's address (default: {address})")
    parser.add_argument("--api-key", metavar="KEY", help=about_keys)
    parser.add_argument("--prompt", metavar="TEXT", help="the prefix")
    parser.add_argument("--prompt-file", metavar="FILE", help="a file with the prefix")
    parser.add_argument("--messages", metavar="FILE.json", help="a conversation as the prefix")
    parser.add_argument("--session-id", metavar="ID", help="the session of `kv_hints`")
    parser.add_argument("--cache-salt", metavar="TEXT", help="of the requests that use the prefix")
    parser.add_argument("--ttl", type=float, metavar="SECONDS", help="default: for ever")
    parser.add_argument("--pin", action="store_true", help="with warm: pin it, too")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="of flush and sleep")
    parser.add_argument("--tenant", metavar="NAME", help="whose session to export or import")
    parser.add_argument("--output", "-o", metavar="FILE", help="of export; default: ID.tierkv")
    parser.add_argument("--json", action="store_true", help="stats as JSON")
    return parser


def run(namespace: argparse.Namespace) -> int:
    """Ask the server; the status is 1 when it refuses."""
    server = Server(namespace.url, key_for(namespace))
    ACTIONS[namespace.ACTION](server, namespace)
    sys.stdout.flush()
    return 0
