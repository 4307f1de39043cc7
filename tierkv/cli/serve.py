"""`tierkv serve [MODEL]`: an HTTP server that speaks OpenAI's API."""

from __future__ import annotations

import argparse
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tierkv import logs
from tierkv.cli.options import (
    CommandError,
    Parser,
    add_config_flag,
    add_flags,
    add_foreign_flags,
    read_options,
    split_options,
    take_model,
)
from tierkv.config import EngineConfig, check_choices, option
from tierkv.errors import ConfigError

if TYPE_CHECKING:
    from tierkv.server.app import AppSettings

KEY_VARIABLE = "TIERKV_API_KEY"
ADMIN_KEY_VARIABLE = "TIERKV_ADMIN_API_KEY"
LOG_LEVELS = ("critical", "error", "warning", "info", "debug", "trace")
CUT_OFF = 130  # as a program that a signal interrupted

announcer = logging.getLogger(logs.ANNOUNCER)

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
        None, "names for clients instead of MODEL", metavar="NAME", takes_several=True
    )
    api_key: str | None = option(
        None, f"clients must send it as a bearer token; also in ${KEY_VARIABLE}", metavar="KEY"
    )
    api_keys: str | None = option(
        None,
        "YAML file of further keys, and whose they are: see docs/kv-control.md",
        metavar="FILE",
    )
    admin_api_key: str | None = option(
        None,
        f"key for the endpoints that change the cache; also in ${ADMIN_KEY_VARIABLE}",
        metavar="KEY",
    )
    chat_template: str | None = option(
        None, "Jinja template, or a file with one, instead of the tokenizer's", metavar="TEMPLATE"
    )
    enable_auto_tool_choice: bool = option(False, "the model may call tools as it sees fit")
    tool_call_parser: str | None = option(
        None, "how the model writes tool calls", choices=("hermes", "pythonic")
    )
    max_waiting: int = option(1024, "sequences that may wait before requests are refused (503)")
    request_timeout: float | None = option(
        None, "seconds after which a request is aborted (504); default: never"
    )
    shutdown_timeout: int = option(10, "seconds that running requests get to finish at the end")
    log_requests: bool = option(False, "log a line for each request")
    log_format: str = option("text", "how log lines look", choices=logs.FORMATS)
    uvicorn_log_level: str = option("warning", "of the HTTP library", choices=LOG_LEVELS)
    otlp_traces_endpoint: str | None = option(
        None, "OpenTelemetry collector, as http://localhost:4318/v1/traces", metavar="URL"
    )

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65_535:
            raise ConfigError("port", self.port, "must be from 0 to 65535")
        for name in ("max_waiting", "shutdown_timeout"):
            if getattr(self, name) < 0:
                raise ConfigError(name, getattr(self, name), "must be at least 0")
        if self.request_timeout is not None and not self.request_timeout > 0:
            raise ConfigError("request_timeout", self.request_timeout, "must be above 0")
        if self.enable_auto_tool_choice and self.tool_call_parser is None:
            fix = "also needs --tool-call-parser: how the model writes calls"
            raise ConfigError("enable_auto_tool_choice", True, fix)
        check_choices(self)
        if self.chat_template is not None:
            self.chat_template = read_template(self.chat_template)


def read_template(value: str) -> str:
    """The template itself, or the content of the file that `value` names."""
    if "{" in value:
        return value
    try:
        return Path(value).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        fix = f"is no template, and as a file: {getattr(error, 'strerror', error)}"
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
    add_foreign_flags(parser)
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


def read(namespace: argparse.Namespace) -> tuple[ServeOptions, EngineConfig]:
    """The options of a command line and of its YAML file.

    Raises:
        ConfigError: an option is unknown or wrong.
    """
    values = read_options(namespace, ServeOptions, EngineConfig, knows_foreign=True)
    take_model(namespace, values)
    names = values.get("served_model_name") or []
    if len(names) > 1 and "model" not in values:
        fix = "takes all names that follow: give MODEL before it"
        raise ConfigError("served_model_name", " ".join(names), fix)
    of_server, of_engine = split_options(values, ServeOptions)
    if namespace.no_offload:
        of_engine["offload"] = None
    else:
        of_engine.setdefault("offload", "auto")
    if of_server.get("api_keys") is not None:
        of_engine.setdefault("scheduling_policy", "fair")
    return ServeOptions(**of_server), EngineConfig(**of_engine)


def settings(options: ServeOptions, config: EngineConfig) -> AppSettings:
    """What the application needs of the options."""
    from tierkv.server.app import AppSettings
    from tierkv.server.tenants import Callers, read_keys
    from tierkv.server.tracing import tracing_to

    endpoint = options.otlp_traces_endpoint
    api_key = options.api_key or os.environ.get(KEY_VARIABLE) or None
    admin_api_key = options.admin_api_key or os.environ.get(ADMIN_KEY_VARIABLE) or None
    tenants = read_keys(options.api_keys) if options.api_keys is not None else {}
    Callers(api_key, admin_api_key, tenants)  # what is wrong with them is said before loading
    return AppSettings(
        model_names=options.served_model_name or [config.model],
        api_key=api_key,
        admin_api_key=admin_api_key,
        tenants=tenants,
        chat_template=options.chat_template,
        max_sequences=config.max_num_seqs + options.max_waiting,
        request_timeout=options.request_timeout,
        enable_auto_tool_choice=options.enable_auto_tool_choice,
        tool_parser=options.tool_call_parser,
        log_requests=options.log_requests,
        tracing=tracing_to(endpoint) if endpoint is not None else None,
    )


def run(namespace: argparse.Namespace) -> int:
    """Serve until a signal; the status is 1 when the engine died."""
    options, config = read(namespace)
    logs.configure(options.log_format, server_level=options.uvicorn_log_level)
    try:
        from tierkv.server import run as runner
    except ModuleNotFoundError as error:
        fix = "install the server: pip install 'tierkv[server]'"
        raise CommandError(f"{error.name} is missing: {fix}") from None
    return serve(options, config, runner)


def serve(options: ServeOptions, config: EngineConfig, runner: Any) -> int:
    """Bind, load, serve, let go.

    Returns:
        The exit status: 0 after requests in flight were finished or aborted in time, 130 when a
        second signal cut them off.
    """
    from tierkv.engine.async_llm import AsyncLLM
    from tierkv.server.app import make_app

    app_settings = settings(options, config)
    with runner.bind(options.host, options.port) as listener, runner.interrupted_by_sigterm():
        announce(f"loading {config.model}")
        engine = AsyncLLM(config, log_format=options.log_format)
        try:
            ending = runner.serve(
                make_app(engine, app_settings),
                engine,
                listener,
                shutdown_timeout=options.shutdown_timeout,
                on_ready=lambda: announce(*ready_lines(runner.url_of(listener), engine)),
            )
        finally:
            engine.shutdown()
            if app_settings.tracing is not None:
                app_settings.tracing.close()
    if ending is runner.Ending.ENGINE_DIED:
        raise CommandError("the engine process ended; see its messages above")
    return 0 if ending is runner.Ending.DRAINED else CUT_OFF


def announce(*lines: str) -> None:
    """Tell whoever started the server."""
    for line in lines:
        announcer.info("%s", line)


def ready_lines(url: str, engine: Any) -> list[str]:
    """What was opened, and that the server is up."""
    info = engine.info
    tokens = info.num_gpu_blocks * info.block_size
    ready = (
        f"ready at {url} ({info.dtype} on {info.device},"
        f" {info.num_gpu_blocks:,} blocks of {info.block_size} = {tokens:,} tokens of KV)"
    )
    return [*info.tiers, ready]
