"""index.sqlite: a copy of the headers in one file, so that opening need not visit every slot.

It is a cache. Losing it loses nothing, and no answer depends on it: rows only say what the headers
should be, and a read compares. It is believed at opening only if it was sealed by a clean close of
the session that the MANIFEST names, and if every row's checksum is right. Otherwise the headers
are read and the index is written anew, with the use statistics of rows that still apply.

So rows need not be there before the session ends. They are noted in memory first (`put`, `delete`)
and go to the file many at once and in the order of slots (`write_out`): neighbours share a page.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import struct
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from tierkv.storage.base import StoredBlock

logger = logging.getLogger(__name__)

INDEX_NAME = "index.sqlite"
INDEX_FILES = (INDEX_NAME, f"{INDEX_NAME}-wal", f"{INDEX_NAME}-shm")

_SICK = (sqlite3.Error, ValueError)
"""Raised over a damaged file, whose bytes in SQLite's own messages may be no text either."""

_TRANSACTION_ROWS = 1000
"""Bounds the write-ahead log."""

_SCHEMA = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
PRAGMA wal_autocheckpoint = 256;
PRAGMA journal_size_limit = 1048576;
CREATE TABLE IF NOT EXISTS blocks (
    slot INTEGER PRIMARY KEY, key BLOB, parent BLOB, tokens BLOB, generation INTEGER,
    hits INTEGER, last_use REAL, checksum BLOB
);
CREATE TABLE IF NOT EXISTS seal (session INTEGER, generation INTEGER, num_blocks INTEGER);
"""

# By name: a damaged schema may have other columns.
_SELECT_BLOCKS = (
    "SELECT slot, key, parent, tokens, generation, hits, last_use, checksum FROM blocks"
)
_SELECT_SEAL = "SELECT session, generation, num_blocks FROM seal"


@dataclass(frozen=True, slots=True)
class Sealed:
    """What a trusted index says: the blocks, and the highest generation used."""

    blocks: list[StoredBlock]
    generation: int


class Index:
    """The index of an open store. When SQLite fails, it is given up until the next opening.

    Args:
        directory: the store's; a file there that is no database holds nothing until `replace`.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._noting, self._writing_out = threading.Lock(), threading.Lock()
        self._noted: dict[int, StoredBlock | None] = {}
        self._database: sqlite3.Connection | None = None
        try:
            self._database = _connect(directory)
        except _SICK as error:
            logger.warning("%s: the index cannot be used (%s)", directory, error)

    def sealed(self, session: int) -> Sealed | None:
        """The blocks, if a clean close of `session` sealed them and every row is right."""
        with self._lock:
            if self._database is None:
                return None
            try:
                seals = self._database.execute(_SELECT_SEAL).fetchall()
                rows = self._database.execute(_SELECT_BLOCKS).fetchall()
            except _SICK as error:
                self._give_up(error)
                return None
        blocks = _blocks(rows)
        generation = seals[0][1] if seals else None
        if seals != [(session, generation, len(blocks))] or len(blocks) != len(rows):
            return None
        latest = max((block.generation for block in blocks), default=0)
        if not isinstance(generation, int) or generation < latest:
            return None
        return Sealed(blocks, generation)

    def rows(self) -> list[StoredBlock]:
        """All rows whose checksum is right, trusted or not."""
        return _blocks(self._run(_SELECT_BLOCKS))

    def replace(self, blocks: Iterable[StoredBlock]) -> None:
        """Start again with a new file and these rows."""
        self.close()
        with self._lock:
            try:
                remove_index(self._directory)
                self._database = _connect(self._directory)
            except (*_SICK, OSError) as error:
                self._give_up(error)
        self.put({block.slot: block for block in blocks})
        self.write_out()

    @property
    def num_noted(self) -> int:
        """Slots whose rows are not in the file yet."""
        return len(self._noted)

    def put(self, blocks: Mapping[int, StoredBlock]) -> None:
        """Note what slots hold."""
        with self._noting:
            self._noted |= blocks

    def delete(self, slots: Sequence[int]) -> None:
        """Note that slots hold nothing."""
        with self._noting:
            self._noted |= dict.fromkeys(slots)

    def write_out(self) -> None:
        """Write what was noted."""
        with self._writing_out:
            with self._noting:
                noted, self._noted = self._noted, {}
            blocks = [noted[slot] for slot in sorted(noted)]
            gone = [(slot,) for slot, block in noted.items() if block is None]
            self._run_all("DELETE FROM blocks WHERE slot = ?", gone)
            rows = [(*block, _checksum(block)) for block in blocks if block is not None]
            self._run_all("INSERT OR REPLACE INTO blocks VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)

    def put_usage(self, blocks: Iterable[StoredBlock]) -> None:
        """Update the statistics of rows that are in the file and still about the same write."""
        rows = [(b.hits, b.last_use, _checksum(b), b.slot, b.generation) for b in blocks]
        set_usage = "UPDATE blocks SET hits = ?, last_use = ?, checksum = ?"
        self._run_all(f"{set_usage} WHERE slot = ? AND generation = ?", rows)

    def delete_from(self, capacity: int) -> None:
        """Forget slots that the store no longer has."""
        self._run("DELETE FROM blocks WHERE slot >= ?", [(capacity,)])

    def seal(self, session: int, generation: int) -> None:
        """Say that the rows, all written out, are complete; durable when it returns."""
        self._run("PRAGMA synchronous = FULL")
        self._run("DELETE FROM seal")
        statement = "INSERT INTO seal SELECT ?, ?, COUNT(*) FROM blocks"
        self._run(statement, [(session, generation)])

    def close(self) -> None:
        with self._lock:
            if self._database is not None:
                self._database.close()
                self._database = None

    def discard(self) -> None:
        """Delete it; until the next opening there is none."""
        self.close()
        remove_index(self._directory)

    def _run_all(self, statement: str, rows: Sequence[tuple[object, ...]]) -> None:
        for start in range(0, len(rows), _TRANSACTION_ROWS):
            self._run(statement, rows[start : start + _TRANSACTION_ROWS])

    def _run(
        self, statement: str, rows: Sequence[tuple[object, ...]] | None = None
    ) -> list[tuple[Any, ...]]:
        with self._lock:
            if self._database is None or rows == []:
                return []
            try:
                if rows is None:
                    return self._database.execute(statement).fetchall()
                with self._database:
                    self._database.execute("BEGIN")
                    self._database.executemany(statement, rows)
            except _SICK as error:
                self._give_up(error)
            return []

    def _give_up(self, error: Exception) -> None:
        """Go on without an index; it stays unsealed, so the next opening reads the headers."""
        logger.warning("index given up until the store is opened again: %s", error)
        database, self._database = self._database, None
        if database is not None:
            database.close()


def remove_index(directory: Path) -> None:
    """Delete the index's files."""
    for name in INDEX_FILES:
        (directory / name).unlink(missing_ok=True)


def _connect(directory: Path) -> sqlite3.Connection:
    path = directory / INDEX_NAME
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise sqlite3.DatabaseError(str(error)) from error
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    database.text_factory = bytes  # no column is text, but a damaged one may say so
    try:
        database.executescript(_SCHEMA)
    except _SICK:
        database.close()
        raise
    return database


def _blocks(rows: Iterable[tuple[Any, ...]]) -> list[StoredBlock]:
    """The rows whose checksum is right."""
    found = []
    for row in rows:
        block = StoredBlock._make(row[:7])
        try:
            is_right = _checksum(block) == row[7]
        except (struct.error, TypeError):
            is_right = False  # not even the types are what was written
        if is_right:
            found.append(block)
    return found


def _checksum(block: StoredBlock) -> bytes:
    numbers = struct.pack("<qqqd", block.slot, block.generation, block.hits, block.last_use)
    sizes = struct.pack("<II", len(block.key), len(block.parent))
    return xxhash.xxh3_64_digest(numbers + sizes + block.key + block.parent + block.tokens)
