"""Machines that are not here: figures of devices, links and drives, one YAML file each.

`load_hardware("h200:tp=4,drives=8")` reads `configs/hardware/h200.yaml` and takes four of it. A
file of one's own is named by its path; `tierkv calibrate` writes one for the machine at hand, with
a table of what steps took there instead of a roofline.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tierkv.errors import ConfigError
from tierkv.strict_yaml import OnceLoader

PROFILES = Path(__file__).parent / "profiles"
_PARTS = ("links", "drives")
_OPTION = "hardware"


@dataclass(slots=True, frozen=True)
class Link:
    """Between GPU and CPU memory.

    Attributes:
        bandwidth: bytes per second one way.
        both: bytes per second of both ways together.
        latency_s: until the first byte.
    """

    bandwidth: float
    both: float
    latency_s: float


@dataclass(slots=True, frozen=True)
class Drive:
    """NVMe: bytes per second read and written, seconds of one access."""

    read: float
    write: float
    latency_s: float


@dataclass(slots=True, frozen=True)
class StepTable:
    """What steps took where they were measured, as a linear model.

        seconds = step_s + token_s * tokens + pair_s * pairs + row_s * rows

    with pairs = the sum over rows of tokens times their mean context.
    """

    step_s: float
    token_s: float
    pair_s: float
    row_s: float


@dataclass(slots=True, frozen=True)
class Hardware:
    """A machine.

    Attributes:
        name: as it was asked for.
        flops: of one device, dense, per second; bandwidth: of its memory, bytes per second;
            memory: bytes. 0 where a table replaces the roofline.
        interconnect: between devices, bytes per second each way.
        compute_efficiency, bandwidth_efficiency: what kernels reach of the former two.
        step_overhead_s: of each step beside the device's time.
        tp: devices that share one model.
        link: of each device; all of them are used at once.
        drive, drives: the NVMe tier.
        table: measured steps, if there are any; `measured_model` is whose they are.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float
    interconnect: float
    link: Link
    drive: Drive
    compute_efficiency: float = 0.55
    bandwidth_efficiency: float = 0.75
    step_overhead_s: float = 0.001
    tp: int = 1
    drives: int = 1
    table: StepTable | None = None
    measured_model: str = ""


def known_hardware() -> list[str]:
    """Names that `load_hardware` accepts beside paths."""
    return sorted(path.stem for path in PROFILES.glob("*.yaml") if path.stem not in _PARTS)


def load_hardware(spec: str) -> Hardware:
    """A machine by `name`, `path.yaml` or `name:tp=4,link=pcie4,drive=gen4,drives=8`.

    Raises:
        ConfigError: unknown name or setting, or a value that is none; says what exists.
    """
    name, _, rest = spec.partition(":")
    values = _read(name.strip(), spec) | _settings(rest, spec)
    for part, file, kind in (("link", "links", Link), ("drive", "drives", Drive)):
        values[part] = _part(values.get(part), file, kind, spec)
    if isinstance(values.get("table"), Mapping):
        values["table"] = _build(StepTable, values["table"], spec)
    hardware: Hardware = _build(Hardware, values | {"name": spec}, spec)
    if not 1 <= hardware.drives <= 8 or not 1 <= hardware.tp <= 8:
        raise ConfigError(_OPTION, spec, "tp and drives must be from 1 to 8")
    return hardware


def _read(name: str, spec: str) -> dict[str, Any]:
    path = Path(name) if name.endswith((".yaml", ".yml")) else PROFILES / f"{name}.yaml"
    if path.stem in _PARTS or not path.is_file():
        near = difflib.get_close_matches(name, known_hardware(), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        fix = f"{hint}choose one of {', '.join(known_hardware())}, or a YAML file"
        raise ConfigError(_OPTION, spec, fix)
    return _yaml(path, spec)


def _yaml(path: Path, spec: str) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), OnceLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(_OPTION, spec, f"{path.name} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(_OPTION, spec, f"{path.name} must map names to values")
    return values


def _settings(text: str, spec: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(_OPTION, spec, f"expected setting=value, got {part!r}")
        found[name.strip()] = value.strip()
    return found


def _part(value: Any, file: str, kind: type, spec: str) -> Any:
    """A link or drive: figures, or the name of some."""
    if isinstance(value, Mapping):
        return _build(kind, value, spec)
    known = _yaml(PROFILES / f"{file}.yaml", spec)
    if value not in known:
        one = file.removesuffix("s")
        raise ConfigError(_OPTION, spec, f"unknown {one} {value!r}: choose one of {list(known)}")
    return _build(kind, known[value], spec)


def _build(kind: type, values: Mapping[str, Any], spec: str) -> Any:
    """The dataclass from a mapping; numbers may be written as text."""
    fields = {f.name: str(f.type) for f in dataclasses.fields(kind)}
    for name in values:
        if name not in fields:
            near = difflib.get_close_matches(str(name), list(fields), n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(fields)}"
            raise ConfigError(_OPTION, spec, f"unknown setting {name!r}; {hint}")
    built = {name: _value(name, value, fields[name], spec) for name, value in values.items()}
    try:
        return kind(**built)
    except TypeError as error:
        raise ConfigError(_OPTION, spec, f"is incomplete: {error}") from None


def _value(name: str, value: Any, kind: str, spec: str) -> Any:
    if kind not in ("int", "float"):
        return value
    try:
        number = (int if kind == "int" else float)(value)
    except (TypeError, ValueError):
        raise ConfigError(_OPTION, spec, f"{name}={value!r} must be a number") from None
    if not number >= 0:
        raise ConfigError(_OPTION, spec, f"{name}={value!r} must not be negative")
    return number
