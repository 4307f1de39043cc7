"""Sampling parameters: what is wrong is refused when they are made, by the field's name."""

from __future__ import annotations

from typing import Any

import pytest

from tierkv.engine import wire
from tierkv.engine.core import EngineRequest
from tierkv.engine.sampling_params import SamplingParams
from tierkv.errors import RequestError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stop", 5),
        ("stop", {"a": 1}),
        ("stop_token_ids", 5),
        ("stop_token_ids", "ab"),
        ("ignore_eos", "no"),
        ("detokenize", None),
        ("skip_special_tokens", 1),
        ("include_stop_str_in_output", "false"),
        ("logit_bias", {1.5: 2.0}),
        ("logit_bias", {5: 10**400}),
        ("n", 0),
        ("top_k", -2),
        *((name, 2**63) for name in ("top_k", "max_tokens", "seed")),
        ("stop_token_ids", [2**63]),
        ("logit_bias", {2**63: 1.0}),
    ],
)
def test_wrong_values_name_the_field(field: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field


def test_every_accepted_integer_can_be_sent_to_the_engine() -> None:
    most = 2**63 - 1
    params = SamplingParams(top_k=most, max_tokens=most, min_tokens=most, stop_token_ids=[most])
    request = EngineRequest("id", [1], params)
    _, (packed,) = wire.unpack(wire.pack("add", wire.encode_request(request)))
    assert wire.decode_request(packed) == request


def test_collections_become_lists() -> None:
    params = SamplingParams(stop=("a", "b"), stop_token_ids={3}, logit_bias={"5": 1})  # type: ignore[arg-type,dict-item]
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (["a", "b"], [3], {5: 1.0})
    assert SamplingParams(stop=None, stop_token_ids=None).stop == []  # type: ignore[arg-type]
