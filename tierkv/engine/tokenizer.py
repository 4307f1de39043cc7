"""The tokenizer of a model, behind the few calls that the front end needs."""

from __future__ import annotations

import logging
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from tierkv.errors import ConfigError, RequestError

logger = logging.getLogger(__name__)

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


class Tokenizer:
    """A Hugging Face tokenizer: text to ids, ids to text, chats to text.

    Encoding and decoding call the Rust tokenizer directly where there is one. It releases the
    GIL, and unlike transformers' wrapper it changes no shared state, so threads may share it.

    Attributes:
        hf: the transformers tokenizer.
        backend: its `tokenizers.Tokenizer`, None for tokenizers written in Python.
        special_ids: ids that `skip_special_tokens` leaves out of texts.
    """

    def __init__(self, hf: Any) -> None:
        self.hf = hf
        self.backend = hf.backend_tokenizer if getattr(hf, "is_fast", False) else None
        self.special_ids = frozenset(hf.all_special_ids)
        if self.backend is not None:
            # A tokenizer.json may carry the truncation and padding of its training.
            self.backend.no_truncation()
            self.backend.no_padding()
            added = hf.added_tokens_decoder.items()
            self.special_ids |= {token_id for token_id, token in added if token.special}
        self._token_texts: dict[int, str] = {}

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest entry of the vocabulary."""
        return max(map(len, self.hf.get_vocab()))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens such as BOS as the model's configuration says."""
        if self.backend is not None:
            ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        else:
            ids = list(self.hf.encode(text, add_special_tokens=add_special_tokens))
        return ids

    def decode(
        self,
        token_ids: list[int],
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        """Text of `token_ids`; bytes that are no UTF-8 become U+FFFD. Nothing is cleaned up."""
        if self.backend is not None:
            text: str = self.backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
            return text
        options = {"spaces_between_special_tokens": spaces_between_special_tokens}
        return str(
            self.hf.decode(
                token_ids,
                skip_special_tokens=skip_special_tokens,
                clean_up_tokenization_spaces=False,
                **options,
            )
        )

    def token_text(self, token_id: int) -> str:
        """Text of a token on its own, as shown beside log-probabilities."""
        text = self._token_texts.get(token_id)
        if text is None:
            text = self.decode([token_id], skip_special_tokens=False)
            self._token_texts[token_id] = text
        return text

    def chat_text(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        **template_options: Any,
    ) -> str:
        """The prompt of a conversation, by the tokenizer's chat template or the given one.

        Raises:
            RequestError: there is no template, or it refuses these messages.
        """
        if chat_template is None and not getattr(self.hf, "chat_template", None):
            fix = "this tokenizer has no chat template: pass chat_template, or give a prompt"
            raise RequestError("messages", messages, fix)
        try:
            return str(
                self.hf.apply_chat_template(
                    messages,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    chat_template=chat_template,
                    **template_options,
                )
            )
        except Exception as error:  # templates are programs: whatever they raise is about the input
            raise RequestError("messages", messages, f"the chat template fails: {error}") from error


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> Tokenizer | None:
    """The tokenizer of `demo`, a directory, or a hub id.

    A model directory without tokenizer files has none (None): such a model takes and gives
    token ids only.

    Raises:
        ConfigError: it cannot be loaded.
    """
    path = resolve_name(name)
    if Path(path).is_dir() and not any((Path(path) / file).exists() for file in _TOKENIZER_FILES):
        logger.warning(
            "%s holds no tokenizer: prompts must be token ids, outputs have no text", name
        )
        return None
    from transformers import AutoTokenizer

    try:
        hf = AutoTokenizer.from_pretrained(
            path, revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # each tokenizer class fails in its own way
        raise ConfigError("tokenizer", name, f"cannot be loaded: {error}") from error
    return Tokenizer(hf)


def resolve_name(name: str) -> str:
    """The directory of the built-in `demo` model; any other name as it is."""
    if name == "demo" and not Path(name).is_dir():
        return str(resources.files("tierkv") / "model" / "demo")
    return name
