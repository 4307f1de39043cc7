"""What chat completions take of vLLM's, beyond sampling."""

from __future__ import annotations

import json
from typing import Any

from live_app import LiveApp

MESSAGES: Any = [{"role": "user", "content": "hello"}]


def test_counts_so_far_in_every_chunk(app: LiveApp) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    given = {"model": "tiny", "messages": MESSAGES, "max_tokens": 6, "ignore_eos": True}
    body = {**given, "stream": True, "stream_options": options}
    lines = app.http.post("/v1/chat/completions", json=body).text.splitlines()
    chunks = [json.loads(line[len("data: ") :]) for line in lines if line.startswith("data: {")]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == 6
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {8}


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
