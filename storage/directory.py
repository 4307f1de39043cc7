"""The files of one store, opened together and by one owner."""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

from tierkv.errors import ConfigError
from tierkv.storage import record
from tierkv.storage.index import INDEX_FILES, Index, remove_index
from tierkv.storage.io import IoEngine, OpenIo
from tierkv.storage.lock import LOCK_NAME, DirectoryLock, Held, acquire
from tierkv.storage.manifest import (
    MANIFEST_NAME,
    Manifest,
    Unusable,
    read_manifest,
    sync_directory,
    write_manifest,
)

logger = logging.getLogger(__name__)

DATA_NAME = "blocks.data"
FILES = (MANIFEST_NAME, f"{MANIFEST_NAME}.tmp", DATA_NAME, *INDEX_FILES, LOCK_NAME)
"""Every name that a store may have in its directory."""

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors that mean that there is no room."""

PATH_OPTION = "nvme_path"
CAPACITY_OPTION = "nvme_cache_size"


@dataclass(frozen=True, slots=True)
class StoreSpec:
    """What a store is for: whose payloads, how large each, how many."""

    fingerprint: str
    payload_bytes: int
    capacity: int

    @property
    def data_bytes(self) -> int:
        return self.capacity * record.slot_bytes(self.payload_bytes)


@dataclass(slots=True)
class OpenDirectory:
    """An open store's lock, manifest and files."""

    path: Path
    lock: DirectoryLock
    manifest: Manifest
    io: IoEngine
    index: Index

    def begin_session(self) -> int:
        """Make an index sealed before now untrusted; durable. Returns the session's number.

        On a full disk the index is given up, to make room.
        """
        self.manifest = dataclasses.replace(self.manifest, session=self.manifest.session + 1)
        try:
            write_manifest(self.path, self.manifest)
        except OSError as error:
            if error.errno not in FULL:
                raise
            self.index.discard()
            write_manifest(self.path, self.manifest)
        return self.manifest.session

    def close(self) -> None:
        self.index.close()
        self.io.close()
        self.lock.release()


def open_directory(path: Path, spec: StoreSpec, open_io: OpenIo) -> OpenDirectory:
    """Lock and open a store's directory; make or replace what is missing or does not fit `spec`.

    Raises:
        ConfigError: somebody else has it, it cannot be used, or the disk is too small.
    """
    try:
        make_private(path)
        lock = lock_directory(path)
        try:
            manifest = _adopt(path, spec)
            io = open_io(path / DATA_NAME, spec.data_bytes)
        except BaseException:
            lock.release()
            raise
    except OSError as error:
        raise refusal(path, spec, error) from error
    return OpenDirectory(path, lock, manifest, io, Index(path))


def make_private(path: Path) -> None:
    """Make a store's directory, or take others' rights to it away.

    Raises:
        OSError: it cannot be made, or it is somebody else's.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.lstat()
    if status.st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, "it belongs to another user")
    if status.st_mode & 0o077:
        path.chmod(0o700)


def lock_directory(path: Path) -> DirectoryLock:
    """Become the only owner.

    Raises:
        ConfigError: there is one.
        OSError: the lock file cannot be opened.
    """
    lock = acquire(path)
    if isinstance(lock, Held):
        fix = f"process {lock.pid} is using it; stop that process or choose another directory"
        raise ConfigError(PATH_OPTION, str(path), fix)
    return lock


def refusal(path: Path, spec: StoreSpec, error: OSError) -> ConfigError:
    """The error for a store that cannot be opened."""
    if error.errno in (*FULL, errno.EFBIG):
        free = shutil.disk_usage(path).free if path.exists() else 0
        fix = f"{path} has room for {free} bytes more; lower it or free some space"
        return ConfigError(CAPACITY_OPTION, spec.data_bytes, fix)
    reason = error.strerror or str(error)
    return ConfigError(PATH_OPTION, str(path), f"cannot be used ({reason}); choose another one")


def remove_store(path: Path) -> None:
    """Delete a locked store: the manifest first, the directory last if nothing else is in it.

    Raises:
        OSError: a file could not be deleted.
    """
    for name in FILES:
        (path / name).unlink(missing_ok=True)
    try:
        path.rmdir()
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise


def disk_bytes(path: Path) -> int:
    """Bytes that a store's files occupy on the disk."""
    total = 0
    for name in FILES:
        try:
            total += os.stat(path / name).st_blocks * 512
        except FileNotFoundError:
            continue
    return total


def _adopt(path: Path, spec: StoreSpec) -> Manifest:
    """The manifest to go on with: the one that is there, resized, or a new one."""
    found = read_manifest(path)
    wanted = (spec.fingerprint, spec.payload_bytes)
    if isinstance(found, Manifest) and (found.fingerprint, found.payload_bytes) != wanted:
        found = Unusable("it holds blocks of another model or layout")
    if isinstance(found, Manifest):
        return dataclasses.replace(found, version=record.VERSION, capacity=spec.capacity)
    logger.info("%s: starts empty, because %s", path, found.reason)
    (path / DATA_NAME).unlink(missing_ok=True)
    remove_index(path)
    sync_directory(path)
    fresh = uuid.uuid4().hex
    return Manifest(fresh, record.VERSION, *wanted, capacity=spec.capacity, session=0)
