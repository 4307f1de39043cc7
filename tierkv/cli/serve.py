"""`tierkv serve [MODEL]`: an HTTP server that speaks OpenAI's API."""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tierkv.cli.options import (
    CommandError,
    Parser,
    add_config_flag,
    add_flags,
    read_options,
    split_options,
    take_model,
)
from tierkv.config import EngineConfig, option
from tierkv.errors import ConfigError

if TYPE_CHECKING:
    from tierkv.server.app import AppSettings

EXAMPLES = """\
examples:
  tierkv serve
  tierkv serve ./my-model --port 9000 --kv-cache-memory 2GiB
  tierkv serve --config configs/chat.yaml
"""


@dataclass(slots=True, kw_only=True)
class ServeOptions:
    """Options of the server; those of the engine are `EngineConfig`'s.

    Raises:
        ConfigError: a number out of range, or a chat template that is neither file nor template.
    """

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 for all of this machine")
    port: int = option(8000, "port to listen on; 0 takes a free one")
    served_model_name: list[str] | None = option(
        None, "name for clients instead of MODEL; may be given several times", metavar="NAME"
    )
    api_key: str | None = option(None, "clients must send it as a bearer token", metavar="KEY")
    chat_template: str | None = option(
        None, "Jinja template, or a file with one, instead of the tokenizer's", metavar="TEMPLATE"
    )
    max_waiting: int = option(1024, "sequences that may wait before requests are refused (429)")
    shutdown_timeout: int = option(10, "seconds that running requests get to finish at the end")
    log_requests: bool = option(False, "print a line for each request")

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65_535:
            raise ConfigError("port", self.port, "must be from 0 to 65535")
        for name in ("max_waiting", "shutdown_timeout"):
            if getattr(self, name) < 0:
                raise ConfigError(name, getattr(self, name), "must be at least 0")
        if self.chat_template is not None:
            self.chat_template = read_template(self.chat_template)


def read_template(value: str) -> str:
    """The template itself, or the content of the file that `value` names."""
    if "{" in value:
        return value
    try:
        return Path(value).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        fix = f"is no template, and as a file: {error.strerror}"
        raise ConfigError("chat_template", value, fix) from None


def make_parser() -> Parser:
    """The parser of `tierkv serve`."""
    parser = Parser(prog="tierkv serve", description=(__doc__ or "").strip(), epilog=EXAMPLES)
    parser.add_argument("MODEL", nargs="?", help="same as --model")
    add_config_flag(parser)
    add_flags(parser.add_argument_group("server"), ServeOptions)
    engine = parser.add_argument_group("engine")
    add_flags(engine, EngineConfig)
    add_tier_flags(engine)
    return parser


def add_tier_flags(engine: Any) -> None:
    """Other ways to say `--offload`, which is `auto` here: serving keeps what it computed.

    `--kv-offload` because vLLM's `--offload-*` flags are about weights.
    """
    engine.add_argument(
        "--kv-offload",
        dest="offload",
        metavar="TEXT",
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
    )
    engine.add_argument("--no-offload", action="store_true", help="serve from the pool alone")


def settings(options: ServeOptions, config: EngineConfig) -> AppSettings:
    """What the application needs of the options."""
    from tierkv.server.app import AppSettings

    return AppSettings(
        model_names=options.served_model_name or [config.model],
        api_key=options.api_key,
        chat_template=options.chat_template,
        max_sequences=config.max_num_seqs + options.max_waiting,
    )


def run(namespace: argparse.Namespace) -> int:
    """Serve until a signal; the status is 1 when the engine died."""
    values: dict[str, Any] = read_options(namespace, ServeOptions, EngineConfig)
    take_model(namespace, values)
    of_server, of_engine = split_options(values, ServeOptions)
    if namespace.no_offload:
        of_engine["offload"] = None
    else:
        of_engine.setdefault("offload", "auto")
    options, config = ServeOptions(**of_server), EngineConfig(**of_engine)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    try:
        from tierkv.server import run as runner
    except ModuleNotFoundError as error:
        fix = "install the server: pip install 'tierkv[server]'"
        raise CommandError(f"{error.name} is missing: {fix}") from None
    return serve(options, config, runner)


def serve(options: ServeOptions, config: EngineConfig, runner: Any) -> int:
    """Bind, load, serve, let go."""
    from tierkv.engine.async_llm import AsyncLLM
    from tierkv.server.app import make_app

    with runner.bind(options.host, options.port) as listener, runner.interrupted_by_sigterm():
        print(f"tierkv: loading {config.model}", flush=True)
        engine = AsyncLLM(config)
        try:
            app = make_app(engine, settings(options, config))
            is_alive = runner.serve(
                app,
                engine,
                listener,
                shutdown_timeout=options.shutdown_timeout,
                log_requests=options.log_requests,
                on_ready=lambda: print(ready_text(runner.url_of(listener), engine), flush=True),
            )
        finally:
            engine.shutdown()
    if not is_alive:
        raise CommandError("the engine process ended; see its messages above")
    return 0


def ready_text(url: str, engine: Any) -> str:
    """The lines that say what was opened, and that the server is up."""
    info = engine.info
    tokens = info.num_gpu_blocks * info.block_size
    ready = (
        f"tierkv: ready at {url} ({info.dtype} on {info.device},"
        f" {info.num_gpu_blocks:,} blocks of {info.block_size} = {tokens:,} tokens of KV)"
    )
    return "\n".join([*(f"tierkv: {line}" for line in info.tiers), ready])
