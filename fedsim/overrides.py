"""Overrides: `--set client.lr=0.01`, Flower's `overrides="rounds=3"`, `fedsim.run(rounds=3)`."""

from __future__ import annotations

import json
import shlex
import tomllib
from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

from fedsim import registry, settings
from fedsim.errors import UserError


def applied(tables: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of an experiment's tables with `"section.key=value"` overrides, whatever their order.

    Raises:
        UserError: an override is not of that form.
    """
    changed = deepcopy(dict(tables))
    # a name chooses another object and drops the former one's keys: names go first
    for override in sorted(overrides, key=lambda text: not key_of(text).endswith(".name")):
        _apply(changed, override)
    return changed


def once(overrides: Iterable[str], option: str = "--set") -> list[str]:
    """The overrides of a user, none of which may undo another.

    Raises:
        UserError: two of them set one key, or one sets the whole table of another's key; names both.
    """
    kept: dict[str, str] = {}
    for text in overrides:
        key = key_of(text)
        for other, before in kept.items():
            if before != text and (f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")):
                raise UserError(f"{option} {before} and {option} {text} set one key twice; keep one of them")
        kept[key] = text
    return list(kept.values())


def dotted(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"client": {"lr": 0.1}}` -> `{"client.lr": 0.1}`, however deep."""
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def key_of(override: str) -> str:
    """`"client.lr=0.01"` -> `"client.lr"`."""
    return override.partition("=")[0].strip()


def pair(override: str, option: str = "--set") -> tuple[str, Any]:
    """`"client.lr=0.01"` -> `("client.lr", 0.01)`.

    Raises:
        UserError: it is not of that form.
    """
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"{option} {override}: expected KEY=VALUE, for example {option} client.lr=0.01")
    return key.strip(), toml_value(value.strip())


def toml_value(text: str) -> Any:
    """A TOML value, or the text itself when it is none."""
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text


def split(text: str) -> list[str]:
    """`"rounds=3 client.lr=0.1"` -> list (quotes as in a shell)."""
    return shlex.split(text)


def from_values(values: Mapping[str, Any]) -> list[str]:
    """`{"rounds": 5, "client": {"lr": 0.1}}` -> `["rounds=5", "client.lr=0.1"]`."""
    found = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            found += [f"{key}.{inner}" for inner in from_values(value)]
        elif value is None:
            raise UserError(f"{key}: None cannot stand in an experiment; leave the key out")
        else:
            found.append(f"{key}={json.dumps(value)}")
    return found


def _apply(tables: dict[str, Any], override: str) -> None:
    key, chosen = pair(override)
    *path, last = key.split(".")
    place = tables
    for part in path:
        inner = place.setdefault(part, {})
        if not isinstance(inner, dict):
            raise UserError(f"--set {override}: '{part}' is a value, not a section")
        place = inner
    if len(path) == 1 and last == "name" and chosen != place.get("name", settings.DEFAULT_NAMES.get(path[0])):
        # another object: the keys of the former one do not belong to it, those common to all do
        kept = registry.schema(settings.COMMON[path[0]]).model_fields if path[0] in settings.COMMON else {}
        for old in [old for old in place if old not in kept]:
            del place[old]
    place[last] = chosen
