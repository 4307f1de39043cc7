"""Who calls: API keys, the tenants behind them, and what of the cache each may see.

A file of keys (`--api-keys`) maps each key to a tenant:

    sk-one: research                 # a name is enough
    "sk-two":
      tenant: product
      weight: 3                      # share of the service under --scheduling-policy fair
      quota: {gpu: 2GiB, cpu: 8GiB}  # most bytes of KV kept in a tier
      cache_salt: some words         # instead of one derived from the name
      admin: true                    # this key may use the admin endpoints

Requests of different tenants share no cached block, so that nobody learns from the time to the
first token what others have asked: a tenant's cache salt is part of every key, and a request's own
salt is hashed together with it, so that no request can name another tenant's.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, NoReturn

import yaml
from starlette.exceptions import HTTPException
from starlette.requests import Request

from tierkv.config import parse_bytes
from tierkv.engine.inputs import ParsedPrompt
from tierkv.errors import ConfigError, InvariantError
from tierkv.strict_yaml import OnceLoader
from tierkv.types import TierName

OPTION = "api_keys"
_FIELDS = ("tenant", "cache_salt", "quota", "weight", "admin")
_TIERS = [tier.value for tier in TierName]
MOST_WEIGHT = 1_000_000
MOST_BYTES = 2**60
SENDABLE = "ASCII text without spaces around it, as headers can carry"


@dataclass(slots=True, frozen=True)
class Tenant:
    """Whose requests share cached blocks, quotas and a share of the service.

    Attributes:
        name: empty for everyone who has no tenant.
        cache_salt: of all its requests.
        weight: share of the service, relative to others', above 0.
        quota: most bytes of its blocks by tier (`gpu`, `cpu`, `nvme`).
    """

    name: str = ""
    cache_salt: str = ""
    weight: float = 1.0
    quota: Mapping[str, int] = field(default_factory=dict)

    def salt(self, given: str) -> str:
        """The salt of a request that brings `given`."""
        if not self.cache_salt and not given:
            return ""
        own, theirs = self.cache_salt.encode(), given.encode(errors="surrogatepass")
        whole = len(own).to_bytes(4, "big") + own + theirs
        return "tenant:" + blake2b(whole, digest_size=16).hexdigest()

    def message(self) -> dict[str, Any]:
        """What the engine has to know of it."""
        return {
            "name": self.name,
            "salt": self.salt(""),
            "weight": self.weight,
            "quota": dict(self.quota),
        }


@dataclass(slots=True, frozen=True)
class Caller:
    """Who sent a request: a tenant, by a key that may or may not administrate."""

    tenant: Tenant
    is_admin: bool = False


NOBODY = Caller(Tenant())
_CALLER: ContextVar[Caller] = ContextVar("tierkv_caller")


def caller() -> Caller:
    """Who sent the request that is being answered.

    Raises:
        InvariantError: nothing is: what runs beside requests must say for whom (`as_caller`).
    """
    found = _CALLER.get(None)
    if found is None:
        raise InvariantError("a request was made for no caller, though there are tenants")
    return found


def as_caller(who: Caller) -> None:
    """From here on, this task and those it starts act for `who`."""
    _CALLER.set(who)


class Callers:
    """Checks keys.

    Args:
        api_key: for everyone; None, and no tenants: no key is needed.
        admin_api_key: for everything.
        tenants: callers by key, from `read_keys`.

    Raises:
        ConfigError: one key stands for two callers, or no request could bring it.
    """

    def __init__(
        self,
        api_key: str | None = None,
        admin_api_key: str | None = None,
        tenants: Mapping[str, Caller] | None = None,
    ) -> None:
        tenants = tenants or {}
        self.tenants = list({c.tenant.name: c.tenant for c in tenants.values()}.values())
        self.is_open = api_key is None and not tenants
        self._secret = secrets.token_bytes(32)
        given = {api_key: NOBODY, admin_api_key: Caller(Tenant(), is_admin=True)}
        for name, key in (("api_key", api_key), ("admin_api_key", admin_api_key)):
            if key is not None and not is_sendable(key):
                raise ConfigError(name, "<key>", f"must be {SENDABLE}")
            if key is not None and (key in tenants or api_key == admin_api_key):
                raise ConfigError(name, "<key>", "is given twice: each key stands for one caller")
        known = {**tenants, **{key: who for key, who in given.items() if key is not None}}
        self._callers = [(self._digest(key), who) for key, who in known.items()]
        self.has_admin = any(who.is_admin for who in known.values())

    def _digest(self, key: str) -> bytes:
        return blake2b(key.encode(errors="surrogatepass"), key=self._secret).digest()

    def find(self, key: str) -> Caller | None:
        """Whose key it is; takes the same time for any, and for none."""
        digest, found = self._digest(key), None
        for known, who in self._callers:
            if secrets.compare_digest(known, digest):
                found = who
        return found

    def admit(self, request: Request) -> Caller:
        """The caller, who is noted for the rest of the request.

        Raises:
            HTTPException: 401, the key is missing or unknown.
        """
        given = key_of(request)
        found = self.find(given) if given or not self.is_open else None
        if found is None and not self.is_open:
            fix = "give the API key as `Authorization: Bearer KEY` or as `x-api-key: KEY`"
            raise HTTPException(401, fix)
        as_caller(found or NOBODY)
        return found or NOBODY

    def admit_admin(self, request: Request) -> Caller:
        """As `admit`, for what only an administrator may do.

        Raises:
            HTTPException: 403, the key is not an administrator's, or nobody's is; or 401.
        """
        if not self.has_admin:
            fix = "start the server with --admin-api-key KEY, or with `admin: true` in --api-keys"
            raise HTTPException(403, f"this endpoint needs an admin key and there is none: {fix}")
        if not key_of(request):
            raise HTTPException(401, "give an admin key as `Authorization: Bearer KEY`")
        who = self.admit(request)
        if not who.is_admin:
            raise HTTPException(403, "this endpoint needs an admin key")
        return who

    def tenant_name(self) -> str:
        """Of whoever asks now; empty where there are no tenants."""
        return caller().tenant.name if self.tenants else ""

    def salt(self, given: str) -> str:
        """The salt of what asks now, if it brings `given`."""
        return caller().tenant.salt(given) if self.tenants else given

    def scope(self, prompt: ParsedPrompt) -> None:
        """Make a prompt that of whoever asks now."""
        tenant = caller().tenant
        prompt.tenant, prompt.cache_salt = tenant.name, tenant.salt(prompt.cache_salt)


def is_sendable(key: str) -> bool:
    """Whether the header of a request can carry a key as it is."""
    return bool(key) and key.isascii() and key.isprintable() and key == key.strip()


def key_of(request: Request) -> str:
    """The key that a request brings, or nothing."""
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    return given if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")


def read_keys(path: str) -> dict[str, Caller]:
    """The callers in a file of keys. No error shows a key.

    Raises:
        ConfigError: it cannot be read, or says something that has no meaning.
    """
    try:
        values = yaml.load(Path(path).expanduser().read_text(encoding="utf-8"), OnceLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(OPTION, path, f"cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(OPTION, path, f"is not YAML that maps keys to tenants{where}") from None
    if not isinstance(values, dict) or not values:
        raise ConfigError(OPTION, path, "must map keys to tenants")
    return _Reader(path).callers(values)


class _Reader:
    """Makes callers of a file's entries, and names the file in errors."""

    def __init__(self, path: str) -> None:
        self._path = path

    def callers(self, entries: dict[object, object]) -> dict[str, Caller]:
        found = {self._key(key, i): self._fields(entries[key]) for i, key in enumerate(entries, 1)}
        tenants = self._tenants(found.values())
        self._check_salts(tenants.values())
        return {
            key: Caller(tenants[values["tenant"]], values.get("admin", False))
            for key, values in found.items()
        }

    def _key(self, key: object, number: int) -> str:
        if not isinstance(key, str) or not is_sendable(key):
            self._refuse(f"the key of entry {number} must be {SENDABLE}: put it in quotes")
        return key

    def _fields(self, entry: object) -> dict[str, Any]:
        values = {"tenant": entry} if isinstance(entry, str) else entry
        name = values.get("tenant") if isinstance(values, dict) else None
        if not isinstance(values, dict) or not isinstance(name, str) or not name:
            self._refuse("every key needs a tenant: a name, or `tenant: NAME` among its fields")
        for field_name in values:
            if field_name not in _FIELDS:
                self._refuse(f"{name}: {field_name} is no field; known are {', '.join(_FIELDS)}")
        if type(values.get("admin", False)) is not bool:
            self._refuse(f"{name}: admin must be true or false")
        return values

    def _tenants(self, entries: Iterable[dict[str, Any]]) -> dict[str, Tenant]:
        """Those with several keys say the same in all entries, or say it once."""
        said: dict[str, dict[str, Any]] = {}
        for values in entries:
            name = values["tenant"]
            settings = said.setdefault(name, {})
            for field_name in _FIELDS[1:-1]:
                value = values.get(field_name)
                if value is not None and settings.setdefault(field_name, value) != value:
                    self._refuse(f"{name}: {field_name} is given twice, and differs")
        return {name: self._tenant(name, **settings) for name, settings in said.items()}

    def _tenant(
        self, name: str, cache_salt: Any = None, quota: Any = None, weight: Any = 1.0
    ) -> Tenant:
        salt = f"tenant {name}" if cache_salt is None else cache_salt
        if not isinstance(salt, str):
            self._refuse(f"{name}: cache_salt must be text")
        is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not is_number or not 0 < weight <= MOST_WEIGHT:
            self._refuse(f"{name}: weight must be a number above 0, at most {MOST_WEIGHT:,}")
        quota = {} if quota is None else quota
        if not isinstance(quota, dict) or not all(tier in _TIERS for tier in quota):
            self._refuse(f"{name}: quota maps {', '.join(_TIERS)} to bytes, as {{cpu: 4GiB}}")
        sizes = {tier: parse_bytes(size, OPTION) for tier, size in quota.items()}
        if any(size > MOST_BYTES for size in sizes.values()):
            self._refuse(f"{name}: a quota is larger than any tier: leave it out for none")
        return Tenant(name, salt, float(weight), sizes)

    def _check_salts(self, tenants: Iterable[Tenant]) -> None:
        """Blocks of one salt count for one quota."""
        owners: dict[str, Tenant] = {}
        for tenant in tenants:
            other = owners.setdefault(tenant.cache_salt, tenant)
            if other is not tenant and (other.quota or tenant.quota):
                self._refuse(f"{other.name} and {tenant.name} share a cache_salt: give no quota")

    def _refuse(self, fix: str) -> NoReturn:
        raise ConfigError(OPTION, self._path, fix)
