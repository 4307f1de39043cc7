"""Keys, tenants and salts: what a file of keys may say, and what no request can reach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from starlette.exceptions import HTTPException
from starlette.requests import Request

from tierkv.engine.inputs import ParsedPrompt
from tierkv.errors import ConfigError, InvariantError
from tierkv.server import tenants
from tierkv.server.tenants import NOBODY, Caller, Callers, Tenant, read_keys

FILE = """
sk-one: research
"sk-two":
  tenant: product
  weight: 3
  quota: {gpu: 1MiB, cpu: 2GiB}
sk-three: {tenant: product, admin: true}
sk-four: {tenant: fixed, cache_salt: some words}
"""


def write(directory: Path, text: str) -> str:
    path = directory / "keys.yaml"
    path.write_text(text)
    return str(path)


def request_with(**headers: str) -> Request:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "headers": raw})


def test_a_file_of_keys(tmp_path: Path) -> None:
    found = read_keys(write(tmp_path, FILE))
    assert found["sk-one"] == Caller(Tenant("research", "tenant research"))
    product = Tenant("product", "tenant product", 3.0, {"gpu": 2**20, "cpu": 2**31})
    assert found["sk-two"] == Caller(product)
    assert found["sk-three"] == Caller(product, is_admin=True)
    assert found["sk-four"].tenant.cache_salt == "some words"
    again = read_keys(write(tmp_path, FILE))
    assert again == found, "restarts stay warm"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "map keys"),
        ("- a", "map keys"),
        ("sk-secret: {", "is not YAML"),
        ("sk-secret: a\nsk-secret: b", "is not YAML"),
        ("12345: a", "in quotes"),
        ("' sk-secret': a", "in quotes"),
        ("'': a", "in quotes"),
        ("sk-schlüssel: a", "ASCII"),
        ('"sk-a\\nb": a', "ASCII"),
        ("sk-secret: {tenant: a, weight: 1" + "0" * 400 + "}", "weight must"),
        ("sk-secret: {tenant: a, quota: {cpu: 9" + "0" * 30 + "}}", "larger than any tier"),
        ("sk-secret: 3", "needs a tenant"),
        ("sk-secret: {tenant: ''}", "needs a tenant"),
        ("sk-secret: {tenant: a, wieght: 3}", "wieght is no field"),
        ("sk-secret: {tenant: a, weight: 0}", "weight must"),
        ("sk-secret: {tenant: a, weight: yes}", "weight must"),
        ("sk-secret: {tenant: a, weight: .inf}", "weight must"),
        ("sk-secret: {tenant: a, cache_salt: 3}", "cache_salt must"),
        ("sk-secret: {tenant: a, admin: 1}", "admin must"),
        ("sk-secret: {tenant: a, quota: 3GiB}", "quota maps"),
        ("sk-secret: {tenant: a, quota: {ram: 3GiB}}", "quota maps"),
        ("sk-secret: {tenant: a, quota: {cpu: much}}", "give bytes"),
        ("sk-secret: {tenant: a, weight: 2}\nsk-2: {tenant: a, weight: 3}", "given twice"),
        (
            "sk-secret: {tenant: a, cache_salt: x}\n"
            "sk-2: {tenant: b, cache_salt: x, quota: {cpu: 1GiB}}",
            "share a cache_salt",
        ),
    ],
)
def test_bad_files_are_refused_without_a_key_in_the_message(
    tmp_path: Path, text: str, complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        read_keys(write(tmp_path, text))
    assert "sk-" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        read_keys(str(tmp_path / "nowhere"))


# -- salts -----------------------------------------------------------------------------------------


def test_no_request_can_name_the_salt_of_another() -> None:
    a, b, nobody = Tenant("a", "tenant a"), Tenant("b", "tenant b"), NOBODY.tenant
    givens = ["", "x", "tenant b", b.salt(""), b.salt("x"), a.salt("x"), "\ud800"]
    salts = {(t.name, given): t.salt(given) for t in (a, b, nobody) for given in givens}
    assert len(set(salts.values())) == len(salts)
    assert nobody.salt("") == "", "whoever has no tenant finds what was there before there were any"


def test_equal_tenants_have_equal_salts_in_every_process() -> None:
    assert Tenant("a", "tenant a").salt("x") == "tenant:36dcabb132def7c640ada6ac605007a5"


# -- keys ------------------------------------------------------------------------------------------


def test_without_keys_everyone_is_nobody() -> None:
    callers = Callers()
    assert callers.admit(request_with()) is NOBODY
    assert callers.admit(request_with(authorization="Bearer whatever")) is NOBODY
    with pytest.raises(HTTPException) as caught:
        callers.admit_admin(request_with(authorization="Bearer whatever"))
    assert caught.value.status_code == 403
    assert "--admin-api-key" in caught.value.detail


def status_of(check: Any, **headers: str) -> int:
    try:
        check(request_with(**headers))
    except HTTPException as error:
        return error.status_code
    return 200


def test_who_a_key_is(tmp_path: Path) -> None:
    callers = Callers("plain", "root", read_keys(write(tmp_path, FILE)))
    assert callers.admit(request_with(authorization="Bearer sk-one")).tenant.name == "research"
    assert callers.admit(request_with(x_api_key="sk-two")).tenant.name == "product"
    assert callers.admit(request_with(authorization="bearer plain")) == NOBODY
    for bad in ("", "Bearer", "Bearer sk-on", "Bearer sk-onee", "Basic sk-one"):
        assert status_of(callers.admit, authorization=bad) == 401
    assert status_of(callers.admit) == 401
    assert status_of(callers.admit_admin) == 401
    assert status_of(callers.admit_admin, authorization="Bearer nonsense") == 401
    assert status_of(callers.admit_admin, authorization="Bearer plain") == 403
    assert status_of(callers.admit_admin, authorization="Bearer sk-two") == 403
    assert status_of(callers.admit_admin, authorization="Bearer sk-three") == 200
    assert status_of(callers.admit_admin, authorization="Bearer root") == 200


def test_with_an_admin_key_alone_the_rest_is_open() -> None:
    callers = Callers(admin_api_key="root")
    assert callers.admit(request_with()) is NOBODY
    assert callers.admit(request_with(authorization="Bearer root")).is_admin
    assert status_of(callers.admit_admin, authorization="Bearer other") == 403


@pytest.mark.parametrize("given", [("sk-one", None), (None, "sk-one"), ("same", "same")])
def test_a_key_stands_for_one_caller(given: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="given twice") as caught:
        Callers(*given, read_keys(write(tmp_path, FILE)))
    assert "sk-" not in str(caught.value) and "same" not in str(caught.value)


@pytest.mark.parametrize("key", ["", " k", "k\n", "schlüssel", "\x00"])
@pytest.mark.parametrize("option", ["api_key", "admin_api_key"])
def test_a_key_that_no_request_can_bring_is_refused(option: str, key: str) -> None:
    with pytest.raises(ConfigError, match="ASCII") as caught:
        Callers(**{option: key})
    assert caught.value.option == option


def test_a_prompt_becomes_its_callers() -> None:
    tenant = Tenant("a", "tenant a")
    callers = Callers(tenants={"k": Caller(tenant)})
    callers.admit(request_with(authorization="Bearer k"))
    prompt = ParsedPrompt("hello", None, "own")
    callers.scope(prompt)
    assert (prompt.tenant, prompt.cache_salt) == ("a", tenant.salt("own"))


def test_what_runs_for_nobody_is_a_bug() -> None:
    import contextvars

    with pytest.raises(InvariantError, match="no caller"):
        contextvars.Context().run(tenants.caller)
