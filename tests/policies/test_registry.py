"""Policies by name."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from tierkv.policies import registry
from tierkv.policies.lru import LruPolicy


def test_unknown_names_say_what_exists() -> None:
    with pytest.raises(ValueError, match="unknown eviction policy 'lur': choose one of lru, fifo"):
        registry.create("eviction", "lur")


@pytest.mark.parametrize("spec", ["lru:size", "lru:=3", "lru:size=3"])
def test_bad_parameters_are_named(spec: str) -> None:
    with pytest.raises(ValueError, match="lru"):
        registry.create("eviction", spec)


def test_third_party_policies_come_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("eviction.mine", "tierkv.policies.lru:LruPolicy", "tierkv.policies")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    assert registry.known("eviction")[-1] == "mine"
    assert isinstance(registry.create("eviction", "mine"), LruPolicy)


@pytest.mark.parametrize("value", ["no_such_module:Policy", "tierkv.policies.lru:NoPolicy"])
def test_a_third_party_policy_that_is_not_there(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = EntryPoint("eviction.mine", value, "tierkv.policies")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    with pytest.raises(ValueError, match=f"eviction.mine is {value}, which cannot be had"):
        registry.create("eviction", "mine")
