"""Incremental text equals decoding everything at once, for each kind of tokenizer."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    Tokenizer as Backend,
)
from tokenizers import (
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from tierkv.engine.detokenizer import (
    ByteDetokenizer,
    Detokenizer,
    StopStrings,
    WindowDetokenizer,
    is_byte_level,
    make_detokenizer,
)
from tierkv.engine.sampling_params import SamplingParams
from tierkv.engine.tokenizer import Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps.",
    "def main() -> None:\n    print('hello, world')  # comment\n",
    "naïve café, Straße, señor; 你好世界 и здравствуй 🙂🙃",
] * 3
TEXTS = [
    "hello world",
    "  two  spaces and a tab\t.",
    "emoji 👩‍👩‍👧‍👦 and 🇩🇪 flags 🙂",
    "中文，没有 空格。",
    "combining e\u0301 and zalgo t\u0335\u0321",
    "\u202eright to left\u202c مرحبا",
    "null \x00 and \ufffd itself",
    "",
]


@cache
def byte_level() -> Tokenizer:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=alphabet,
        special_tokens=["<|end|>", "<|a b|>"],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens(["added token", "日本"])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>"))


@cache
def sentencepiece_like() -> Tokenizer:
    """As Llama 2's: a space becomes U+2581, unknown characters become bytes."""
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))],
        limit_alphabet=60,
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS[:2], trainer)
    # Byte tokens are ordinary tokens of the model, not special ones.
    plain = Backend.from_str(backend.to_str().replace('"special":true', '"special":false'))
    plain.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>"))


@cache
def metaspace() -> Tokenizer:
    backend = Backend(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "</s>"], show_progress=False
    )
    backend.train_from_iterator([*CORPUS, *TEXTS], trainer)
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))


@cache
def word_piece() -> Tokenizer:
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[UNK]", "[SEP]"], show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[SEP]"))


KINDS = [byte_level, sentencepiece_like, metaspace, word_piece]


def pieces(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    return [*map(detokenizer.push, ids), detokenizer.flush()]


def detokenizer_of(tokenizer: Tokenizer, prompt: list[int], skip: bool = True) -> Detokenizer:
    return make_detokenizer(tokenizer, SamplingParams(skip_special_tokens=skip), prompt)


def test_each_kind_gets_its_detokenizer() -> None:
    assert [is_byte_level(kind()) for kind in KINDS] == [True, False, False, False]
    assert isinstance(detokenizer_of(byte_level(), []), ByteDetokenizer)
    assert isinstance(detokenizer_of(metaspace(), []), WindowDetokenizer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_concatenate_to_the_text(kind: type, text: str) -> None:
    tokenizer = kind()
    ids = tokenizer.encode(text)
    assert "".join(pieces(detokenizer_of(tokenizer, []), ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", [byte_level, sentencepiece_like])
@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40), cut=st.integers(0, 60))
def test_any_text_after_any_prompt(kind: type, text: str, cut: int) -> None:
    """Random Unicode; no piece ever shows half a character or is taken back."""
    tokenizer = kind()
    ids = tokenizer.encode(text)
    prompt, output = ids[:cut], ids[cut:]
    whole, before = tokenizer.decode(ids), tokenizer.decode(prompt)
    found = pieces(detokenizer_of(tokenizer, prompt), output)
    if whole.startswith(before) and not before.endswith("\ufffd"):
        assert before + "".join(found) == whole
        assert "\ufffd" not in "".join(found) or "\ufffd" in text
    else:  # the prompt ends within a character
        assert "".join(found).lstrip("\ufffd") in whole


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 404), max_size=60), st.booleans())
def test_random_ids_of_a_byte_level_tokenizer(ids: list[int], skip: bool) -> None:
    """Invalid UTF-8, special and added tokens, ids beyond the vocabulary: exactly as decoded."""
    tokenizer = byte_level()
    found = "".join(pieces(detokenizer_of(tokenizer, [5, 6], skip), ids))
    assert found == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", [sentencepiece_like, metaspace, word_piece])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_ids_of_the_other_kinds(kind: type, data: st.DataObject) -> None:
    tokenizer = kind()
    size = tokenizer.backend.get_vocab_size()
    # Byte tokens in any order are no text: a decoder looks at the whole run of them.
    words = [i for i in range(size) if not tokenizer.backend.id_to_token(i).startswith("<0x")]
    ids = data.draw(st.lists(st.sampled_from(words), max_size=40))
    skip = data.draw(st.booleans())
    found = "".join(pieces(detokenizer_of(tokenizer, [], skip), ids))
    assert found == tokenizer.decode(ids, skip_special_tokens=skip)


def test_a_generated_word_keeps_its_leading_space() -> None:
    tokenizer = sentencepiece_like()
    prompt, output = tokenizer.encode("The quick"), tokenizer.encode("brown fox")
    assert tokenizer.decode(output) == "brown fox"
    found = "".join(pieces(detokenizer_of(tokenizer, prompt), output))
    assert found == " brown fox"


@pytest.mark.parametrize("kind", [byte_level, sentencepiece_like])
def test_characters_appear_whole_and_at_once(kind: type) -> None:
    tokenizer = kind()
    text = "\U0001f9ff\u4e16\u00e9"  # 4, 3 and 2 bytes, none of them a token of its own
    ids = tokenizer.encode(f"a{text}b")
    found = pieces(detokenizer_of(tokenizer, []), ids)
    assert "".join(found).strip() == f"a{text}b"
    for char in text:
        assert any(char in piece for piece in found)
    assert sum(bool(piece) for piece in found) >= 5  # each as soon as it is complete


def test_an_unfinished_character_is_flushed_as_replacement() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("\U0001f9ff")[:-1]
    assert pieces(detokenizer_of(tokenizer, []), ids) == [""] * len(ids) + ["\ufffd"]


@pytest.mark.parametrize("pattern", ["<0xFF>", "<0xE2>", "</s>", "<unk>", "no such token"])
def test_the_window_stays_small_whatever_comes(pattern: str) -> None:
    """Endless bytes that never make a character, tokens without text: O(1) per token."""
    tokenizer = sentencepiece_like()
    detokenizer = WindowDetokenizer(tokenizer, [], skip_special_tokens=pattern != "<unk>")
    token_id = tokenizer.backend.token_to_id(pattern)
    token_id = 10**6 if token_id is None else token_id  # has no text
    for _ in range(200):
        detokenizer.push(token_id)
        assert len(detokenizer._ids) <= 16
    world = tokenizer.encode("the dog")
    assert "".join(pieces(detokenizer, world)).endswith("the dog")


def test_the_prompt_may_end_within_a_character() -> None:
    for kind in (byte_level, sentencepiece_like):
        tokenizer = kind()
        ids = tokenizer.encode("x\U0001f9ff y")
        cut = next(i for i in range(len(ids)) if tokenizer.decode(ids[:i]).endswith("\ufffd"))
        found = "".join(pieces(detokenizer_of(tokenizer, ids[:cut]), ids[cut:]))
        assert found.endswith(" y") and "x" not in found


# -- stop strings --------------------------------------------------------------------------------


def run_stops(
    texts: list[str], stops: list[str], *, include: bool = False, armed_from: int = 0
) -> tuple[list[str], str | None]:
    checker, out = StopStrings(stops, include=include), []
    for i, text in enumerate(texts):
        piece, stop = checker.push(text, is_armed=i >= armed_from)
        out.append(piece)
        if stop is not None:
            return out, stop
    return [*out, checker.flush()], None


def test_text_that_may_become_a_stop_string_is_held_back() -> None:
    out, stop = run_stops(["ab", "c", "#", "x", "#", "#", "#", "y"], ["###"])
    assert out == ["ab", "c", "", "#x", "", "", ""]
    assert stop == "###"


def test_the_stop_string_may_be_kept() -> None:
    assert run_stops(["one E", "ND two"], ["END"], include=True) == (["one ", "END"], "END")
    assert run_stops(["one E", "ND two"], ["END"]) == (["one ", ""], "END")


def test_held_text_is_flushed_when_nothing_comes_of_it() -> None:
    assert run_stops(["so far\nUs"], ["\nUser:"]) == (["so far", "\nUs"], None)


def test_of_several_stop_strings_the_first_to_end_wins() -> None:
    assert run_stops(["xxabcd"], ["bcd", "ab"]) == (["xx"], "ab")
    assert run_stops(["xxabcd"], ["bc", "abc"]) == (["xx"], "abc")


def test_no_stop_string_ends_before_min_tokens() -> None:
    assert run_stops(["a.", "b", "c.", "d"], ["."], armed_from=2) == (["a.", "b", "c"], ".")
    # Held back as the beginning of another stop string, it still does not count.
    assert run_stops(["a", "a", "c"], ["aa", "aab"], armed_from=2) == (["", "", "aac", ""], None)
    # It may begin before, and end after.
    assert run_stops(["a", "a", "a", "b"], ["aa"], armed_from=2) == (["", "a", ""], "aa")


short = st.text(alphabet="ab.", min_size=1, max_size=4)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(alphabet="ab.", max_size=3)), st.lists(short, min_size=1, max_size=3))
def test_the_result_does_not_depend_on_the_cuts(texts: list[str], stops: list[str]) -> None:
    """Against a search over the whole text; and nothing certain is ever taken back."""
    whole = "".join(texts)
    ends = [(whole.find(s) + len(s), whole.find(s), s) for s in stops if s in whole]
    out, stop = run_stops(texts, stops)
    if ends:
        _, start, expected = min(ends)
        assert (("".join(out)), stop) == (whole[:start], expected)
    else:
        assert ("".join(out), stop) == (whole, None)
