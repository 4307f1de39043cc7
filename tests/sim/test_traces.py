"""`read_trace`: every format, and what is told of lines that cannot be used."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tierkv.errors import ConfigError
from tierkv.sim.trace import TraceRequest
from tierkv.sim.trace_formats import ReadOptions
from tierkv.sim.trace_lines import Problem
from tierkv.sim.traces import read_trace

MOONCAKE = {"timestamp": 5, "input_length": 1100, "output_length": 7, "hash_ids": [4, 5, 9]}
RUNS = {
    **{"timestamp": 1500, "session_id": 7, "turn": 2, "input_length": 130, "output_length": 9},
    **{"block_size": 64, "stop": "tool_use", "sub": 0, "hash_runs": [[10, 2]]},
}
TEXT = {"timestamp": 0, "input": "abcd" * 40, "output": "four", "session_id": "s:1"}


def written(folder: Path, records: Iterable[object], name: str = "t.jsonl") -> Path:
    """A file with a line for each: text as it is, anything else as JSON."""
    lines = [each if isinstance(each, str) else json.dumps(each) for each in records]
    path = folder / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def read(path: Path, **options: Any) -> tuple[list[TraceRequest], list[Problem]]:
    problems: list[Problem] = []
    trace = read_trace(path, options=ReadOptions(**options), on_problem=problems.append)
    return list(trace), problems


# -- formats ---------------------------------------------------------------------------------------


def test_mooncake_drops_the_partial_block(tmp_path: Path) -> None:
    path = written(tmp_path, [MOONCAKE, MOONCAKE | {"timestamp": 1005, "hash_ids": ["a", -3, 9]}])
    (first, second), problems = read(path)
    assert first == TraceRequest(0.0, 1100, 7, ((4, 2),))
    assert second.arrival_s == 1.0 and second.num_blocks == 2 and not problems
    assert read_trace(path).block_size == 512
    assert all(0 <= block < 1 << 63 for block in second.block_ids())


def test_runs_and_their_extra_fields(tmp_path: Path) -> None:
    path = written(tmp_path, [RUNS, RUNS | {"stop": "end_turn", "tenant": "a", "priority": -1}])
    (first, second), _ = read(path)
    assert first == TraceRequest(1.5, 130, 9, ((10, 2),), "7", 2, "tool_call")
    assert (second.stop_reason, second.tenant, second.priority) == ("end", "a", -1)
    assert read_trace(path).block_size == 64


def test_a_timed_trace_of_vllm_is_known_by_its_blocks(tmp_path: Path) -> None:
    record = {"timestamp": 2.5, "input_length": 40, "output_length": 1, "hash_ids": [1, 2, 3]}
    path = written(tmp_path, [record, record | {"timestamp": 4}])
    (first, second), _ = read(path)
    assert first.runs == ((1, 2),) and second.arrival_s == 1.5
    assert read_trace(path).block_size == 16
    found, _ = read(path, format="vllm", time_unit="ms")
    assert found[1].arrival_s == pytest.approx(0.0015)
    says = written(tmp_path, [record | {"block_size": 16}, record | {"timestamp": 4}])
    assert read(says)[0][1].arrival_s == pytest.approx(0.0015)


def test_lengths_of_azure_share_nothing(tmp_path: Path) -> None:
    rows = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    rows += ["2023-11-16 18:15:46.6805900,374,44", "2023-11-16 18:15:50.9951690,396,109"]
    found, problems = read(written(tmp_path, rows, "azure.csv"))
    assert [(r.input_tokens, r.output_tokens, r.num_blocks) for r in found] == [
        (374, 44, 23),
        (396, 109, 24),
    ]
    assert found[1].arrival_s == pytest.approx(4.314579) and not problems
    assert len({block for r in found for block in r.block_ids()}) == 47


def test_lengths_may_share_system_prompts(tmp_path: Path) -> None:
    rows = ["Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"]
    rows += [f"{i},x,{100 + i},5,0,y" for i in range(50)]
    path = written(tmp_path, rows, "burst.csv")
    knobs: dict[str, Any] = {"shared_prefix_tokens": 70, "num_shared_prefixes": 3}
    found, _ = read(path, **knobs)
    heads = {r.block_ids()[:4][-1] for r in found}
    tails = [block for r in found for block in r.block_ids()[4:]]
    assert len(heads) == 3 and len(set(tails)) == len(tails) and not heads & set(tails)
    assert found == read(path, **knobs)[0]
    assert found != read(path, seed=1, **knobs)[0]


def test_text_has_equal_ids_as_far_as_it_is_equal(tmp_path: Path) -> None:
    longer = TEXT | {"timestamp": 2000, "input": str(TEXT["input"]) + "more" * 20}
    other = TEXT | {"timestamp": 2000, "input": "X" + str(TEXT["input"])[1:]}
    (a, b, c), _ = read(written(tmp_path, [TEXT, longer, other]))
    assert (a.input_tokens, a.output_tokens, a.session, a.num_blocks) == (40, 1, "s:1", 2)
    assert b.block_ids()[:2] == a.block_ids() and b.arrival_s == 2.0
    assert not set(c.block_ids()) & set(a.block_ids())


def test_messages_are_text(tmp_path: Path) -> None:
    messages: list[Any] = [{"role": "user", "content": "x" * 100}]
    again = [*messages, {"role": "assistant", "content": None, "tool_calls": [{"a": 1}]}]
    records = [{"timestamp": 0, "messages": m, "output": "yes"} for m in (messages, again)]
    (a, b), _ = read(written(tmp_path, records))
    assert a.block_ids() == b.block_ids()[:1] and b.input_tokens > a.input_tokens


def test_ids_of_contents_become_ids_of_prefixes(tmp_path: Path) -> None:
    records = [MOONCAKE | {"hash_ids": ids} for ids in ([1, 1], [2, 1], [1, 2])]
    found, problems = read(written(tmp_path, records), chain_ids=True)
    ids = [block for r in found for block in r.block_ids()]
    assert len(set(ids)) == 5 and found[0].block_ids()[0] == found[2].block_ids()[0]
    assert not problems
    _, problems = read(written(tmp_path, [MOONCAKE, *records[:1]]))
    assert "--chain-ids" in str(problems[0])


def test_gzip_limit_and_reading_again(tmp_path: Path) -> None:
    path = tmp_path / "day.jsonl.gz"
    lines = [json.dumps(RUNS | {"timestamp": i}) for i in range(10)]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    trace = read_trace(path, limit=3)
    assert trace.name == "day" and len(list(trace)) == len(list(trace)) == 3


# -- bad lines -------------------------------------------------------------------------------------

BAD: list[tuple[str, dict[str, Any] | str]] = [
    ("", '{"timestamp": 0, "input_length"'),
    ("", "[1, 2]"),
    ("", '{"hash_runs": ' + "[" * 100_000),
    ("input_length", RUNS | {"input_length": 0}),
    ("input_length", RUNS | {"input_length": "12"}),
    ("input_length", RUNS | {"input_length": True}),
    ("input_length", {k: v for k, v in RUNS.items() if k != "input_length"}),
    ("input_length", RUNS | {"input_length": 10**15}),
    ("output_length", RUNS | {"output_length": -4}),
    ("output_length", RUNS | {"output_length": 1.5}),
    ("timestamp", RUNS | {"timestamp": 3}),
    ("timestamp", RUNS | {"timestamp": float("nan")}),
    ("timestamp", RUNS | {"timestamp": -1}),
    ("timestamp", RUNS | {"timestamp": 10**400}),
    ("timestamp", RUNS | {"timestamp": "yesterday"}),
    ("block_size", RUNS | {"block_size": 16}),
    ("hash_runs", RUNS | {"hash_runs": [[10, 3]]}),
    ("hash_runs", RUNS | {"hash_runs": [[10, 0]]}),
    ("hash_runs", RUNS | {"hash_runs": [[2**63 - 1, 2]]}),
    ("hash_runs", RUNS | {"hash_runs": [10, 2]}),
    ("hash_runs", RUNS | {"hash_runs": "10"}),
    ("hash_ids", RUNS | {"hash_runs": [[3, 1], [10, 1]]}),
    ("turn", RUNS | {"turn": -1}),
    ("session_id", RUNS | {"session_id": [1]}),
    ("priority", RUNS | {"priority": "high"}),
]


@pytest.mark.parametrize(("field", "bad"), BAD)
def test_a_bad_line_is_named_and_skipped(tmp_path: Path, field: str, bad: object) -> None:
    path = written(tmp_path, [RUNS, "", bad, RUNS | {"timestamp": 1501}])
    found, (problem,) = read(path)
    assert [r.arrival_s for r in found] == [1.5, 1.501]
    assert (problem.path, problem.line, problem.field) == (str(path), 3, field)
    assert problem.fix and str(problem).startswith(f"{path}:3: ")


@pytest.mark.parametrize(
    "bad",
    [
        {"hash_ids": [4, 4, 9]},
        {"hash_ids": [4]},
        {"hash_ids": [4, 5, 6, 7]},
        {"hash_ids": [7, 4]},
        {"hash_ids": [[4], 5]},
        {"hash_ids": 4},
    ],
)
def test_bad_ids(tmp_path: Path, bad: dict[str, Any]) -> None:
    found, (problem,) = read(written(tmp_path, [MOONCAKE, MOONCAKE | bad]))
    assert len(found) == 1 and problem.field == "hash_ids"


def test_the_first_lines_may_be_bad(tmp_path: Path) -> None:
    found, problems = read(written(tmp_path, ["# a comment", '{"x": 1}', RUNS]))
    assert len(found) == 1 and [p.line for p in problems] == [1, 2]


def test_too_many_bad_lines_are_an_error(tmp_path: Path) -> None:
    path = written(tmp_path, [RUNS, *["{"] * 5, RUNS])
    told: list[Problem] = []
    with pytest.raises(ConfigError, match="over 3 bad lines; the last: line 5"):
        list(read_trace(path, most_problems=3, on_problem=told.append))
    assert len(told) == 4
    assert len(list(read_trace(path, most_problems=5, on_problem=told.append))) == 2


def test_nothing_but_bad_lines_is_an_error(tmp_path: Path) -> None:
    path = written(tmp_path, [RUNS | {"input_length": 0}])
    with pytest.raises(ConfigError, match="no usable request; 1 lines are bad"):
        list(read_trace(path, on_problem=lambda problem: None))


# -- bad files -------------------------------------------------------------------------------------

CONTENTS = {
    "is empty": b"",
    "is empty:": b"\n \n",
    "is no text": b"\x00\x01\x02\x03",
    "is Parquet": b"PAR1....",
    "is zstd": b"\x28\xb5\x2f\xfd....",
    "cut off or damaged": gzip.compress(b"x" * 100_000)[:60],
    "cut off or damaged ": b"\x1f\x8b garbage",
    "no line has a known format": b'{"x": 1}\n{"y": 2}\n',
    "no line has a known format; the first": b"\xff\xfe\xfd\n",
    "no line has a known format;": b"a,b,c\n1,2,3\n",
}


@pytest.mark.parametrize("words", CONTENTS)
def test_a_file_that_is_no_trace(tmp_path: Path, words: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(CONTENTS[words])
    with pytest.raises(ConfigError) as caught:
        read_trace(path)
    assert words.strip() in str(caught.value) and str(path) in str(caught.value)


def test_a_file_that_is_cut_off_later(tmp_path: Path) -> None:
    path = tmp_path / "t.gz"
    lines = "".join(json.dumps(RUNS | {"x": str(i) * 50}) + "\n" for i in range(3000))
    packed = gzip.compress(lines.encode())
    path.write_bytes(packed[: len(packed) // 2])
    trace = read_trace(path)
    with pytest.raises(ConfigError, match="cut off"):
        list(trace)


def test_no_file_or_a_directory(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_trace(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("format", "xml"),
        ("block_size", 0),
        ("time_unit", "h"),
        ("bytes_per_token", 0),
        ("shared_prefix_tokens", -1),
    ],
)
def test_bad_options_are_named(name: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        ReadOptions(**{name: value})  # type: ignore[arg-type]
    assert caught.value.option == name
