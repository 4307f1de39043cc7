"""What is written to the tier below, and when."""

from __future__ import annotations

import pytest

from tierkv.policies import registry
from tierkv.policies.admission import AdmissionPolicy, ByteRateLimit, SecondHit, When
from tierkv.policies.base import AccessHint

HINT = AccessHint()
EVENTS = [When.READY, When.USED, When.USED, When.EVICTED]


@pytest.mark.parametrize(
    ("spec", "answers"),
    [
        ("write-through", [True, True, True, True]),
        ("prompt-only", [True, True, True, False]),
        ("write-back", [False, False, False, True]),
        ("second-hit", [False, True, True, True]),
        ("second-hit:hits=3", [False, False, True, True]),
    ],
)
def test_when_a_block_is_admitted(spec: str, answers: list[bool]) -> None:
    policy: AdmissionPolicy = registry.create("admission", spec)
    assert [policy.admits("a", when, HINT) for when in EVENTS] == answers


def test_prompt_only_waits_for_what_is_generated_to_come_back() -> None:
    policy: AdmissionPolicy = registry.create("admission", "prompt-only")
    generated = AccessHint(is_output=True)
    assert [policy.admits("a", when, generated) for when in EVENTS] == [False] * 4
    assert policy.admits("a", When.USED, HINT)


def test_second_hit_spares_the_tier_what_was_wanted_once() -> None:
    policy = SecondHit()
    assert not policy.admits("a", When.READY, HINT)
    assert not policy.admits("a", When.EVICTED, HINT)
    assert policy.admits("a", When.READY, HINT)  # computed again: that is the second request
    assert not policy.admits("b", When.EVICTED, HINT)


def test_second_hit_forgets_the_key_requested_least_recently() -> None:
    policy = SecondHit(memory=2)
    for key in "abac":
        policy.admits(key, When.READY, HINT)
    assert not policy.admits("b", When.READY, HINT)  # which pushes out a
    assert policy.admits("c", When.READY, HINT)


def test_every_admission_policy_is_tested() -> None:
    expected = ["write-through", "prompt-only", "write-back", "second-hit"]
    assert registry.known("admission") == expected


@pytest.mark.parametrize("spec", ["second-hit:hits=0", "second-hit:memory=0"])
def test_parameters_out_of_range_are_named(spec: str) -> None:
    with pytest.raises(ValueError, match=spec.partition(":")[2]):
        registry.create("admission", spec)


def test_the_rate_limit_is_kept_over_time() -> None:
    limit = ByteRateLimit(bytes_per_s=100.0, burst_bytes=50.0)
    assert limit.take(30, now=7.0)
    assert limit.take(20, now=7.0)
    assert not limit.take(1, now=7.0)
    assert not limit.take(30, now=7.25)
    assert limit.take(25, now=7.25)
    taken = sum(10 for step in range(1000) if limit.take(10, now=8.0 + step * 0.01))
    assert taken == pytest.approx(1000 + 50, abs=10)


def test_a_write_larger_than_the_burst_is_paid_off() -> None:
    limit = ByteRateLimit(bytes_per_s=100.0, burst_bytes=50.0)
    assert limit.take(250, now=0.0)
    assert not limit.take(1, now=1.99)
    assert limit.take(1, now=2.02)


def test_a_clock_that_steps_back_gives_nothing() -> None:
    limit = ByteRateLimit(bytes_per_s=100.0, burst_bytes=50.0)
    assert limit.take(50, now=5.0)
    assert not limit.take(1, now=4.0)
    assert not limit.take(1, now=5.0)


@pytest.mark.parametrize(("rate", "burst"), [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0)])
def test_a_limit_of_nothing_is_refused(rate: float, burst: float) -> None:
    with pytest.raises(ValueError, match="bytes_per_s"):
        ByteRateLimit(rate, burst)
