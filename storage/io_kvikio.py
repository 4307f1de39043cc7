"""The I/O engine of machines with CUDA: NVIDIA's kvikio, a pool of threads in C++.

    host memory      pread and pwrite of each buffer, split into tasks for the pool; O_DIRECT where
                     a buffer starts at a page
    device memory    GPUDirect, between the drive and the GPU, where preflight finds it; else
                     through host memory, by the same pool

A store verifies what it reads and checksums what it writes on the CPU, so its buffers are host
memory today and GPUDirect has nothing to do; buffers with a `__cuda_array_interface__` are taken
all the same. The file is made, sized and synced as by `io_posix.py`.

kvikio's own defaults are one thread, tasks of 4 MiB and reads through the page cache. They hold for
the whole process; here they are raised once, except those that the environment sets
(`KVIKIO_NTHREADS`, `KVIKIO_TASK_SIZE`, `KVIKIO_AUTO_DIRECT_IO_READ`). Importing kvikio needs
libcufile, and using it libcuda.

Not yet run on a GPU.
"""

from __future__ import annotations

import errno
import importlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tierkv.errors import ConfigError
from tierkv.storage.io import aligned
from tierkv.storage.io_posix import PosixIo
from tierkv.storage.record import ALIGNMENT

logger = logging.getLogger(__name__)

OPTION = "nvme_io"
NUM_THREADS = 16
TASK_BYTES = 16 << 20
"""A buffer of a block is one task."""

_SETTINGS: dict[str, tuple[object, tuple[str, ...]]] = {
    "num_threads": (NUM_THREADS, ("KVIKIO_NTHREADS", "KVIKIO_NUM_THREADS")),
    "task_size": (TASK_BYTES, ("KVIKIO_TASK_SIZE",)),
    "auto_direct_io_read": (True, ("KVIKIO_AUTO_DIRECT_IO_READ",)),
}
"""Defaults to raise, and what in the environment decides instead."""

_KNOWN = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG)
"""Errors that a store tells apart; kvikio raises one kind, with the system's text."""


class KvikioIo:
    """An `IoEngine` through kvikio.

    Args:
        path: the file; made with mode 0600.
        num_bytes: its size from now on.

    Raises:
        ConfigError: kvikio is not there or does not work.
        OSError: the file cannot be opened or the disk has no room for it.
    """

    is_direct = False  # kvikio takes any buffer, and copies those that O_DIRECT does not

    def __init__(self, path: Path, num_bytes: int) -> None:
        kvikio = load_kvikio()
        self._file = PosixIo(path, num_bytes)
        try:
            self._path = path
            self._cufile = kvikio.CuFile(str(path), "r+")
            try:
                self._preflight(kvikio)
            except BaseException:
                self._cufile.close()
                raise
        except BaseException as error:
            self._file.close()
            if isinstance(error, RuntimeError):
                fix = f"kvikio does not work here ({_reason(error)}); use posix"
                raise ConfigError(OPTION, "kvikio", fix) from error
            raise

    def preadv(self, buffers: Sequence[memoryview], offset: int) -> int:
        left = max(0, os.fstat(self._cufile.fileno()).st_size - offset)
        wanted: list[memoryview] = []
        for buffer in buffers:
            part = buffer if buffer.nbytes <= left else buffer[:left]
            left -= part.nbytes
            if part.nbytes:
                wanted.append(part)
        return self._all(self._cufile.pread, wanted, offset)

    def pwritev(self, buffers: Sequence[memoryview], offset: int) -> None:
        self._all(self._cufile.pwrite, buffers, offset)

    def sync(self) -> None:
        self._file.sync()

    def close(self) -> None:
        self._cufile.close()
        self._file.close()

    def _all(self, begin: Callable[..., Any], buffers: Sequence[memoryview], offset: int) -> int:
        """Begin with all buffers and wait for each, also when one has failed: until then kvikio
        uses them, and does not keep them itself."""
        begun: list[Any] = []
        failure: RuntimeError | None = None
        try:
            for buffer in buffers:
                begun.append(begin(buffer, buffer.nbytes, offset))
                offset += buffer.nbytes
        except RuntimeError as error:
            failure = error
        total = 0
        for future in begun:
            try:
                total += future.get()
            except RuntimeError as error:
                failure = failure or error
        if failure is not None:
            raise _os_error(failure) from failure
        return total

    def _preflight(self, kvikio: Any) -> None:
        """Raise the defaults, read a page to see that it works, say what was chosen."""
        raise_defaults(kvikio)
        page = aligned(ALIGNMENT)
        if os.fstat(self._cufile.fileno()).st_size >= ALIGNMENT:
            self._cufile.pread(page, ALIGNMENT, 0).get()
        has_gds = bool(kvikio.cufile_driver.get("is_gds_available"))
        is_used = has_gds and not kvikio.defaults.is_compat_mode_preferred()
        logger.info(
            "%s: kvikio %s, %s threads, tasks of %s bytes, GPUDirect %s",
            self._path,
            kvikio.__version__,
            kvikio.defaults.get("num_threads"),
            kvikio.defaults.get("task_size"),
            "for device memory" if is_used else "not available",
        )


def load_kvikio() -> Any:
    """The package.

    Raises:
        ConfigError: it cannot be imported.
    """
    try:
        kvikio = importlib.import_module("kvikio")
        importlib.import_module("kvikio.defaults")
        importlib.import_module("kvikio.cufile_driver")
    except (ImportError, OSError, RuntimeError) as error:
        fix = (
            f"kvikio cannot be imported ({_reason(error)}); it needs CUDA: install kvikio-cu13 (or"
            " kvikio-cu12), or use posix"
        )
        raise ConfigError(OPTION, "kvikio", fix) from error
    return kvikio


def raise_defaults(kvikio: Any) -> None:
    """Set what the environment leaves open and this version knows."""
    for name, (value, variables) in _SETTINGS.items():
        if any(variable in os.environ for variable in variables):
            continue
        try:
            kvikio.defaults.set({name: value})
        except KeyError:
            logger.info("kvikio %s has no setting %s", kvikio.__version__, name)


def _os_error(error: RuntimeError) -> OSError:
    """The system's error in kvikio's text."""
    text = str(error)
    number = next((n for n in _KNOWN if os.strerror(n) in text), errno.EIO)
    return OSError(number, _reason(error))


def _reason(error: BaseException) -> str:
    """The first line of what it says."""
    return str(error).strip().partition("\n")[0]
