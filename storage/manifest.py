"""MANIFEST: what a store directory is. JSON with its own checksum, replaced as a whole.

    tmp file -> fsync -> rename -> fsync(directory)

so a reader sees the old one or the new one. Every opening raises `session` before the first write;
an index that was sealed in an earlier session than the manifest's is not trusted.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from tierkv.storage.record import OLDEST_READABLE, VERSION

MANIFEST_NAME = "MANIFEST"


@dataclass(frozen=True, slots=True)
class Manifest:
    """Identity and geometry of one store.

    Attributes:
        store_id: 32 hex digits, in every record's header.
        version: format version of the records.
        fingerprint: of the model and the layout that the payloads belong to.
        payload_bytes, capacity: payload bytes of a slot, number of slots.
        session: how often the store was opened.
    """

    store_id: str
    version: int
    fingerprint: str
    payload_bytes: int
    capacity: int
    session: int


@dataclass(frozen=True, slots=True)
class Unusable:
    """There is no manifest that can be used, and why."""

    reason: str


def read_manifest(directory: Path) -> Manifest | Unusable:
    """The directory's manifest, checked.

    Raises:
        OSError: it is there but cannot be read, which does not say that the store is lost.
    """
    try:
        fields: Any = json.loads((directory / MANIFEST_NAME).read_bytes())
        checksum = fields.pop("checksum")
        manifest = Manifest(**fields)
    except FileNotFoundError:
        return Unusable("it is new")
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        return Unusable(f"its MANIFEST cannot be read ({error})")
    if checksum != _checksum(manifest):
        return Unusable("its MANIFEST is damaged")
    if not OLDEST_READABLE <= manifest.version <= VERSION:
        return Unusable(f"its format version is {manifest.version}")
    return manifest


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Replace the manifest; durable when it returns.

    Raises:
        OSError: it could not be written; the old one is intact.
    """
    fields = dataclasses.asdict(manifest) | {"checksum": _checksum(manifest)}
    temporary = directory / f"{MANIFEST_NAME}.tmp"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        json.dump(fields, file, indent=1)
        file.flush()
        os.fsync(descriptor)
    os.replace(temporary, directory / MANIFEST_NAME)
    sync_directory(directory)


def sync_directory(directory: Path) -> None:
    """Make names in the directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(manifest: Manifest) -> str:
    text = json.dumps(dataclasses.astuple(manifest))
    return xxhash.xxh3_128_hexdigest(text.encode())
