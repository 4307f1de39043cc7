"""Prompts and conversations in the forms that users give them."""

from __future__ import annotations

from typing import Any

import pytest

from tierkv.engine.inputs import parse_conversations, parse_prompts
from tierkv.errors import RequestError


@pytest.mark.parametrize(
    "prompts",
    [b"abc", [b"abc"], [True, False], {"prompt_token_ids": "abc"}, {"prompt_token_ids": b"abc"}],
)
def test_what_only_looks_like_token_ids_is_refused(prompts: Any) -> None:
    with pytest.raises(RequestError):
        parse_prompts(prompts)


def test_text_parts_become_lines() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    message = {"role": "user", "content": parts, "name": "ann"}
    expected = {"role": "user", "content": "one\ntwo", "name": "ann"}
    assert parse_conversations([message]) == [[expected]]
    assert parse_conversations([[message], [message]]) == [[expected], [expected]]
    assert message["content"] is parts


@pytest.mark.parametrize("part", [{"type": "image_url", "image_url": {"url": "x"}}, {"text": 5}, 7])
def test_other_parts_are_refused(part: Any) -> None:
    with pytest.raises(RequestError, match="only parts") as caught:
        parse_conversations([{"role": "user", "content": [part]}])
    assert caught.value.field == "messages"
