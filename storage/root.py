"""Many stores under one path: one directory per model and layout, one bound on their bytes.

    root/LOCK                       held while a store is opened or removed, never longer
    root/<name>/                    a store; the name says model, layout, slot size and format

A store that belongs to another model, layout or format version is a sibling, never converted and
never touched, until its room is needed: then the one that was opened longest ago goes first, and
those that a process has open stay.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tierkv.errors import ConfigError
from tierkv.storage import record
from tierkv.storage.directory import (
    CAPACITY_OPTION,
    StoreSpec,
    disk_bytes,
    open_directory,
    refusal,
    remove_store,
)
from tierkv.storage.io import OpenIo
from tierkv.storage.io_posix import PosixIo
from tierkv.storage.lock import LOCK_NAME, DirectoryLock, Held, acquire
from tierkv.storage.manifest import Manifest, read_manifest
from tierkv.storage.nvme_store import NvmeStore

logger = logging.getLogger(__name__)

INDEX_SLOT_BYTES = 1536
"""Most that the index takes per slot."""

STORE_BYTES = 8 << 20
"""Most that a store takes besides its slots and their index rows."""

_NAME = re.compile(r"[0-9a-f]{16}-\d+-v\d+")


@dataclass(frozen=True, slots=True)
class Sibling:
    """A store under the root: its directory, the bytes it may take, when it was opened last."""

    path: Path
    num_bytes: int
    opened: float


def store_name(fingerprint: str, payload_bytes: int) -> str:
    """The directory of one model and layout."""
    digest = hashlib.blake2b(fingerprint.encode(), digest_size=8).hexdigest()
    return f"{digest}-{payload_bytes}-v{record.VERSION}"


def _budget(path: Path) -> int:
    """What a store takes on disk when it is full; 0 if it does not say how large it is."""
    try:
        manifest = read_manifest(path)
    except OSError:
        return 0
    if not isinstance(manifest, Manifest):
        return 0
    per_slot = record.slot_bytes(manifest.payload_bytes) + INDEX_SLOT_BYTES
    return manifest.capacity * per_slot + STORE_BYTES


def list_stores(root: Path) -> list[Sibling]:
    """Every store under the root, the one opened longest ago first."""
    found = []
    for path in root.iterdir():
        if _NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            lock = path / LOCK_NAME
            opened = lock.stat().st_mtime if lock.exists() else 0.0
            found.append(Sibling(path, max(_budget(path), disk_bytes(path)), opened))
    return sorted(found, key=lambda sibling: sibling.opened)


def open_store(
    root: Path,
    fingerprint: str,
    payload_bytes: int,
    capacity_bytes: int,
    store_bytes: int | None = None,
    open_io: OpenIo = PosixIo,
    now: Callable[[], float] = time.time,
    partners: Sequence[str] = (),
) -> NvmeStore:
    """Open the store of one model and layout, warm if it was there before.

    Args:
        root: directory of all stores; made with mode 0700, left as it is if it exists.
        fingerprint: of the model and the layout.
        payload_bytes: of every block; a multiple of 4 KiB avoids copies.
        capacity_bytes: bound on what all stores under the root take on disk.
        store_bytes: what this one may take (default: all that stores in use leave over).
        open_io, now: the I/O engine and the wall clock.
        partners: fingerprints of stores that are opened with this one, by other processes: they
            have its payload size, and are not removed to make room for it.

    Raises:
        ConfigError: the path cannot be used, somebody else has it, or there is no room.
    """
    path = root / store_name(fingerprint, payload_bytes)
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with root_guard(path):
            keep = [path, *(root / store_name(partner, payload_bytes) for partner in partners)]
            room = _make_room(root, keep, capacity_bytes, store_bytes or capacity_bytes)
            per_slot = record.slot_bytes(payload_bytes) + INDEX_SLOT_BYTES
            capacity = (room - STORE_BYTES) // per_slot
            if capacity < 1:
                left = max(0, room)
                fix = f"leaves {left} bytes beside stores in use, too few for a block; raise it"
                raise ConfigError(CAPACITY_OPTION, capacity_bytes, fix)
            spec = StoreSpec(fingerprint, payload_bytes, capacity)
            directory = open_directory(path, spec, open_io)
    except OSError as error:
        raise refusal(root, StoreSpec(fingerprint, payload_bytes, 0), error) from error
    return NvmeStore.start(directory, now)


@contextmanager
def root_guard(path: Path) -> Iterator[None]:
    """Let nobody else open or remove stores beside `path` inside the block.

    A store that is not named like one of a root has no siblings, and nothing to guard.
    """
    lock = acquire(path.parent, wait=True) if _NAME.fullmatch(path.name) else None
    try:
        yield
    finally:
        if isinstance(lock, DirectoryLock):
            lock.release()


def _make_room(root: Path, keep: Sequence[Path], capacity_bytes: int, wanted: int) -> int:
    """Remove idle siblings, oldest first, until `wanted` bytes fit; returns what fits.

    Args:
        keep: the store that is opened, and others that stay.
    """
    others = [sibling for sibling in list_stores(root) if sibling.path != keep[0]]
    used = sum(sibling.num_bytes for sibling in others)
    for sibling in others:
        if sibling.path in keep:
            continue
        if used + wanted <= capacity_bytes:
            break
        if remove_idle(sibling.path):
            logger.info("%s: removed to make room", sibling.path)
            used -= sibling.num_bytes
    return min(wanted, capacity_bytes - used)


def remove_idle(path: Path) -> bool:
    """Delete a store unless somebody has it open; whether it is gone. Hold the root's lock."""
    try:
        lock = acquire(path)
        if isinstance(lock, Held):
            return False
        try:
            remove_store(path)
        finally:
            lock.release()
    except OSError as error:
        logger.warning("%s: cannot be removed: %s", path, error)
        return False
    return True
