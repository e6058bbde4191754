"""Configurations from TOML, dictionaries and ``section.key=value``, and back to TOML."""

from __future__ import annotations

import hashlib
import re
import tomllib
from math import inf
from typing import Any, get_args, get_origin

import tomli_w
from pydantic import ValidationError

from mach.config.keys import Config
from mach.config.retired import KINDS, MOST_NUMBER, RETIRED
from mach.errors import ConfigError, did_you_mean
from mach.files.places import Place, place, read_bytes
from mach.files.records import refuse_wild, shortened

MOST_BYTES = 2**16  # of a file: the parser takes the square of the levels of a key


def load_config(path: str | Place, overrides: list[str] | None = None) -> Config:
    """Read a TOML file and apply ``section.key=value`` overrides (values in TOML syntax; bare words are strings).

    Raises
    ------
    ConfigError
        One line naming the file or override, the key, the value and what is allowed.
    """
    return parse_config(_read_toml(path), str(path), overrides)


def load_run_config(path: str | Place, overrides: list[str] | None = None) -> tuple[Config, dict[str, Any]]:
    """The configuration that a run was made with, and the values of its keys that are `RETIRED` since."""
    tree = _read_toml(path)
    retired = {}
    for key in RETIRED:
        section, _, name = key.partition(".")
        if isinstance(tree.get(section), dict) and name in tree[section]:
            retired[key] = value = tree[section].pop(name)
            if not _was_allowed(key, value):
                raise ConfigError(f"{path}: {key} = {shortened(value)}: no version of mach wrote that: copy it anew")
    return parse_config(tree, str(path), overrides), retired


def parse_config(tree: dict[str, Any], where: str, overrides: list[str] | None = None) -> Config:
    """Validate a nested dictionary after overrides; ``where`` names its origin in messages."""
    for override in overrides or []:
        _apply(tree, override)
    for key, reason in RETIRED.items():
        section, _, name = key.partition(".")
        if isinstance(tree.get(section), dict) and name in tree[section]:
            raise ConfigError(f"{where}: {key} is no key any more, leave it out: {reason}")
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, first["loc"][:2]))
        blamed = (f"{at}=", f"{at}.") if first["type"] == "extra_forbidden" else (f"{at}=",)
        given = next((override for override in overrides or [] if override.startswith(blamed)), None)
        raise ConfigError(f"{where if given is None else f'--set {given}'}: {_first_line(error)}") from error


def differing_keys(mine: Config, theirs: Config, ignore: tuple[str, ...] = ()) -> list[str]:
    """Keys whose values differ, each as ``section.key: mine here, theirs there``; ``ignore`` holds prefixes."""
    flat_mine, flat_theirs = _flatten(mine.model_dump()), _flatten(theirs.model_dump())
    keys = sorted(flat_mine.keys() | flat_theirs.keys())
    return [
        f"{key}: {flat_mine.get(key)!r} here, {flat_theirs.get(key)!r} there"
        for key in keys
        if not key.startswith(ignore) and flat_mine.get(key) != flat_theirs.get(key)
    ]


def completed(config: Config, like: Config) -> Config:
    """A configuration with the values of another one for all keys that it leaves out."""
    tree = like.model_dump()
    for section in Config.model_fields:
        tree[section] |= getattr(config, section).model_dump(exclude_unset=True)
    return parse_config(tree, "with the keys of the run")


def fingerprint(config: Config, ignore: tuple[str, ...] = ()) -> str:
    """Digest of all keys but those that begin with one of ``ignore``."""
    kept = {key: value for key, value in _flatten(config.model_dump()).items() if not key.startswith(ignore)}
    return hashlib.blake2b(repr(sorted(kept.items())).encode(), digest_size=16).hexdigest()


def to_toml(config: Config, retired: dict[str, Any] | None = None, *, brief: bool = False) -> str:
    """The configuration as TOML text that `load_config` reads back to an equal object; unset keys are left out.

    With ``retired``, values of retired keys as `load_run_config` returns them, it is that of a run that has them. In
    brief, keys that have their defaults are left out as well.
    """
    tree = config.model_dump(exclude_none=True, exclude_unset=brief)
    for key, value in (retired or {}).items():
        section, _, name = key.partition(".")
        tree[section][name] = value
    return tomli_w.dumps(tree)


def _read_toml(path: str | Place) -> dict[str, Any]:
    try:
        tree = tomllib.loads(read_bytes(place(path), MOST_BYTES).decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot read configuration {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # of integers with very many digits a plain one
        raise ConfigError(f"{path} is not valid TOML: {error!s:.200}") from error
    refuse_wild(tree, path, ConfigError, finite=False)  # options of a trunk may be infinite
    return tree


def _was_allowed(key: str, value: Any) -> bool:
    """Whether a retired key can have had this value: numbers that runs still go by are of usual size."""
    values = value if isinstance(value, list) else [value]
    if isinstance(KINDS.get(key), tuple):
        return isinstance(value, str) and value in KINDS[key]
    if key in KINDS:
        return type(value) in {int, KINDS[key]} and (abs(value) <= MOST_NUMBER if KINDS[key] is float else value >= 0)
    return all(isinstance(one, bool | str | int) or (isinstance(one, float) and abs(one) < inf) for one in values)


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or len(path) < 2 or not all(path):
        raise ConfigError(
            f"--set {override}: write section.key=value, for example training.epochs=5{_elsewhere(path[-1])}"
        )
    value = _value(text)
    if not isinstance(value, list) and _takes_list(*path[:2]):
        value = _value(f"[{text}]")  # hidden=512 and hidden=512,256 as well
        value = value if isinstance(value, list) else [part.strip() for part in text.split(",")]
    node = tree
    for part in path[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(f"--set {override}: {part} is not a section")
    node[path[-1]] = value


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text.strip()  # a bare word, as people type it


def _keys(section: str) -> dict[str, Any]:
    """The fields of a section; none where there is no such section."""
    field = Config.model_fields.get(section)
    return getattr(field.annotation, "model_fields", {}) if field else {}


def _elsewhere(name: str) -> str:
    """As `did_you_mean`, the section that has a key of this name."""
    sections = [section for section in Config.model_fields if name in _keys(section)]
    return f": did you mean {sections[0]}.{name}?" if sections else ""


def _takes_list(section: str, key: str) -> bool:
    field = _keys(section).get(key)
    kinds = (field.annotation, *get_args(field.annotation)) if field else ()
    return any(get_origin(kind) is list for kind in kinds)


def _first_line(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        name = str(first["loc"][-1])
        names = _keys(str(first["loc"][0])) if len(first["loc"]) > 1 else Config.model_fields
        meant = did_you_mean(name, names) or _elsewhere(name)
        return f"unknown key {key}{meant or ';'} known there: {', '.join(names)}"
    if first["type"] == "missing":
        return f"{key} is missing"
    if first["type"] == "value_error":
        return f"{key}: {first['ctx']['error']}".removeprefix(": ")
    meant = ""
    if first["type"] == "literal_error":
        meant = did_you_mean(str(first["input"]), re.findall(r"'([^']*)'", first["ctx"]["expected"]))
    return f"{key} = {shortened(first['input'])}: {first['msg'].lower()}{meant}"


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
