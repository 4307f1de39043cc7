"""What is written is read back."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierkv.errors import ConfigError
from tierkv.sim.generate import generate_trace
from tierkv.sim.trace import Run, Trace, TraceRequest
from tierkv.sim.trace_writer import as_lines, write_trace
from tierkv.sim.traces import read_trace

SIZE = 16
WORDS = st.text(max_size=8)


@st.composite
def traces(draw: st.DrawFn) -> list[TraceRequest]:
    """Requests in order of time, whose ids name prefixes."""
    ids = itertools.count(draw(st.integers(0, 2**62)), step=1000)
    requests: list[TraceRequest] = []
    now_us = 0
    for _ in range(draw(st.integers(1, 8))):
        now_us += draw(st.integers(0, 10**9))
        runs = draw(st.sampled_from(requests)).runs if requests and draw(st.booleans()) else ()
        runs: tuple[Run, ...] = (*runs, (next(ids), draw(st.integers(1, 900))))
        rest = draw(st.integers(0, SIZE - 1))
        request = TraceRequest(
            now_us / 1e6,
            sum(count for _, count in runs) * SIZE + rest,
            draw(st.integers(1, 10**6)),
            runs,
            session=draw(WORDS),
            turn=draw(st.integers(0, 10**6)),
            stop_reason=draw(st.sampled_from(["", "end", "tool_call"])),
            tenant=draw(WORDS),
            priority=draw(st.integers(-(10**6), 10**6)),
        )
        requests.append(request)
    return requests


@settings(max_examples=60, deadline=None)
@given(requests=traces())
def test_round_trip(requests: list[TraceRequest], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("written") / "t.jsonl.gz"
    assert write_trace(Trace("t", SIZE, lambda: iter(requests)), path) == len(requests)
    found = read_trace(path, most_problems=0)
    assert found.block_size == SIZE
    for got, expected in zip(found, requests, strict=True):
        assert got.arrival_s == pytest.approx(expected.arrival_s, abs=1e-9)
        got.arrival_s = expected.arrival_s
        assert got == expected


@pytest.mark.parametrize("workload", ["chat", "agents", "rag", "coding"])
def test_generated_traces_are_read_without_a_problem(workload: str, tmp_path: Path) -> None:
    trace = generate_trace(workload, num_requests=300, branch_share=0.2)
    path = tmp_path / "t.jsonl"
    write_trace(trace, path)
    first = path.read_bytes()
    read = read_trace(path, most_problems=0)
    assert list(as_lines(read, read.block_size)) == first.decode().splitlines(keepends=True)


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    def broken() -> list[TraceRequest]:
        raise ConfigError("trace", "x", "breaks off")

    path = tmp_path / "t.jsonl"
    path.write_text("before")
    with pytest.raises(ConfigError, match="breaks off"):
        write_trace(Trace("t", SIZE, lambda: iter(broken())), path)
    assert path.read_text() == "before" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ConfigError, match="cannot be written"):
        write_trace(generate_trace("rag", num_requests=1), tmp_path / "no" / "t.jsonl")


def test_the_same_bytes_each_time(tmp_path: Path) -> None:
    for name in ("a.gz", "b.gz"):
        write_trace(generate_trace("chat", num_requests=20), tmp_path / name)
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()
