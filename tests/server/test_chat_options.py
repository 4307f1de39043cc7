"""What chat completions take of vLLM's, beyond sampling."""

from __future__ import annotations

import json
from typing import Any

from live_app import LiveApp

MESSAGES: Any = [{"role": "user", "content": "hello"}]


def chunks_of(app: LiveApp, path: str, fields: dict[str, Any]) -> list[dict[str, Any]]:
    lines = app.http.post(f"/v1/{path}", json={**fields, "stream": True}).text.splitlines()
    return [json.loads(line[len("data: ") :]) for line in lines if line.startswith("data: {")]


def test_counts_so_far_in_every_chunk(app: LiveApp) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    given = {"model": "tiny", "messages": MESSAGES, "max_tokens": 6, "ignore_eos": True}
    chunks = chunks_of(app, "chat/completions", {**given, "stream_options": options})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == 6
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {8}


def test_token_ids_come_with_the_text(app: LiveApp) -> None:
    greedy = {"model": "tiny", "temperature": 0, "max_tokens": 9, "return_token_ids": True}
    prompt = app.http.post("/tokenize", json={"messages": MESSAGES}).json()["tokens"]
    given: Any = {"messages": MESSAGES, **greedy}
    chat = app.post("chat/completions", **given).json()
    ids = chat["choices"][0]["token_ids"]
    assert (chat["prompt_token_ids"], len(ids)) == (prompt, chat["usage"]["completion_tokens"])
    chunks = chunks_of(app, "chat/completions", given)
    assert [chunk.get("prompt_token_ids") for chunk in chunks] == [prompt] + [None] * (
        len(chunks) - 1
    )
    assert [i for c in chunks for i in c["choices"][0].get("token_ids", ())] == ids
    given = {"prompt": [prompt, prompt], **greedy}
    for choice in app.post("completions", **given).json()["choices"]:
        assert (choice["prompt_token_ids"], choice["token_ids"]) == (prompt, ids)
    choices = [chunk["choices"][0] for chunk in chunks_of(app, "completions", given)]
    for index in (0, 1):
        mine = [choice for choice in choices if choice["index"] == index]
        assert [choice["prompt_token_ids"] for choice in mine if choice["prompt_token_ids"]] == [
            prompt
        ]
        assert [i for choice in mine for i in choice["token_ids"]] == ids


def test_the_last_message_is_continued(app: LiveApp) -> None:
    begun = [*MESSAGES, {"role": "assistant", "content": "well"}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    greedy = {"model": "tiny", "temperature": 0, "max_tokens": 6}
    reply = app.post("chat/completions", messages=begun, **greedy, **options).json()
    prompt = "<|user|>hello<|end|><|assistant|>well"
    expected = app.post("completions", prompt=prompt, **greedy).json()["choices"][0]["text"]
    assert reply["choices"][0]["message"]["content"] == expected
    refused = app.post("chat/completions", messages=begun, continue_final_message=True)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "continue_final_message"
