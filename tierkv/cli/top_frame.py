"""One frame of `tierkv top`: what the event stream of a server said last, as lines of text."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

KINDS = ("in_use", "cached", "filling", "draining", "empty")
WORDS = {"in_use": "in use"}
SIGNS = dict(zip(KINDS, "█▒▓░·", strict=True))
PLAIN_SIGNS = dict(zip(KINDS, "#=+-.", strict=True))
SPARKS, PLAIN_SPARKS = "▁▂▃▄▅▆▇█", "_.-=+*#"
HUES = {"gpu": "38;5;209", "cpu": "38;5;79", "nvme": "38;5;111"}
KIND_HUES = {"filling": "38;5;221", "draining": "38;5;140", "empty": "2"}
PHASE_HUES = {
    "decode": HUES["gpu"],
    "prefill": KIND_HUES["filling"],
    "loading": HUES["nvme"],
    "swapping": KIND_HUES["draining"],
    "swapped": KIND_HUES["draining"],
    "preempted": KIND_HUES["draining"],
}
MOST_SPARKS = 24

Event = dict[str, Any]


@dataclass(slots=True)
class Style:
    """How frames look.

    Attributes:
        columns, lines: of the terminal; no line is longer.
        has_color: ANSI colours may be used.
        is_plain: only ASCII may be used.
    """

    columns: int = 100
    lines: int = 40
    has_color: bool = False
    is_plain: bool = False

    def paint(self, text: str, code: str) -> str:
        """The text in a colour, where there are colours."""
        return f"\x1b[{code}m{text}\x1b[0m" if self.has_color and code else text

    def dim(self, text: str) -> str:
        return self.paint(text, "2")

    def bold(self, text: str) -> str:
        return self.paint(text, "1")

    @property
    def signs(self) -> dict[str, str]:
        return PLAIN_SIGNS if self.is_plain else SIGNS


@dataclass(slots=True)
class Screen:
    """What is known of the server so far.

    Attributes:
        hello: the stream's first event.
        snapshot: its last one.
        generated: tokens per second of late, for a sparkline.
        trouble: why nothing new comes.
    """

    hello: Event = field(default_factory=dict)
    snapshot: Event = field(default_factory=dict)
    generated: deque[float] = field(default_factory=lambda: deque(maxlen=MOST_SPARKS))
    trouble: str = ""

    def take(self, event: Event) -> None:
        """Take in one event of the stream."""
        if event["type"] == "hello":
            self.hello, self.trouble = event, ""
        elif event["type"] == "snapshot":
            self.snapshot = event
            if (speed := self.sample()["generated"]) is not None:
                self.generated.append(speed)
        elif event["type"] == "end":
            self.trouble = event["reason"]

    def sample(self) -> dict[str, Any]:
        """Speeds and shares at the last snapshot."""
        return dict(zip(self.hello["sample"], self.snapshot["sample"], strict=True))

    def rows(self) -> list[dict[str, Any]]:
        """Sequences, first those that run."""
        names = self.hello["row"]
        return [dict(zip(names, row, strict=True)) for row in self.snapshot["rows"]]


def frame(screen: Screen, style: Style) -> list[str]:
    """The lines of one frame."""
    if not screen.snapshot:
        return [style.bold("tierkv"), screen.trouble or "waiting for the server"]
    lines = [head(screen, style), "", speeds(screen, style), ""]
    lines += tiers_lines(screen, style)
    lines += ["", columns_line(style)]
    room = max(3, style.lines - len(lines) - 1)
    rows = screen.rows()
    lines += [row_line(row, style) for row in rows[:room]]
    if not rows:
        lines.append(style.dim("no requests yet"))
    return [fit(line, style.columns) for line in lines]


def head(screen: Screen, style: Style) -> str:
    hello = screen.hello
    facts = (
        f"{hello['dtype']} on {hello['device']}, blocks of {hello['block_size']} tokens, "
        f"v{hello['version']}"
    )
    state = screen.trouble or time.strftime("%H:%M:%S")
    left = f"tierkv {hello['model']}  {facts}"[: style.columns - len(state) - 1]
    gap = " " * (style.columns - len(left) - len(state))
    name = f"tierkv {hello['model']}"
    return style.bold(left[: len(name)]) + style.dim(left[len(name) :]) + gap + style.dim(state)


def speeds(screen: Screen, style: Style) -> str:
    """Tokens per second, hits, sequences; less of it on a narrow terminal."""
    for with_tiers in (True, False):
        line = "   ".join(speed_pieces(screen, style, with_tiers=with_tiers))
        room = style.columns - len(strip(line))
        if room >= 0:
            break
    if room < 12:
        return line
    return f"{line}   {style.dim(sparkline(screen.generated, room - 3, style))}"


def speed_pieces(screen: Screen, style: Style, *, with_tiers: bool) -> list[str]:
    sample, snapshot = screen.sample(), screen.snapshot
    hits, found = [sample[name] for name in ("hit_gpu", "hit_cpu", "hit_nvme")], "-"
    if None not in hits:
        parts = ", ".join(f"{n} {s:.0%}" for n, s in zip(HUES, hits, strict=True) if s)
        found = f"{sum(hits):.0%}" + (f" ({parts})" if parts and with_tiers else "")
    return [
        f"generated {style.bold(speed_text(sample['generated']))} tok/s",
        f"prompt {style.bold(speed_text(sample['prompt']))} tok/s",
        f"from cache {style.bold(found)}",
        f"running {style.bold(str(snapshot['running']))}",
        f"queued {style.bold(str(sample['queued']))}",
    ]


def sparkline(values: deque[float], room: int, style: Style) -> str:
    """The last values as columns of a chart one line high."""
    shown = list(values)[-room:]
    signs = PLAIN_SPARKS if style.is_plain else SPARKS
    top = max([*shown, 1.0])
    return "".join(signs[min(len(signs) - 1, int(v / top * len(signs)))] for v in shown)


def tiers_lines(screen: Screen, style: Style) -> list[str]:
    """Each tier's bar and counts, and below it where its blocks go."""
    tiers = screen.snapshot["tiers"]
    counts = {tier["name"]: counts_text(tier) for tier in tiers}
    width = max(map(len, counts))
    room = style.columns - width - 9
    bar_width = max(10, min(60, room - max(map(len, counts.values()))))
    lines = []
    for tier in tiers:
        name = tier["name"]
        full = f"{(tier['capacity'] - tier['empty']) / tier['capacity']:4.0%}"
        label = style.paint(name.ljust(width), f"1;{HUES[name]}")
        text = style.dim(clip(counts[name], room - bar_width))
        lines.append(f"{label}  {bar(tier, bar_width, style)} {full}  {text}")
        links = [link for link in screen.snapshot["links"] if link["source"] == name]
        if links:
            flows = "   ".join(flow_text(link, style) for link in links)
            lines.append(" " * (width + 2) + flows)
    return lines


def counts_text(tier: Event) -> str:
    shown = [kind for kind in KINDS if tier[kind] or kind == "cached"]
    return ", ".join(f"{tier[kind]:,} {WORDS.get(kind, kind)}" for kind in shown)


def bar(tier: Event, width: int, style: Style) -> str:
    return "".join(
        style.paint(style.signs[kind] * cells, KIND_HUES.get(kind, HUES[tier["name"]]))
        for kind, cells in shares([tier[kind] for kind in KINDS], width).items()
    )


def flow_text(link: Event, style: Style) -> str:
    speed, arrow = link["bytes_per_s"], "->" if style.is_plain else "→"
    text = f"{arrow} {link['destination']} {bytes_text(speed)}/s"
    return style.paint(text, HUES[link["source"]]) if speed else style.dim(text)


def shares(counts: list[int], width: int) -> dict[str, int]:
    """Columns for each kind; together they are `width`."""
    total = max(1, sum(counts))
    edges = [round(sum(counts[: i + 1]) / total * width) for i in range(len(counts))]
    return {kind: edges[i] - (edges[i - 1] if i else 0) for i, kind in enumerate(KINDS)}


def columns_line(style: Style) -> str:
    return style.dim(f"{'state':10} {'request':26} {'tokens':>15} {'age':>7}  blocks")


def row_line(row: dict[str, Any], style: Style) -> str:
    name = row["request"].rpartition("/")[0] or row["request"]
    grown = f" + {row['generated_tokens']:,}" if row["generated_tokens"] else ""
    tokens = f"{row['prompt_tokens']:,}{grown}"
    state = style.paint(f"{row['state']:10}", PHASE_HUES.get(row["state"], "2"))
    places = [f"{row[tier]:,} {tier}" for tier in HUES if row[tier]]
    missing = row["blocks"] - sum(row[tier] for tier in HUES)
    if missing > 0:
        places.append(f"{missing:,} to compute")
    rest = f" {clip(name, 26):26} {tokens:>15} {age_text(row['age_s']):>7}  {', '.join(places)}"
    return state + clip(rest, style.columns - 10).rstrip()


def clip(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"


def fit(line: str, width: int) -> str:
    """The line; what is too long for a narrow terminal loses its end and its colours."""
    return line if len(strip(line)) <= width else clip(strip(line), width)


def strip(text: str) -> str:
    """The text without colours."""
    parts = text.split("\x1b[")
    return parts[0] + "".join(part.partition("m")[2] for part in parts[1:])


def speed_text(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if 0 < value < 100 else f"{value:,.0f}"


def bytes_text(value: float) -> str:
    """Decimal units, as speeds are given."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def age_text(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.0f} h"
