"""The OpenAPI schema: complete, and true of what the server takes and answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from live_app import LiveApp, live_app
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tierkv.engine.sampling_params import SamplingParams
from tierkv.errors import RequestError
from tierkv.server.app import AppSettings
from tierkv.server.openapi import BOUNDS

OPERATIONS = {
    "GET /health",
    "GET /ping",
    "POST /ping",
    "GET /version",
    "GET /load",
    "GET /metrics",
    "GET /v1/models",
    "GET /v1/models/{name}",
    "POST /v1/completions",
    "POST /v1/chat/completions",
    "POST /v1/responses",
    "POST /v1/messages",
    "POST /v1/messages/count_tokens",
    "POST /tokenize",
    "POST /detokenize",
    "POST /reset_prefix_cache",
}
OPEN = {"GET /health", "GET /ping", "POST /ping", "GET /version", "GET /load", "GET /metrics"}
WITH_BODY = {name for name in OPERATIONS if name.startswith("POST /v1") or "token" in name}
ANSWER_S = 60


@pytest.fixture(scope="module")
def short(servable: Path) -> Iterator[LiveApp]:
    """An application without a key whose context is so short that every request ends soon."""
    options: dict[str, Any] = {"num_gpu_blocks": 64, "num_threads": 1, "max_model_len": 64}
    settings = AppSettings(["tiny", "org/tiny"], max_sequences=8)
    with live_app(servable, settings, **options) as running:
        yield running


@pytest.fixture(scope="module")
def document(app: LiveApp) -> dict[str, Any]:
    found: dict[str, Any] = app.http.get("/openapi.json").json()
    return found


def operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        f"{method.upper()} {path}": operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for inner in value.values():
            yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)


def test_every_endpoint_is_described(document: dict[str, Any]) -> None:
    found = operations(document)
    assert set(found) >= OPERATIONS
    for name, operation in found.items():
        assert operation["summary"] and operation["description"] and operation["tags"], name
        assert operation["responses"]["200"], name
        assert ("security" in operation) == ("401" in operation["responses"]), name
    assert {name for name in OPERATIONS if "security" not in found[name]} == OPEN
    assert {name for name in OPERATIONS if "requestBody" in found[name]} == WITH_BODY
    schemes = document["components"]["securitySchemes"]
    assert schemes["bearer"]["scheme"] == "bearer" and schemes["x-api-key"]["in"] == "header"


def test_every_endpoint_is_in_the_manual(document: dict[str, Any], repository: Path) -> None:
    manual = (repository / "docs" / "http-api.md").read_text(encoding="utf-8")
    manual += (repository / "docs" / "kv-control.md").read_text(encoding="utf-8")
    assert not [path for path in document["paths"] if path not in manual]


def test_all_references_are_there_and_all_models_are_used(document: dict[str, Any]) -> None:
    models = document["components"]["schemas"]
    used = {name.removeprefix("#/components/schemas/") for name in references(document)}
    assert used == set(models)
    assert not [name for name in models if "__" in name]  # two models of the same name


def test_models_are_named(document: dict[str, Any], short: LiveApp) -> None:
    assert "tiny" in document["components"]["schemas"]["ChatBody"]["properties"]["model"]["enum"]
    without_key = short.http.get("/openapi.json").text
    assert '"security"' not in without_key and '"401"' not in without_key


def test_the_pages_are_served(app: LiveApp) -> None:
    page = app.http.get("/docs")
    assert page.status_code == 200 and "/openapi.json" in page.text


@pytest.mark.parametrize("name", [*BOUNDS])
def test_ranges_are_those_that_are_checked(app: LiveApp, name: str) -> None:
    bounds = BOUNDS[name]
    if name in SamplingParams.__slots__:
        for key in ("minimum", "maximum"):
            if key in bounds:
                SamplingParams(**{name: bounds[key]} | room_for(name))
        for value in beyond(bounds):
            with pytest.raises(RequestError) as caught:
                SamplingParams(**{name: value} | room_for(name))
            assert caught.value.field == name
    else:
        path = "responses" if name == "max_output_tokens" else "chat/completions"
        given = {"input": "x"} if path == "responses" else {"messages": [{"role": "user"}]}
        for value in beyond(bounds):
            assert app.post(path, **given, **{name: value}).status_code == 400


def room_for(name: str) -> dict[str, Any]:
    return {"max_tokens": None} if name == "min_tokens" else {}


def beyond(bounds: dict[str, Any]) -> Iterator[float]:
    """The first values that are out of range."""
    if "minimum" in bounds:
        yield bounds["minimum"] - 1
    if "exclusiveMinimum" in bounds:
        yield bounds["exclusiveMinimum"]
    yield bounds["maximum"] + 1


def check_operation(app: LiveApp, name: str, mode: GenerationMode, examples: int) -> set[int]:
    """Send generated requests; the statuses that came."""
    schema = schemathesis.openapi.from_url(f"{app.url}/openapi.json")
    method, _, path = name.partition(" ")
    statuses: set[int] = set()

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=schema[path][method].as_strategy(generation_mode=mode))
    def run(case: schemathesis.Case) -> None:
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body = steer(path, case.body)
        response = case.call(timeout=ANSWER_S)
        statuses.add(response.status_code)
        # Not all that is wrong can be said in a schema: `min_tokens` above `max_tokens`.
        case.validate_response(response, excluded_checks=[positive_data_acceptance])

    run()
    return statuses


def steer(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Away from what chat templates and forms of outputs refuse, which no schema can say."""
    if not path.endswith("chat/completions"):
        return body
    forms = ("guided_", "structured_", "response_", "use_beam", "length_pen", "stream_opt", "tool")
    kept = {name: value for name, value in body.items() if not name.startswith(forms)}
    return {**kept, "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_generated_requests_are_answered_as_described(short: LiveApp, name: str) -> None:
    statuses = check_operation(short, name, GenerationMode.POSITIVE, 12)
    assert 200 in statuses


@pytest.mark.parametrize("name", sorted(WITH_BODY))
def test_what_the_schema_forbids_is_refused(short: LiveApp, name: str) -> None:
    statuses = check_operation(short, name, GenerationMode.NEGATIVE, 12)
    assert all(400 <= status < 500 for status in statuses)


@pytest.mark.full
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("name", sorted(WITH_BODY))
def test_many_generated_requests(short: LiveApp, name: str, mode: GenerationMode) -> None:
    check_operation(short, name, mode, 300)
    assert short.http.get("/health").status_code == 200


def test_replies_follow_the_schema(app: LiveApp, document: dict[str, Any]) -> None:
    """What is streamed, too: each event's data is the model that is declared for it."""
    import jsonschema

    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    scored = {"logprobs": 2, "prompt_logprobs": 1}
    given = {
        "/v1/completions": {"model": "tiny", "prompt": "hi", "max_tokens": 4, **scored},
        "/v1/chat/completions": {**body, "logprobs": True, "top_logprobs": 2},
        "/v1/responses": {
            "model": "tiny",
            "input": "hi",
            "top_logprobs": 2,
            "max_output_tokens": 4,
        },
        "/v1/messages": body,
    }
    for path, fields in given.items():
        content = document["paths"][path]["post"]["responses"]["200"]["content"]
        whole = app.http.post(path, json=fields).json()
        jsonschema.validate(whole, rooted(content["application/json"]["schema"], document))
        item = content["text/event-stream"]["itemSchema"]["properties"]["data"]
        item = item.get("anyOf", [item])[0]["contentSchema"]
        stream = app.http.post(path, json={**fields, "stream": True}).text
        lines = [line for line in stream.splitlines() if line.startswith("data: {")]
        assert lines
        for line in lines:
            jsonschema.validate(json.loads(line[len("data: ") :]), rooted(item, document))


def rooted(schema: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    """A part of the document as a schema of its own."""
    return {**schema, "components": document["components"]}
