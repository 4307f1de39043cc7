"""Flags, YAML keys and option classes that are one list: the fields of a dataclass.

`add_flags` makes one flag of each field (`max_model_len` -> `--max-model-len`, a bool also
`--no-...`); `read_options` merges a YAML file and the flags given (flags win), refuses names that
no field has, and checks types. The classes check ranges themselves. Names may have underscores for
dashes everywhere. Flags of other servers get an answer of their own (`foreign.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from tierkv.cli import foreign
from tierkv.config import check_names
from tierkv.errors import ConfigError, TierkvError
from tierkv.strict_yaml import OnceLoader

_Group = argparse._ActionsContainer
"""A parser, or a group of its flags."""

USAGE_ERROR = 2
"""Exit status of a bad command line or a bad configuration."""


class CommandError(TierkvError):
    """A command cannot be carried out; the message is for the terminal."""


class Parser(argparse.ArgumentParser):
    """An argparse parser that names the nearest flag when one is unknown."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **settings)

    # typeshed's signature is a set of overloads; this is what they have in common.
    def parse_known_args(  # type: ignore[override]
        self,
        args: Sequence[str] | None = None,
        namespace: argparse.Namespace | None = None,
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse does; `--max_model_len` is `--max-model-len`."""
        given = sys.argv[1:] if args is None else args
        return super().parse_known_args([with_dashes(word) for word in given], namespace)

    def error(self, message: str) -> NoReturn:
        """Exit with one line instead of all flags."""
        self.exit(USAGE_ERROR, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def refuse(self, extras: list[str]) -> NoReturn:
        """Exit because of arguments that nothing took."""
        flag = next((extra for extra in extras if extra.startswith("-")), None)
        if flag is None:
            self.error(f"unexpected argument {extras[0]!r}")
        name = flag.partition("=")[0]
        known = [flag for flag, action in self._option_string_actions.items() if is_own(action)]
        near = difflib.get_close_matches(name, known, n=1)
        self.error(f"unknown option {name}" + (f"; did you mean {near[0]}?" if near else ""))


class ForeignFlag(argparse.Action):
    """A flag of another server: an error with advice, unless its value says what is so here."""

    def __init__(self, option_strings: Sequence[str], dest: str, **settings: Any) -> None:
        self.accepted, self.advice = settings.pop("accepted"), settings.pop("advice")
        nargs = 0 if self.accepted == () else "?"
        super().__init__(option_strings, argparse.SUPPRESS, nargs, help=argparse.SUPPRESS)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if not is_same_here(self.accepted, values):
            parser.error(f"{option_string} {self.advice}")


def is_same_here(accepted: tuple[str, ...] | None, value: object) -> bool:
    """Whether a foreign option's value says what is so here anyway."""
    return accepted is not None and (accepted == () or str(value) in accepted)


def is_own(action: argparse.Action) -> bool:
    """Whether a flag is one of this program's, not another server's."""
    return not isinstance(action, ForeignFlag)


def with_dashes(word: str) -> str:
    """A flag with dashes for underscores; anything else as it is."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def flag_name(field: str) -> str:
    """`max_model_len` -> `--max-model-len`."""
    return "--" + field.replace("_", "-")


def value_kinds(owner: type) -> dict[str, tuple[type, ...]]:
    """The types that each field of a dataclass accepts; NoneType where None does."""
    kinds = {}
    for name, hint in typing.get_type_hints(owner).items():
        is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        parts = typing.get_args(hint) if is_union else (hint,)
        kinds[name] = tuple(typing.get_origin(part) or part for part in parts)
    return kinds


def add_flags(parser: _Group, owner: type, skip: Iterable[str] = ()) -> None:
    """Add a flag for each field of `owner`; one that is not given leaves no attribute."""
    kinds = value_kinds(owner)
    for f in dataclasses.fields(owner):
        if f.name not in skip:
            _add_flag(parser, f, kinds[f.name])


def _add_flag(parser: _Group, field: dataclasses.Field[Any], kinds: tuple[type, ...]) -> None:
    settings: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
    shown = field.default if field.default is not dataclasses.MISSING else None
    text = field.metadata.get("help", "").replace("%", "%%")
    has_default = shown not in (None, "", []) and not isinstance(shown, bool)
    settings["help"] = f"{text} (default: {shown})" if has_default else text
    if bool in kinds:
        state = "" if shown is None else f" (default: {'on' if shown else 'off'})"
        settings |= {"action": argparse.BooleanOptionalAction, "help": text + state}
    elif list in kinds:
        settings |= {"action": "append", "metavar": field.metadata.get("metavar", "TEXT")}
        if field.metadata.get("takes_several"):
            settings |= {"action": "extend", "nargs": "+"}
        settings["type"] = field.metadata.get("item", str)
    else:
        word = str if str in kinds else float if float in kinds else int
        default_metavar = {str: "TEXT", float: "NUMBER", int: "N"}[word]
        settings |= {"type": word, "metavar": field.metadata.get("metavar", default_metavar)}
        if "choices" in field.metadata:
            settings |= {"choices": field.metadata["choices"], "metavar": None}
    aliases = field.metadata.get("aliases", ())
    parser.add_argument(flag_name(field.name), *aliases, **settings)


def add_foreign_flags(parser: _Group) -> None:
    """Let flags of other servers be known, without showing them in the help."""
    accepted, advice = foreign.accepted(), foreign.advice()
    for flag in foreign.all_flags():
        if flag in foreign.SWITCHES:
            field, value = foreign.SWITCHES[flag]
            settings: dict[str, Any] = {"action": "store_const", "const": value, "dest": field}
            parser.add_argument(flag, **settings, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        else:
            parser.add_argument(
                flag,
                action=ForeignFlag,
                accepted=accepted.get(flag),
                advice=advice.get(flag, "is a switch: it takes no value"),
            )


def without_foreign(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a YAML file without those of other servers.

    Raises:
        ConfigError: one of them asks for something else than is so here.
    """
    accepted, advice, own = foreign.accepted(), foreign.advice(), {}
    for name, value in values.items():
        flag = flag_name(name)
        if flag in foreign.SWITCHES:
            field, if_true = foreign.SWITCHES[flag]
            own[field] = if_true if value else not if_true
        elif flag not in accepted and flag not in advice:
            own[name] = value
        elif value is not False and not is_same_here(accepted.get(flag), value):
            raise ConfigError(name, value, advice[flag])
    return own


def load_yaml(path: str) -> dict[str, Any]:
    """The options of a YAML file, names with underscores.

    Raises:
        ConfigError: no such file, not YAML, or not a mapping of names to values.
    """
    try:
        values = yaml.load(Path(path).expanduser().read_text(encoding="utf-8"), OnceLoader)
    except OSError as error:
        raise ConfigError("config", path, f"cannot read it: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError("config", path, f"is not YAML: {error}") from None
    values = {} if values is None else values
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ConfigError("config", path, "must map option names to values")
    found = {name.replace("-", "_"): value for name, value in values.items()}
    if len(found) < len(values):
        raise ConfigError("config", path, "gives an option twice, with dashes and underscores")
    return found


def check_types(values: Mapping[str, Any], owners: Iterable[type]) -> None:
    """Raise ConfigError for the first value whose type its field does not accept."""
    kinds = {name: kind for owner in owners for name, kind in value_kinds(owner).items()}
    for name, value in values.items():
        allowed = kinds[name]
        is_number_word = float in allowed and type(value) is int
        if type(value) not in allowed and not is_number_word:
            words = " or ".join("nothing" if k is types.NoneType else k.__name__ for k in allowed)
            raise ConfigError(name, value, f"must be of type {words}")


def read_options(
    namespace: argparse.Namespace, *owners: type, knows_foreign: bool = False
) -> dict[str, Any]:
    """The options given in `--config` and by flags, flags first, names and types checked.

    Args:
        namespace: the parsed command line.
        owners: the classes whose fields are options.
        knows_foreign: the file may hold options of other servers, as flags may.
    """
    names = {f.name for owner in owners for f in dataclasses.fields(owner)}
    given = {name: value for name, value in vars(namespace).items() if name in names}
    path = getattr(namespace, "config", None)
    if path is None:
        return given
    values = load_yaml(path)
    if knows_foreign:
        values = without_foreign(values)
    check_names(values, sorted(names))
    check_types(values, owners)
    return values | given


def split_options(values: Mapping[str, Any], owner: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """`values` that are fields of `owner`, and the rest."""
    names = {f.name for f in dataclasses.fields(owner)}
    mine = {name: value for name, value in values.items() if name in names}
    return mine, {name: value for name, value in values.items() if name not in names}


def add_config_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--config FILE.yaml`."""
    text = "YAML file with the same options (dashes or underscores); flags win over it"
    parser.add_argument("--config", metavar="FILE.yaml", help=text)


def take_model(namespace: argparse.Namespace, values: dict[str, Any]) -> None:
    """Let the positional MODEL be the option `model`.

    Raises:
        ConfigError: `--model` says something else.
    """
    given, flag = namespace.MODEL, getattr(namespace, "model", None)
    if given is None:
        return
    if flag not in (None, given):
        raise ConfigError("model", flag, f"differs from MODEL {given}: give one of them")
    values["model"] = given


def explain(error: ConfigError) -> str:
    """A configuration error as the command line spells it."""
    return f"{flag_name(error.option)} {error.value}: {error.fix}"
