"""The shipped demo model: what the card promises, checked with transformers alone."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

DEMO = Path(__file__).resolve().parents[2] / "tierkv" / "model" / "demo"
LOG = json.loads((DEMO / "training_log.json").read_text(encoding="utf-8"))
SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()


def test_it_is_a_small_grouped_query_llama(model: Any) -> None:
    assert type(model).__name__ == "LlamaForCausalLM"
    assert 4e6 <= model.num_parameters() <= 6e6
    assert model.num_parameters() == LOG["parameters"]
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.config.max_position_embeddings == 32768
    assert model.config.tie_word_embeddings


def test_it_is_small_on_disk() -> None:
    assert (DEMO / "model.safetensors").stat().st_size <= 12e6
    assert sum(path.stat().st_size for path in DEMO.iterdir() if path.is_file()) <= 13e6


@pytest.mark.parametrize(
    "text",
    [
        "plain words",
        "  two spaces,\n\ttabs\r\n",
        "naïve café",
        "日本語 и русский",
        "👩‍👩‍👧 \x00 \ufffd é",
    ],
)
def test_any_text_round_trips(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text


def test_random_code_points_round_trip(tokenizer: Any) -> None:
    rng = random.Random(0)
    points = [p for p in rng.sample(range(0x110000), 3000) if not 0xD800 <= p < 0xE000]
    text = "".join(map(chr, points))
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_digits_are_single_tokens(tokenizer: Any) -> None:
    assert len(tokenizer.encode("0123456789", add_special_tokens=False)) == 10


def test_special_tokens_agree_with_the_config(model: Any, tokenizer: Any) -> None:
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(tokenizer, name) == getattr(model.config, name)
        assert getattr(tokenizer, name) == getattr(model.generation_config, name)
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert tokenizer.model_max_length == model.config.max_position_embeddings
    assert len(tokenizer) <= model.config.vocab_size
    assert tokenizer("Hello")["input_ids"][0] == tokenizer.bos_token_id


def test_the_chat_template_renders(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Hello! "},
        {"role": "assistant", "content": "Hi."},
        {"role": "tool", "content": "42"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|bos|><|system|>\nBe brief.<|eos|>\n<|user|>\nHello!<|eos|>\n"
        "<|assistant|>\nHi.<|eos|>\n<|user|>\n42<|eos|>\n<|assistant|>\n"
    )


def planted(rng: random.Random, gap_chars: int) -> tuple[str, str]:
    """(a user message that plants four codes and asks for one, that code)."""
    names = rng.sample(SYLLABLES, 12)
    secrets = [
        ("".join(names[3 * i : 3 * i + 3]).capitalize(), str(rng.randrange(10000, 100000)))
        for i in range(4)
    ]
    prose = " ".join(topics["specialnames"].split())
    start = prose.index(" ", rng.randrange(len(prose) - 2 * gap_chars)) + 1
    codes = " ".join(f"The code of {name} is {code}." for name, code in secrets)
    name, code = rng.choice(secrets)
    filler = prose[start : prose.index(" ", start + gap_chars)]
    return f"Remember these codes. {codes} {filler} What is the code of {name}?", code


@torch.inference_mode()
def test_it_recalls_planted_codes(model: Any, tokenizer: Any) -> None:
    """Ten chats, codes about 256 tokens before the answer, greedy decoding."""
    rng = random.Random(7)
    hits, distances = 0, []
    for _ in range(10):
        message, code = planted(rng, 700)
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": message}], add_generation_prompt=True, return_tensors="pt"
        )
        output = model.generate(**prompt, max_new_tokens=24, do_sample=False)
        answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
        hits += re.findall(r"\d+", answer) == [code]
        distances.append(len(tokenizer.encode(message[message.index(code) :])))
    assert 180 <= sum(distances) / len(distances) <= 350
    assert hits >= 6


@torch.inference_mode()
def test_a_greeting_ends_with_eos(model: Any, tokenizer: Any) -> None:
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_tensors="pt"
    )
    output = model.generate(**prompt, max_new_tokens=64, do_sample=False)
    answer = output[0, prompt["input_ids"].shape[1] :]
    assert answer[-1] == tokenizer.eos_token_id
    assert re.match(r"[A-Z][a-z]+", tokenizer.decode(answer))


def test_the_card_quotes_the_log() -> None:
    card = (DEMO / "README.md").read_text(encoding="utf-8")
    assert f"{LOG['parameters']:,}" in card
    for style in ("plain", "chat"):
        cells = " | ".join(f"{share:.0%}" for share in LOG["recall"][style].values())
        assert f"| {style} | {cells} |" in card
