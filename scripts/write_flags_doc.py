"""Write docs/flags.md from the option classes and the tables of other servers' flags.

python scripts/write_flags_doc.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

from tierkv.cli import foreign
from tierkv.cli.options import flag_name, value_kinds
from tierkv.cli.serve import ServeOptions
from tierkv.config import EngineConfig

TARGET = Path(__file__).resolve().parent.parent / "docs" / "flags.md"
INTRODUCTION = """\
# Flags of `tierkv serve`

Written by `scripts/write_flags_doc.py`; a test compares.

Every option is one thing under three names: a flag (`--max-model-len`, underscores are accepted as
well), a key of the YAML file that `--config` names (`max-model-len` or `max_model_len`), and, for
the engine's, a keyword of `LLM(...)` and `AsyncLLM.from_options(...)` (`max_model_len`). Flags win
over the file. A bool has `--no-...` too. Options have vLLM's names where they mean what they mean
there; `MODEL` is given first, as there.

What is unknown is an error that names the nearest option. A flag of another server that this one
does not have is an error that says what to use instead, in YAML as well; it is never ignored.
"""
NOTES = """
`--disable-log-requests` and `--enable-log-requests` are other names of `--no-log-requests` and
`--log-requests`, `--disable-cuda-graph` is another of `--enforce-eager`,
`--disable-overlap-schedule` of `--no-async-scheduling`. Keys may be in the
environment instead, as `TIERKV_API_KEY` and `TIERKV_ADMIN_API_KEY`. `--offload`, below, is `auto`
in `tierkv serve` and off in Python; `--no-offload` serves from the pool alone.
"""
TAKEN = """\
## Taken from other servers

What they ask for is so here anyway, and nothing changes.

"""


def table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [heads, ("---",) * len(heads), *rows]
    return "".join(
        "| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n" for line in lines
    )


def options_of(owner: type) -> str:
    """The options that are fields of a class."""
    kinds = value_kinds(owner)
    rows = []
    for field in dataclasses.fields(owner):
        shown = field.default
        default = (
            ""
            if shown is None
            else f"`{str(shown).lower() if bool in kinds[field.name] else shown}`"
        )
        text = field.metadata["help"]
        if choices := field.metadata.get("choices"):
            text += ": " + ", ".join(f"`{choice}`" for choice in choices)
        flags = (flag_name(field.name), *field.metadata.get("aliases", ()))
        rows.append((", ".join(f"`{flag}`" for flag in flags), default, text))
    return table(("flag", "default", ""), rows)


def flags(key: str) -> str:
    """`--a,--b` as code."""
    return ", ".join(f"`{flag}`" for flag in key.split(","))


def accepted() -> str:
    """Other servers' flags that are taken."""
    rows = [
        (flags(key), ", ".join(f"`{value}`" for value in values) or "switch")
        for key, values in foreign.SAME_HERE.items()
    ]
    return table(("flag", "with"), rows)


def advice(entries: Mapping[str, str]) -> str:
    """Other servers' flags that are answered."""
    return table(("flag", "instead"), [(flags(key), text) for key, text in entries.items()])


def document() -> str:
    """All of docs/flags.md."""
    sections = [
        INTRODUCTION,
        f"## Server\n\n{options_of(ServeOptions)}{NOTES}",
        f"## Engine\n\n{options_of(EngineConfig)}",
        TAKEN + accepted(),
        "## Answered for other servers",
        *(f"### {owner}\n\n{advice(entries)}" for owner, entries in foreign.TABLES.items()),
    ]
    return "\n".join(f"{section.rstrip()}\n" for section in sections)


if __name__ == "__main__":
    TARGET.write_text(document(), encoding="utf-8")
