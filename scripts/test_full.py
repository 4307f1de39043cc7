"""Run every test and write `tests/full-summary.txt`: when, where, with what, and the outcome.

With arguments (for pytest) the summary is only printed: it would not be of every test.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUMMARY = ROOT / "tests" / "full-summary.txt"
DISTRIBUTIONS = ("tierkv", "torch", "transformers", "numpy", "fastapi", "openai", "pytest")


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "no commit"


def outcomes(report: Path) -> tuple[Counter[str], Counter[str], list[str]]:
    """Counts by outcome, tests by folder, and the names of those that failed."""
    counts: Counter[str] = Counter()
    folders: Counter[str] = Counter()
    bad = []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        kind = next(iter(sorted(kinds)), "passed")
        counts[kind] += 1
        parts = case.get("classname", "").split(".")
        folders[parts[1] if len(parts) > 2 else "(top)"] += 1
        if kind in ("failure", "error"):
            bad.append(f"{case.get('classname')}::{case.get('name')}")
    return counts, folders, bad


def summary(report: Path, seconds: float) -> str:
    counts, folders, bad = outcomes(report)
    now = datetime.datetime.now(datetime.UTC)
    versions = [f"{name} {importlib.metadata.version(name)}" for name in DISTRIBUTIONS]
    cores = len(os.sched_getaffinity(0))
    lines = [
        "The last run of `make test-full` (every test, also those marked `full`).",
        "",
        f"date      {now:%Y-%m-%d %H:%M} UTC",
        f"commit    {commit()}",
        f"machine   {processor()}, {cores} cores, {memory_gib():.0f} GiB, {platform.system()}",
        f"versions  Python {platform.python_version()}, {', '.join(versions)}",
        f"time      {seconds / 60:.1f} minutes",
        f"result    {', '.join(f'{n} {kind}' for kind, n in sorted(counts.items()))}",
        f"by room   {', '.join(f'{name} {n}' for name, n in sorted(folders.items()))}",
        *(f"FAILED    {name}" for name in bad),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadfile"]
        command += [f"--junitxml={report}", *sys.argv[1:]]
        start = time.monotonic()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        if not report.exists():
            return code
        text = summary(report, time.monotonic() - start)
    if len(sys.argv) == 1:
        SUMMARY.write_text(text, encoding="utf-8")
    print(text, end="")
    return code


if __name__ == "__main__":
    sys.exit(main())
