"""Token ids to text as they come: never half a character, never text that changes later.

Two detokenisers, both O(1) per token:

* `ByteDetokenizer` for byte-level BPE (GPT-2, Llama 3, Qwen, OPT, ...): a token is a byte string,
  and an incremental UTF-8 decoder holds back the bytes of an unfinished character.
* `WindowDetokenizer` for every other kind (SentencePiece, WordPiece, ...): decodes a window of the
  last few tokens with and without the new ones; the difference is the new text (the prefix-offset
  method of text-generation-inference and vLLM). The tokens before it decide about leading spaces.

The pieces of a `ByteDetokenizer` concatenate to `decode` of the generated tokens, those of a
`WindowDetokenizer` to what `decode` adds to the prompt's text.
"""

from __future__ import annotations

import codecs
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

from tierkv.engine.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tierkv.engine.sampling_params import SamplingParams

_CONTEXT_TOKENS = 6  # of the prompt's end: enough to decide about a space before the next word
_MAX_HELD_TOKENS = 8  # no character has more bytes in tokens: what is held then is not UTF-8
_REPLACEMENT = "\ufffd"


class Detokenizer(Protocol):
    """Turns one sequence's tokens into pieces of text."""

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; may be empty."""
        ...

    def flush(self) -> str:
        """What was held back, once no more tokens come."""
        ...


def make_detokenizer(
    tokenizer: Tokenizer, params: SamplingParams, prompt_token_ids: list[int]
) -> Detokenizer:
    """The detokeniser for this kind of tokenizer, placed after the prompt."""
    if is_byte_level(tokenizer):
        return ByteDetokenizer(tokenizer, skip_special_tokens=params.skip_special_tokens)
    return WindowDetokenizer(
        tokenizer,
        prompt_token_ids,
        skip_special_tokens=params.skip_special_tokens,
        spaces_between_special_tokens=params.spaces_between_special_tokens,
    )


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether each token is a byte string, and a text their concatenation."""
    from tokenizers.decoders import ByteLevel

    return tokenizer.backend is not None and isinstance(tokenizer.backend.decoder, ByteLevel)


@lru_cache(maxsize=1)
def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, other bytes for U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return table | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """Bytes of a token of a byte-level tokenizer; none for ids it does not know."""
    assert tokenizer.backend is not None
    token = tokenizer.backend.id_to_token(token_id)
    table = _byte_of_char()
    if token is None:
        return b""
    if all(char in table for char in token):
        return bytes(table[char] for char in token)
    return str(token).encode()  # an added token outside the byte alphabet stands for itself


class ByteDetokenizer:
    """Detokeniser of byte-level tokenizers."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        return self._decoder.decode(token_bytes(self._tokenizer, token_id))

    def flush(self) -> str:
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


class WindowDetokenizer:
    """Detokeniser of all other tokenizers: `_ids[:_num_shown]` is the context of the rest."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: list[int],
        *,
        skip_special_tokens: bool,
        spaces_between_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._spaces = spaces_between_special_tokens
        self._ids = [t for t in prompt_token_ids if t not in self._skipped][-_CONTEXT_TOKENS:]
        self._num_shown = len(self._ids)
        self._shown = self._decode(self._ids)
        if self._shown.endswith(_REPLACEMENT):  # the prompt ends within a character
            self._ids, self._num_shown, self._shown = [], 0, ""

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        is_full = len(self._ids) - self._num_shown >= _MAX_HELD_TOKENS
        if text.endswith(_REPLACEMENT) and not is_full:
            return ""
        piece = text[len(self._shown) :]
        if piece or is_full:
            self._shift()
        return piece

    def flush(self) -> str:
        piece = self._decode(self._ids)[len(self._shown) :]
        self._shift()
        return piece

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(
            token_ids,
            skip_special_tokens=False,  # left out before they get here
            spaces_between_special_tokens=self._spaces,
        )

    def _shift(self) -> None:
        """What was just shown becomes the context of what follows."""
        self._ids = self._ids[self._num_shown :]
        self._num_shown = len(self._ids)
        self._shown = self._decode(self._ids)


class StopStrings:
    """Finds stop strings in a stream of pieces, and holds back what may become one.

    The string whose end comes first wins, of several the longest, so the result does not depend
    on where the pieces are cut.

    Args:
        stops: the stop strings; may be empty.
        include: whether the text keeps the stop string that ended it.
    """

    def __init__(self, stops: list[str], *, include: bool) -> None:
        self._stops = stops
        self._include = include
        self._longest = max((len(stop) for stop in stops), default=0)
        self._held = ""
        self._num_exempt = 0  # leading characters of `_held` in which no stop string may end

    def push(self, piece: str, *, is_armed: bool) -> tuple[str, str | None]:
        """Text that is certain now, and the stop string that ended it.

        Args:
            piece: the next text.
            is_armed: False while `min_tokens` forbids to stop.
        """
        if not self._stops:
            return piece, None
        text = self._held + piece
        if is_armed and (found := self._find(text)):
            start, stop = found
            self._held = ""
            return text[: start + len(stop) if self._include else start], stop
        num_held = self._num_held(text)
        certain = text[: len(text) - num_held]
        self._num_exempt = max(0, self._num_exempt - len(certain)) if is_armed else num_held
        self._held = text[len(certain) :]
        return certain, None

    def flush(self) -> str:
        """What was held back, when the sequence ended without a stop string."""
        text, self._held = self._held, ""
        return text

    def _find(self, text: str) -> tuple[int, str] | None:
        """Start and text of the stop string that ends first (of several, the longest)."""
        found = []
        for stop in self._stops:
            start = text.find(stop, max(0, self._num_exempt - len(stop) + 1))
            if start >= 0:
                found.append((start + len(stop), start, stop))
        return min(found)[1:] if found else None

    def _num_held(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string may begin with."""
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[-size:]
            if any(len(stop) > size and stop.startswith(tail) for stop in self._stops):
                return size
        return 0
