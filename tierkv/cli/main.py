"""`tierkv COMMAND ...`: find the command, run it, turn errors into messages."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from tierkv import __version__
from tierkv.cli.options import USAGE_ERROR, CommandError, Parser, explain
from tierkv.errors import ConfigError, EngineDeadError, RequestError

COMMANDS = {
    "serve": "serve a model over HTTP (OpenAI's API)",
    "generate": "complete one prompt, streaming to the terminal",
    "chat": "talk with a model in the terminal",
    "kv": "look at and steer the KV cache of a running server",
    "top": "watch a server's tiers and requests in the terminal",
    "plan": "how much KV cache a model needs, and what fits where",
    "simulate": "replay a trace in virtual time: policies, tiers, hardware that is not here",
    "advise": "which configuration to run for a trace, and why",
    "calibrate": "measure this machine, for simulate and advise",
    "trace": "look at, convert, generate and record traces of requests",
    "store": "look at, check, repair or delete NVMe stores",
}
FAILURE = 1
INTERRUPTED = 130


def overview() -> Parser:
    """The parser of `tierkv` itself; each command has its own."""
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:{width}}  {text}" for name, text in COMMANDS.items())
    parser = Parser(
        prog="tierkv",
        usage="tierkv COMMAND [options]",
        description="Serve language models whose KV cache outgrows the GPU.",
        epilog=f"commands:\n{listing}\n\n`tierkv COMMAND --help` shows a command's options.",
    )
    parser.add_argument("--version", action="version", version=f"tierkv {__version__}")
    return parser


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit status."""
    parser = overview()
    if not arguments:
        parser.print_help()
        return USAGE_ERROR
    name, *rest = arguments
    if name.startswith("-"):
        _, extras = parser.parse_known_args(list(arguments))
        parser.refuse(extras)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, list(COMMANDS), n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(COMMANDS)}"
        parser.error(f"unknown command {name!r}; {hint}")
    command = importlib.import_module(f"tierkv.cli.{name}")
    command_parser: Parser = command.make_parser()
    namespace, extras = command_parser.parse_known_args(rest)
    if extras:
        command_parser.refuse(extras)
    status: int = command.run(namespace)
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console script.

    Exit status: 0 done, 1 failed, 2 bad command line or configuration, 130 interrupted.
    """
    try:
        return run(sys.argv[1:] if arguments is None else arguments)
    except ConfigError as error:
        return fail(explain(error), USAGE_ERROR)
    except (RequestError, CommandError, EngineDeadError) as error:
        return fail(str(error), FAILURE)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away; keep the interpreter from flushing into it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE


def fail(message: str, status: int) -> int:
    """Print an error and return the exit status."""
    print(f"tierkv: error: {message}", file=sys.stderr)
    return status
