"""What a figure was measured on, and whether anyone else was using it meanwhile."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

_JIFFIES_PER_S = os.sysconf("SC_CLK_TCK")


def describe() -> dict[str, Any]:
    """The machine, the versions, the date and the command line of this run.

    No host name and no absolute path: results are for publishing.
    """
    command = [Path(sys.argv[0]).name, *sys.argv[1:]]
    return {
        "command": "python benchmarks/" + " ".join(_without_directory(word) for word in command),
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "transformers", "tierkv")},
    }


def _without_directory(word: str) -> str:
    return Path(word).name if word.startswith("/") else word


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def cpu_model() -> str:
    """The CPU as the system names it, with the vector extensions that matter to the kernels."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() or platform.machine()
    fields: dict[str, str] = {}
    for line in cpuinfo.read_text().splitlines():
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    flags = fields.get("flags", "").split()
    extensions = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    return f"{fields.get('model name', platform.machine())} ({' '.join(extensions)})"


def peak_memory_bytes() -> int:
    """The most memory this process ever had resident.

    Linux's `VmHWM`, because `ru_maxrss` of a child may begin with its parent's.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass(slots=True)
class Load:
    """CPU seconds used by all processes, and by this one, since `start`."""

    start_s: float
    all_s: float
    own_s: float

    @classmethod
    def now(cls) -> Load:
        return cls(time.perf_counter(), _all_cpu_s(), time.process_time())

    def others(self) -> float:
        """Cores that other processes used since `start`, on average."""
        elapsed = max(time.perf_counter() - self.start_s, 1e-3)
        own = time.process_time() - self.own_s
        return max(0.0, (_all_cpu_s() - self.all_s - own) / elapsed)


def _all_cpu_s() -> float:
    stat = Path("/proc/stat")
    if not stat.exists():
        return time.process_time()
    values = [int(v) for v in stat.read_text().splitlines()[0].split()[1:9]]
    return (sum(values) - values[3] - values[4]) / _JIFFIES_PER_S  # less idle and iowait


def wait_for_quiet(limit_s: float, cores: float = 0.2) -> None:
    """Return once other processes use fewer than `cores`, or after `limit_s` at the latest."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        load = Load.now()
        time.sleep(min(1.0, limit_s))
        if load.others() < cores:
            return
