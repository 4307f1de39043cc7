"""Costs of steps: rooflines behave as hardware does, tables as what was measured."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierkv.cli.model_facts import read_facts
from tierkv.cli.sim_options import shape_of
from tierkv.errors import ConfigError
from tierkv.sim.fit import StepSample, errors_of, fit_table
from tierkv.sim.hardware import StepTable, known_hardware, load_hardware
from tierkv.sim.quantiles import Quantiles
from tierkv.sim.steps import Measured, Roofline, step_cost

SHAPE = shape_of(read_facts("llama-3.1-8b"))


def test_the_shape_is_the_models() -> None:
    assert SHAPE.num_parameters == 8_030_261_248
    assert SHAPE.weight_bytes == 2 * SHAPE.num_parameters
    assert SHAPE.kv_bytes_per_token == 32 * 2 * 8 * 128 * 2


@pytest.mark.parametrize("name", known_hardware())
def test_every_machine_computes(name: str) -> None:
    cost = step_cost(SHAPE, load_hardware(name))
    decode, prompt = cost.step_s([(1000, 1)]), cost.step_s([(0, 2048)])
    assert 0 < decode < prompt
    assert cost.step_s([(32_000, 2048)]) > prompt  # a prompt costs more the longer its context is
    assert cost.step_s([(1000, 1)] * 8) < 8 * decode  # one reading of the weights serves all
    assert cost.step_s([(100_000, 1)]) > decode  # and contexts are read too


def test_decoding_is_bound_by_bandwidth() -> None:
    hardware = load_hardware("h200")
    weights_s = SHAPE.weight_bytes / (hardware.bandwidth * hardware.bandwidth_efficiency)
    taken = Roofline(SHAPE, hardware).step_s([(0, 1)]) - hardware.step_overhead_s
    assert taken == pytest.approx(weights_s, rel=0.01)


def test_more_devices_are_faster_but_not_by_as_much() -> None:
    one, four = (Roofline(SHAPE, load_hardware(f"h100:tp={n}")).step_s([(0, 2048)]) for n in (1, 4))
    assert one / 4 < four < one


def test_settings_replace_figures() -> None:
    hardware = load_hardware("h100:tp=2,link=pcie3,drive=gen5,drives=4")
    assert (hardware.tp, hardware.drives, hardware.link.bandwidth) == (2, 4, 1.2e10)


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        ("h20", "did you mean h200"),
        ("h200:tp=0", "1 to 8"),
        ("h200:tp", "setting=value"),
        ("h200:lnk=pcie4", "did you mean link"),
        ("h200:link=pcie9", "choose one of"),
        ("h200:flops=fast", "must be a number"),
        ("missing.yaml", "YAML file"),
        ("links", "choose one of"),
    ],
)
def test_bad_hardware_is_told(spec: str, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        load_hardware(spec)


def test_a_table_is_found_again() -> None:
    table = StepTable(3e-3, 5e-4, 2e-8, 1e-4)
    drawn = random.Random(1)
    rows = [
        tuple((drawn.randrange(5000), drawn.randrange(1, 2000)) for _ in range(drawn.randint(1, 9)))
        for _ in range(60)
    ]
    samples = [StepSample(each, Measured(table).step_s(each)) for each in rows]
    found = fit_table(samples)
    assert errors_of(found, samples)[-1] < 1e-6
    assert found.step_s == pytest.approx(table.step_s, rel=1e-3)


@given(st.integers(0, 1000))
def test_no_part_of_a_table_is_negative(seed: int) -> None:
    drawn = random.Random(seed)
    samples = [
        StepSample(((drawn.randrange(999), drawn.randint(1, 99)),), drawn.uniform(0.01, 1))
        for _ in range(12)
    ]
    table = fit_table(samples)
    assert min(table.step_s, table.token_s, table.pair_s, table.row_s) >= 0


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 8"):
        fit_table([StepSample(((0, 1),), 0.1)])


@given(st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=200))
def test_quantiles_are_near(values: list[float]) -> None:
    quantiles, ordered = Quantiles(), sorted(values)
    for value in values:
        quantiles.add(value)
    for share in (0.1, 0.5, 0.9, 1.0):
        exact = ordered[max(0, -(-round(share * 1000) * len(values) // 1000) - 1)]
        assert quantiles.quantile(share) == pytest.approx(exact, rel=0.011)
    assert quantiles.count == len(values)


def test_nothing_has_no_quantiles() -> None:
    assert Quantiles().quantile(0.5) == 0.0 and Quantiles().cdf() == []
