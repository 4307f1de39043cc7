"""Export and import: a session's blocks leave one engine and enter another."""

from __future__ import annotations

from typing import Any

import pytest
from kv_run import BLOCK, KvRun, prompt_of

from tierkv.cache.hashing import block_key, pack_tokens
from tierkv.errors import ConflictError, NotFoundError, RequestError

PROMPT = prompt_of(1, 9 * BLOCK + 2)
Record = tuple[bytes, bytes, bytes, bytes]


def export(run: KvRun, tenant: str = "", session: str = "s") -> tuple[str, list[Record]]:
    """All blocks of a session, as the front end would ask for them."""
    salt, keys = run.control.session_keys(tenant, session)
    records = []
    for key in keys:
        for _ in range(100):
            found = run.control.export_block(key)
            if found != []:
                break
            run.core.work_in_background()
        if found is None:
            break
        records.append((key, *found))
    return salt, records


def take_in(run: KvRun, salt: str, records: list[Record]) -> list[str]:
    answers = []
    for record in records:
        answer = "busy"
        for _ in range(200):
            answer = run.control.import_block(salt, *record)
            run.core.check()
            if answer != "busy":
                break
            run.core.work_in_background()
        answers.append(answer)
    return answers


SOURCES: list[dict[str, Any]] = [
    {},
    {"cpu_blocks": 60},
    {"nvme_blocks": 60},
    {"cpu_blocks": 20, "nvme_blocks": 60},
]
TARGETS: list[dict[str, Any]] = [
    {"num_blocks": 40},
    {"num_blocks": 16, "cpu_blocks": 60},
    {"num_blocks": 16, "nvme_blocks": 60},
    {"num_blocks": 16, "cpu_blocks": 6, "nvme_blocks": 60},
]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("target", TARGETS)
def test_a_session_moves_house(source: dict[str, Any], target: dict[str, Any]) -> None:
    old, new = KvRun(num_blocks=24, **source), KvRun(**target)
    old.ask(PROMPT, session_id="s")
    if source:
        old.ask(prompt_of(2, 20 * BLOCK))  # out of the pool
        assert old.held(PROMPT)["gpu"] < 9
    salt, records = export(old)
    assert len(records) == 9
    assert take_in(new, salt, records) == ["taken"] * 9
    new.settle()
    assert sum(new.held(PROMPT).values()) >= 9
    if "num_blocks" in target and len(target) > 1:
        assert new.held(PROMPT)["gpu"] == 0
    assert new.ask(PROMPT, tokens=6) >= 9 * BLOCK
    assert take_in(new, salt, records) == ["known"] * 9


def test_a_chain_longer_than_what_is_free_comes_in_while_others_run() -> None:
    old, new = KvRun(num_blocks=40), KvRun(num_blocks=12, cpu_blocks=60)
    prompt = prompt_of(77, 11 * BLOCK)
    old.ask(prompt, session_id="s")
    names = [new.add(prompt_of(i, 12), tokens=20) for i in range(4)]
    new.step()
    answers = []
    for record in export(old)[1]:
        while (answer := new.control.import_block("", *record)) == "busy":
            new.step()
        answers.append(answer)
        new.core.check()
    assert answers == ["taken"] * 11
    new.finish()
    assert all(len(new.got[name]) == 20 for name in names)
    new.settle()
    assert new.ask(prompt, tokens=2) >= 10 * BLOCK


def test_where_there_is_no_room_it_waits() -> None:
    old, new = KvRun(num_blocks=40), KvRun(num_blocks=8)
    old.ask(PROMPT, session_id="s")
    new.add(prompt_of(5, 6 * BLOCK), tokens=8)
    new.step()
    assert new.cache.num_available == 2
    salt, records = export(old)
    answers = [new.control.import_block(salt, *record) for record in records[:4]]
    assert answers[:2] == ["taken", "taken"]
    new.core.check()
    new.finish()


def test_a_block_whose_parent_is_gone_is_not_taken() -> None:
    old, new = KvRun(num_blocks=40), KvRun(num_blocks=40, cpu_blocks=40)
    old.ask(PROMPT, session_id="s")
    salt, records = export(old)
    assert new.control.import_block(salt, *records[3]) == "lost"
    assert new.control.import_block("other", *records[0]) == "lost"
    assert new.control.import_block(salt, *records[0]) == "taken"
    new.settle()
    assert len(new.cache.tree) == 1


def test_no_block_enters_under_a_wrong_key() -> None:
    old, new = KvRun(num_blocks=40), KvRun(num_blocks=40)
    old.ask(PROMPT, session_id="s")
    salt, ((key, parent, tokens, payload), *_) = export(old)
    other = pack_tokens([1, 2, 3, 4])
    for bad in (
        (bytes(16), parent, tokens, payload),
        (key, parent, other, payload),
        (key, bytes(16), tokens, payload),
        (key, parent, tokens[:-4], payload),
        (key, parent, tokens, payload[:-1]),
    ):
        with pytest.raises(RequestError):
            new.control.import_block(salt, *bad)
    planted = block_key(parent, other), parent, other, payload
    assert new.control.import_block(salt, *planted) == "taken", "right key, and a payload to trust"
    assert len(new.cache.tree) == 1


def test_what_cannot_be_exported_or_imported_says_why() -> None:
    run = KvRun(num_blocks=12)
    with pytest.raises(NotFoundError):
        run.control.session_keys("", "s")
    run.ask(PROMPT, session_id="s")
    salt, records = export(run)
    run.ask(prompt_of(3, 12 * BLOCK - 1))
    with pytest.raises(NotFoundError, match="nothing of it"):
        run.control.session_keys("", "s")
    assert run.control.export_block(records[0][0]) is None
    run.control.sleep()
    with pytest.raises(ConflictError, match="asleep"):
        run.control.import_block(salt, *records[0])
    plain = KvRun(num_blocks=12, enable_prefix_caching=False)
    with pytest.raises(ConflictError, match="prefix caching is off"):
        plain.control.import_block(salt, *records[0])


def test_where_part_of_it_is_gone_the_beginning_is_exported() -> None:
    run = KvRun(num_blocks=16)
    run.ask(PROMPT, session_id="s")
    run.ask(prompt_of(3, 10 * BLOCK))
    _, records = export(run)
    assert 0 < len(records) < 9
    new = KvRun(num_blocks=40)
    assert set(take_in(new, "", records)) == {"taken"}


def test_tenants_sessions_are_their_own_and_imports_count_for_them() -> None:
    old, new = KvRun(num_blocks=40), KvRun(num_blocks=40, cpu_blocks=40)
    for run in (old, new):
        run.set_tenants(a={"cpu": 20}, b={})
    old.ask(PROMPT, session_id="s", tenant="a")
    with pytest.raises(NotFoundError):
        export(old, "b")
    salt, records = export(old, "a")
    assert salt == "a"
    new.ask(prompt_of(2, BLOCK + 1), tenant="a")  # there is a root
    take_in(new, salt, records)
    new.settle()
    assert new.cache.shares["a"].counts[new.cache.lower.below_pool] == 10, (
        "nine, and one of the first request"
    )
    assert new.ask(PROMPT, tenant="b") == 0
    assert new.ask(PROMPT, tenant="a") > 0


def test_a_block_that_is_pinned_by_its_content_comes_back_pinned() -> None:
    run = KvRun(num_blocks=24, cpu_blocks=40, pin_budget=32 * 20)
    run.ask(PROMPT, session_id="s")
    run.settle()
    run.control.pin("", "", None, "s")
    salt, records = export(run)
    assert run.core.reset_prefix_cache()
    take_in(run, salt, records)
    run.settle()
    for number in range(10, 24):
        run.ask(prompt_of(number, 9 * BLOCK))
    assert run.held(PROMPT)["cpu"] == 9
