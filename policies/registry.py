"""Policies by name: `lru`, or `name:key=value,...`; third-party ones through entry points.

A package adds its own policy by the entry-point group `tierkv.policies` with an entry named
`<kind>.<name>` (kinds: `eviction`, `admission`, `order`, `victim`) that points at a class or
factory.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

ENTRY_POINT_GROUP = "tierkv.policies"

_BUILT_IN: dict[str, dict[str, str]] = {
    "eviction": {
        "lru": "tierkv.policies.lru:LruPolicy",
        "fifo": "tierkv.policies.fifo:FifoPolicy",
        "lfu": "tierkv.policies.lfu:LfuPolicy",
        "sieve": "tierkv.policies.sieve:SievePolicy",
        "s3fifo": "tierkv.policies.s3fifo:S3FifoPolicy",
        "arc": "tierkv.policies.arc:ArcPolicy",
        "tinylfu": "tierkv.policies.tinylfu:TinyLfuPolicy",
        "gdsf": "tierkv.policies.gdsf:GdsfPolicy",
        "reuse": "tierkv.policies.reuse:ReusePolicy",
        "session-protect": "tierkv.policies.session_protect:SessionProtectPolicy",
        "workload-aware": "tierkv.policies.workload_aware:WorkloadAwarePolicy",
        "retention": "tierkv.policies.retention:RetentionPolicy",
        "belady": "tierkv.policies.belady:BeladyPolicy",
    },
    "admission": {
        "write-through": "tierkv.policies.admission:WriteThrough",
        "prompt-only": "tierkv.policies.admission:PromptOnly",
        "write-back": "tierkv.policies.admission:WriteBack",
        "second-hit": "tierkv.policies.admission:SecondHit",
    },
    "load": {
        "load": "tierkv.policies.load:AlwaysLoad",
        "recompute": "tierkv.policies.load:AlwaysRecompute",
        "split": "tierkv.policies.load:Split",
        "auto": "tierkv.policies.load:Auto",
    },
    "preemption": {
        "recompute": "tierkv.policies.preemption:Recompute",
        "swap": "tierkv.policies.preemption:Swap",
        "auto": "tierkv.policies.preemption:Auto",
    },
    "order": {
        "fcfs": "tierkv.policies.order:FcfsOrder",
        "priority": "tierkv.policies.order:PriorityOrder",
        "lpm": "tierkv.policies.order:LongestPrefixOrder",
        "fair": "tierkv.policies.fair:FairOrder",
    },
    "victim": {
        "latest": "tierkv.policies.victim:LatestVictim",
        "priority": "tierkv.policies.victim:PriorityVictim",
        "largest": "tierkv.policies.victim:LargestVictim",
        "cheapest": "tierkv.policies.victim:CheapestVictim",
    },
}


def known(kind: str) -> list[str]:
    """Names that `create(kind, ...)` accepts, built-in ones first."""
    return [*_BUILT_IN[kind], *sorted(set(_third_party(kind)) - set(_BUILT_IN[kind]))]


def create(kind: str, spec: str, **given: Any) -> Any:
    """Make the policy that `spec` names; its code is imported only now.

    Args:
        kind: `eviction`, `admission`, `order` or `victim`.
        spec: `name` or `name:key=value,key=value`; values are integers, floats or words.
        given: parameters that no spec can write, such as the future of `belady`.

    Raises:
        ValueError: unknown name or parameters that the policy does not take; says what exists.
    """
    name, _, rest = spec.partition(":")
    factory = _find(kind, name.strip())
    parameters = {**_parse(rest, spec), **given}
    try:
        return factory(**parameters)
    except TypeError as error:
        raise ValueError(f"{kind} policy {spec!r}: {error}") from None


def _find(kind: str, name: str) -> Callable[..., Any]:
    if name in _BUILT_IN[kind]:
        module, _, attribute = _BUILT_IN[kind][name].partition(":")
        factory: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
        return factory
    third_party = _third_party(kind)
    if name in third_party:
        return _load(third_party[name])
    raise ValueError(f"unknown {kind} policy {name!r}: choose one of {', '.join(known(kind))}")


def _load(point: Any) -> Callable[..., Any]:
    try:
        loaded: Callable[..., Any] = point.load()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{point.name} is {point.value}, which cannot be had: {error}") from error
    return loaded


def _third_party(kind: str) -> dict[str, Any]:
    prefix = f"{kind}."
    return {
        point.name.removeprefix(prefix): point
        for point in entry_points(group=ENTRY_POINT_GROUP)
        if point.name.startswith(prefix)
    }


def _parse(text: str, spec: str) -> dict[str, Any]:
    parameters: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, value = part.partition("=")
        if not equals or not name:
            raise ValueError(f"policy {spec!r}: expected key=value, got {part!r}")
        parameters[name.strip()] = _number_or_word(value.strip())
    return parameters


def _number_or_word(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
