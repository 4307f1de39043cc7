"""Lines of a trace file, plain or gzip, and what is told of those that cannot be used."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tierkv.errors import ConfigError

MOST_LINE_BYTES = 64 << 20
_HEAD_BYTES = 4096
_GZIP = b"\x1f\x8b"
_MAGICS = {
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
    b"PK\x03\x04": "zip",
    b"PAR1": "Parquet",
}
_MOST_SHOWN = 60


@dataclass(slots=True, frozen=True)
class Problem:
    """Why a line of a trace was skipped.

    Attributes:
        path: of the file.
        line: its number, from 1.
        field: which field; empty for the line as a whole.
        found: what is there, shortened.
        fix: a sentence that says what to do instead.
    """

    path: str
    line: int
    field: str
    found: str
    fix: str

    def __str__(self) -> str:
        field = f"{self.field}: " if self.field else ""
        return f"{self.path}:{self.line}: {field}found {self.found}; {self.fix}"


class BadLine(ValueError):
    """A line cannot be used.

    Args:
        field: which field; empty for the line as a whole.
        found: what is there.
        fix: a sentence that says what to do instead.
    """

    def __init__(self, field: str, found: object, fix: str) -> None:
        shown = repr(found)
        if len(shown) > _MOST_SHOWN:
            shown = shown[: _MOST_SHOWN - 3] + "..."
        self.field, self.found, self.fix = field, shown, fix
        super().__init__(f"{field}: found {shown}; {fix}")


def check_file(path: Path) -> None:
    """Look at the first bytes.

    Raises:
        ConfigError: it is missing, a directory, empty, or no text.
    """
    with _explained(path):
        with path.open("rb") as file:
            magic = file.read(8)
        for start, name in _MAGICS.items():
            if magic.startswith(start):
                raise ConfigError("trace", str(path), f"is {name}: unpack it, or use gzip")
        with _open(path) as file:
            head = file.read(_HEAD_BYTES)
    if not head.strip():
        raise ConfigError("trace", str(path), "is empty: a trace has a line for each request")
    if b"\0" in head:
        raise ConfigError("trace", str(path), "is no text: give JSON lines or CSV, gzip or plain")


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """All lines that are not blank, with their numbers from 1.

    Raises:
        ConfigError: the file cannot be read to its end.
    """
    with _explained(path), _open(path) as file:
        number = 0
        while line := file.readline(MOST_LINE_BYTES):
            number += 1
            if len(line) == MOST_LINE_BYTES and not line.endswith(b"\n"):
                fix = f"line {number} is over {MOST_LINE_BYTES >> 20} MiB: write a line a request"
                raise ConfigError("trace", str(path), fix)
            if line.strip():
                yield number, line


def _open(path: Path) -> BinaryIO:
    with path.open("rb") as file:
        is_gzip = file.read(2) == _GZIP
    return gzip.open(path, "rb") if is_gzip else path.open("rb")  # type: ignore[return-value]


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        fix = f"its gzip data are cut off or damaged ({error}): fetch it again"
        raise ConfigError("trace", str(path), fix) from None
    except OSError as error:
        fix = f"cannot be read: {error.strerror or error}"
        raise ConfigError("trace", str(path), fix) from None
