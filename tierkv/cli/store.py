"""`tierkv store ACTION PATH`: look at NVMe stores, check them, repair them, delete them.

PATH is one store's directory or the directory above several. `verify` reads every block; `repair`
also erases what is damaged and lets the next start rebuild the index. Both, and `clear`, leave
alone a store that a process has open.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tierkv.cli.options import CommandError, Parser
from tierkv.cli.plan import size_text, table
from tierkv.storage import record
from tierkv.storage.base import Cause, Failure
from tierkv.storage.directory import DATA_NAME, disk_bytes
from tierkv.storage.index import remove_index
from tierkv.storage.io import aligned
from tierkv.storage.lock import LOCK_NAME, Held, acquire, holder
from tierkv.storage.manifest import MANIFEST_NAME, Manifest, read_manifest
from tierkv.storage.root import list_stores, remove_idle, root_guard

EXAMPLES = """\
examples:
  tierkv store ls /var/cache/tierkv
  tierkv store verify /var/cache/tierkv
"""

WHOLE, EMPTY, DAMAGED, UNREADABLE = "whole", "empty", "damaged", "unreadable"


def stores_at(path: Path) -> list[Path]:
    """The store at `path`, or those below it.

    Raises:
        CommandError: there is none.
    """
    try:
        found = [path] if (path / MANIFEST_NAME).exists() else [s.path for s in list_stores(path)]
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror}") from None
    if not found:
        raise CommandError(f"{path}: holds no store")
    return found


def manifest_of(path: Path) -> Manifest:
    """The store's manifest.

    Raises:
        CommandError: it cannot be used; the next start would begin empty.
    """
    manifest = read_manifest(path)
    if not isinstance(manifest, Manifest):
        raise CommandError(f"{path}: {manifest.reason}; `tierkv store clear` removes the store")
    return manifest


@contextmanager
def owned(path: Path) -> Iterator[None]:
    """Hold the store's lock inside the block.

    Raises:
        CommandError: a process has the store open.
    """
    lock = acquire(path)
    if isinstance(lock, Held):
        raise CommandError(f"{path}: process {lock.pid} has it open")
    try:
        yield
    finally:
        lock.release()


def check_slots(path: Path, with_payload: bool) -> Iterator[tuple[int, str]]:
    """What is in each slot, by its header and, if asked, its payload."""
    manifest = manifest_of(path)
    store_id = bytes.fromhex(manifest.store_id)
    slot_bytes = record.slot_bytes(manifest.payload_bytes)
    buffer = aligned(slot_bytes if with_payload else record.HEADER_BYTES)
    with (path / DATA_NAME).open("rb", buffering=0) as file:
        for slot in range(manifest.capacity):
            try:
                count = os.preadv(file.fileno(), [buffer], slot * slot_bytes)
            except OSError:
                count = 0
            if count < buffer.nbytes:
                yield slot, UNREADABLE
            else:
                yield slot, _state(buffer, store_id, slot)


def _state(buffer: memoryview, store_id: bytes, slot: int) -> str:
    header = record.decode(buffer, store_id, slot)
    if isinstance(header, Failure):
        return EMPTY if header.cause is Cause.NOT_FOUND else DAMAGED
    payload = buffer[record.HEADER_BYTES :][: header.payload_bytes]
    is_right = not payload or record.digest(payload) == header.payload_digest
    return WHOLE if is_right else DAMAGED


def ls(paths: list[Path]) -> int:
    """One line per store."""
    rows = [["store", "slots", "of", "on disk", "opened", "in use by"]]
    for path in paths:
        manifest, lock = read_manifest(path), path / LOCK_NAME
        slots = of = "?"
        if isinstance(manifest, Manifest):
            slots, of = f"{manifest.capacity:,}", size_text(manifest.payload_bytes)
        opened = time.strftime("%Y-%m-%d %H:%M", time.localtime(lock.stat().st_mtime))
        rows.append([path.name, slots, of, size_text(disk_bytes(path)), opened, holder(path)])
    print(table(rows))
    return 0


def stat(paths: list[Path]) -> int:
    """What each store is and how full."""
    for path in paths:
        manifest = manifest_of(path)
        counts = Counter(state for _, state in check_slots(path, with_payload=False))
        rows = [
            ["store id", manifest.store_id],
            ["format version", str(manifest.version)],
            ["fingerprint", manifest.fingerprint],
            ["payload per slot", size_text(manifest.payload_bytes)],
            ["slots", f"{manifest.capacity:,}"],
            ["  that hold a block", f"{counts[WHOLE]:,}"],
            ["  with a damaged header", f"{counts[DAMAGED] + counts[UNREADABLE]:,}"],
            ["on disk", size_text(disk_bytes(path))],
            ["times opened", f"{manifest.session:,}"],
            ["in use by", holder(path)],
        ]
        print(f"{path}\n{table(rows)}")
    return 0


def verify(paths: list[Path]) -> int:
    """Read everything; status 1 if something is damaged."""
    num_bad = 0
    for path in paths:
        with owned(path):
            num_bad += len(_damage(path))
    return 1 if num_bad else 0


def repair(paths: list[Path]) -> int:
    """Erase what is damaged; the next start rebuilds the index from the headers."""
    for path in paths:
        with owned(path):
            slot_bytes = record.slot_bytes(manifest_of(path).payload_bytes)
            damaged = _damage(path)
            with (path / DATA_NAME).open("r+b", buffering=0) as file:
                for slot in damaged:
                    os.pwrite(file.fileno(), bytes(record.HEADER_BYTES), slot * slot_bytes)
                os.fsync(file.fileno())
            remove_index(path)
            print(f"{path}: {len(damaged)} slots erased, the index will be rebuilt")
    return 0


def _damage(path: Path) -> list[int]:
    """Check a store, say what was found, and return the slots that are not right."""
    counts: Counter[str] = Counter()
    bad = []
    for slot, state in check_slots(path, with_payload=True):
        counts[state] += 1
        if state in (DAMAGED, UNREADABLE):
            bad.append(slot)
    print(f"{path}: {', '.join(f'{counts[s]:,} {s}' for s in (WHOLE, EMPTY, DAMAGED, UNREADABLE))}")
    if bad:
        print(f"  slots: {', '.join(map(str, bad[:20]))}{', ...' if len(bad) > 20 else ''}")
    return bad


def clear(paths: list[Path]) -> int:
    """Delete stores that nobody has open; status 1 if one had to stay."""
    num_kept = 0
    for path in paths:
        with root_guard(path):
            is_gone = remove_idle(path)
        print(f"{path}: {'removed' if is_gone else 'kept, because it is open'}")
        num_kept += not is_gone
    return 1 if num_kept else 0


ACTIONS: dict[str, Callable[[list[Path]], int]] = {
    "ls": ls,
    "stat": stat,
    "verify": verify,
    "repair": repair,
    "clear": clear,
}


def make_parser() -> Parser:
    """The parser of `tierkv store`."""
    parser = Parser(prog="tierkv store", description=(__doc__ or "").strip(), epilog=EXAMPLES)
    parser.add_argument("ACTION", choices=ACTIONS, help=", ".join(ACTIONS))
    parser.add_argument("PATH", type=Path, help="a store, or the directory above stores")
    return parser


def run(namespace: argparse.Namespace) -> int:
    """Do it; errors of the file system are messages."""
    try:
        return ACTIONS[namespace.ACTION](stores_at(namespace.PATH))
    except OSError as error:
        raise CommandError(f"{namespace.PATH}: {error}") from error
