"""A recording: what it tells, what it does not, and that it is bounded."""

from __future__ import annotations

from typing import Any

import pytest
from kv_run import BLOCK, KvRun, prompt_of

from tierkv.engine.recording import ID_BYTES, PATIENCE_S, Recorder
from tierkv.errors import ConflictError, NotFoundError

PROMPT = prompt_of(1, 5 * BLOCK + 1)


def recorder_of(run: KvRun) -> Recorder:
    found: Recorder = run.control.calls["kv_record_start"].__self__  # type: ignore[attr-defined]
    return found


def taken(run: KvRun, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = run.control.calls["kv_record_take"](name)["records"]
    return found


def started(run: KvRun) -> str:
    return str(run.control.calls["kv_record_start"]()["recording"])


def ids_of(record: dict[str, Any]) -> list[bytes]:
    blocks: bytes = record["blocks"]
    return [blocks[i : i + ID_BYTES] for i in range(0, len(blocks), ID_BYTES)]


def test_lengths_blocks_and_hints_are_told() -> None:
    run = KvRun(num_blocks=60)
    run.ask(PROMPT)  # before it begins
    name = started(run)
    run.pass_time(5)
    run.ask(PROMPT, tokens=6, session_id="s", turn="tool_call", tenant="t", salt="")
    run.ask([*PROMPT, *prompt_of(2, 8)], session_id="s", tenant="t", salt="")
    run.ask(PROMPT[: BLOCK - 1])
    first, second, short = taken(run, name)
    assert (first["input_tokens"], first["output_tokens"]) == (len(PROMPT), 6)
    assert first["arrival_s"] == 5 and first["stop"] == "tool_call" and not first["aborted"]
    assert (first["turn"], second["turn"]) == (1, 2)
    assert len(ids_of(first)) == 5 and len(ids_of(second)) == 7
    assert ids_of(second)[:5] == ids_of(first) and ids_of(short) == []
    assert first["session"] == second["session"] and first["tenant"] == second["tenant"]
    assert short["session"] == short["tenant"] == ""
    assert taken(run, name) == []


def test_nothing_can_be_recognised() -> None:
    run = KvRun(num_blocks=60)
    records = []
    for _ in range(2):
        name = started(run)
        run.ask(PROMPT, session_id="s", tenant="t", salt="")
        records += taken(run, name)
        run.control.calls["kv_record_stop"](name)
    first, second = records
    assert not set(ids_of(first)) & set(ids_of(second))
    assert first["session"] != second["session"] and first["tenant"] != second["tenant"]
    keys = run.control.sessions.find("t", "s")
    assert keys is not None and not {key[:ID_BYTES] for key in keys.keys} & set(ids_of(first))
    assert not any(isinstance(value, list) for value in first.values())


def test_salts_keep_blocks_apart() -> None:
    run = KvRun(num_blocks=60)
    name = started(run)
    run.ask(PROMPT, salt="a")
    run.ask(PROMPT, salt="b")
    first, second = taken(run, name)
    assert not set(ids_of(first)) & set(ids_of(second))


def test_what_runs_holds_back_the_time() -> None:
    run = KvRun(num_blocks=60)
    before = run.add(prompt_of(3, 6), tokens=3)
    run.pass_time(1)
    name = started(run)
    run.pass_time(2)
    run.add(PROMPT, tokens=30)
    run.pass_time(2)
    run.add(prompt_of(4, 6), tokens=1)
    while not (found := run.control.calls["kv_record_take"](name))["records"]:
        run.step()
    assert [r["arrival_s"] for r in found["records"]] == [4]
    assert found["until_s"] == 2 and found["running"] == 1
    run.finish()
    found = run.control.calls["kv_record_take"](name)
    assert [r["arrival_s"] for r in found["records"]] == [2]
    assert found["until_s"] >= 4 and found["running"] == 0 and run.got[before]


def test_an_aborted_request_has_what_it_generated() -> None:
    run = KvRun(num_blocks=60)
    name = started(run)
    request = run.add(PROMPT, tokens=30)
    run.core.abort([request])
    (record,) = taken(run, name)
    assert record["aborted"] and record["output_tokens"] == 1 and len(ids_of(record)) == 5


def test_what_finds_no_room_is_counted() -> None:
    run = KvRun(num_blocks=60)
    core = run.core
    recorder = Recorder(core.cache, core.scheduler, run.clock, most_bytes=2000)
    name = recorder.start()["recording"]
    for number in range(5):
        run.ask(prompt_of(number, 9))
    found = recorder.take(name)
    assert len(found["records"]) == 3 and found["dropped"] == 2
    run.ask(PROMPT)
    found = recorder.take(name)
    assert len(found["records"]) == 1 and found["dropped"] == 2


def test_there_is_one_at_a_time_and_each_ends() -> None:
    run = KvRun(num_blocks=60)
    first = started(run)
    with pytest.raises(ConflictError, match="is going on"):
        started(run)
    run.control.calls["kv_record_stop"](first)
    second = started(run)
    for call in ("take", "stop"):
        with pytest.raises(NotFoundError, match="is over"):
            run.control.calls[f"kv_record_{call}"](first)
    assert second != first and run.core.scheduler.timeline.on_end is not None


def test_one_that_nobody_takes_from_ends() -> None:
    run = KvRun(num_blocks=60)
    name = started(run)
    run.ask(PROMPT)
    run.pass_time(PATIENCE_S + 1)
    run.ask(PROMPT)
    assert not recorder_of(run).is_on and run.core.scheduler.timeline.on_end is None
    with pytest.raises(NotFoundError):
        taken(run, name)
    third = started(run)
    run.pass_time(PATIENCE_S + 1)
    assert started(run) != third
