"""`tierkv chat [MODEL]`: talk with a model in the terminal.

/reset forgets the conversation, /quit (or Ctrl-D) ends; Ctrl-C ends an answer, not the program.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tierkv.cli.options import (
    Parser,
    add_config_flag,
    add_flags,
    read_options,
    split_options,
    take_model,
)
from tierkv.cli.sampling import SamplingOptions
from tierkv.cli.terminal import load, stream_text
from tierkv.config import EngineConfig, option
from tierkv.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from tierkv.engine.llm import LLM
    from tierkv.engine.sampling_params import SamplingParams

PROMPT = "> "
HELP = "/reset forgets the conversation, /quit or Ctrl-D ends, Ctrl-C ends an answer"


@dataclass(slots=True, kw_only=True)
class ChatOptions:
    """Options of the conversation."""

    system: str | None = option(None, "instructions that open the conversation")


class Conversation:
    """The messages so far, and the model that answers them.

    Raises:
        ConfigError: the model has no tokenizer.
    """

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None) -> None:
        from tierkv.engine.tokenizer import Tokenizer

        hf = llm.get_tokenizer()
        if hf is None:
            raise ConfigError("model", llm.info.model, "has no tokenizer to chat with")
        self._llm, self._params, self._tokenizer = llm, params, Tokenizer(hf)
        self._opening = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, Any]] = []
        self.reset()

    def reset(self) -> None:
        """Start anew."""
        self.messages = list(self._opening)

    def answer(self, text: str) -> None:
        """Say `text` and print the answer; both become part of the conversation.

        Raises:
            RequestError: the conversation cannot be answered; `text` is not part of it then.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self._tokenizer.chat_text(messages)
        token_ids = self._tokenizer.encode(prompt, add_special_tokens=False)
        answer, _ = stream_text(self._llm, {"prompt_token_ids": token_ids}, self._params)
        print()
        self.messages = [*messages, {"role": "assistant", "content": answer}]


def make_parser() -> Parser:
    """The parser of `tierkv chat`."""
    parser = Parser(prog="tierkv chat", description=(__doc__ or "").strip())
    parser.add_argument("MODEL", nargs="?", help="same as --model")
    add_config_flag(parser)
    add_flags(parser.add_argument_group("conversation"), ChatOptions)
    add_flags(parser.add_argument_group("sampling"), SamplingOptions)
    add_flags(parser.add_argument_group("engine"), EngineConfig)
    return parser


def run(namespace: argparse.Namespace) -> int:
    """Talk until the user ends it."""
    values = read_options(namespace, ChatOptions, SamplingOptions, EngineConfig)
    take_model(namespace, values)
    of_chat, rest = split_options(values, ChatOptions)
    of_sampling, of_engine = split_options(rest, SamplingOptions)
    params = SamplingOptions(**of_sampling).params()
    config = EngineConfig(**of_engine)  # what is wrong is said before anything is loaded
    with load(**of_engine) as llm:
        conversation = Conversation(llm, params, ChatOptions(**of_chat).system)
        print(f"{config.model}: {HELP}")
        talk(conversation)
    return 0


def talk(conversation: Conversation) -> None:
    """Read lines and answer them."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  (gives `input` a history and line editing)
    while (line := read_line()) is not None:
        if line == "/reset":
            conversation.reset()
        elif line.startswith("/"):
            print(f"unknown command {line}: {HELP}")
        elif line:
            try:
                conversation.answer(line)
            except RequestError as error:
                print(f"error: {error}")


def read_line() -> str | None:
    """What the user typed, None at the end; Ctrl-C drops the line."""
    while True:
        try:
            line = input(PROMPT).strip()
        except KeyboardInterrupt:
            print(f"\n{HELP}")
            continue
        except EOFError:
            print()
            return None
        return None if line == "/quit" else line
