"""`tierkv generate [PROMPT]`: complete one prompt and print the text as it comes.

The prompt is continued as it is, without a chat template; without PROMPT it is read from standard
input.
"""

from __future__ import annotations

import argparse
import sys

from tierkv.cli.options import (
    CommandError,
    Parser,
    add_config_flag,
    add_flags,
    read_options,
    split_options,
)
from tierkv.cli.sampling import SamplingOptions
from tierkv.cli.terminal import load, stream_text
from tierkv.config import EngineConfig

EXAMPLES = """\
examples:
  tierkv generate "Once upon a time" --max-tokens 64
  cat letter.txt | tierkv generate --model ./my-model --temperature 0
"""
INTERRUPTED = 130


def make_parser() -> Parser:
    """The parser of `tierkv generate`."""
    parser = Parser(prog="tierkv generate", description=(__doc__ or "").strip(), epilog=EXAMPLES)
    parser.add_argument("PROMPT", nargs="?", help="text to continue")
    add_config_flag(parser)
    add_flags(parser.add_argument_group("sampling"), SamplingOptions)
    add_flags(parser.add_argument_group("engine"), EngineConfig)
    return parser


def run(namespace: argparse.Namespace) -> int:
    """Print the completion."""
    values = read_options(namespace, SamplingOptions, EngineConfig)
    of_sampling, of_engine = split_options(values, SamplingOptions)
    params = SamplingOptions(**of_sampling).params()
    EngineConfig(**of_engine)  # what is wrong is said before anything is loaded
    prompt = read_prompt(namespace.PROMPT)
    with load(**of_engine) as llm:
        _, is_interrupted = stream_text(llm, prompt, params)
    print()
    return INTERRUPTED if is_interrupted else 0


def read_prompt(given: str | None) -> str:
    """The prompt given, or standard input."""
    if given is not None:
        return given
    if sys.stdin.isatty():
        raise CommandError("give a PROMPT, or pipe one in")
    return sys.stdin.read()
