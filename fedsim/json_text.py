"""JSON in both directions: files of figures, which may hold NaN, and text from outside, which may be hostile.

JSON has no NaN. In our files a number that is not finite is the string "NaN", "Infinity" or "-Infinity", as
protocol buffers write it; every JSON reader takes it, and `load` gives the number back.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

_NAMES = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
#: keys whose values are text whatever it says: a run may be called "NaN"
_TEXTS = frozenset({"name", "run", "strategy"})

#: most bytes of a JSON text from outside, and how deep it may be nested
SIZE, DEPTH = 8 * 2**20, 32
#: possessive: else a string of 8 MB takes a gigabyte to remember where it could go back to
_MARKS = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[{\]}]', re.DOTALL)


def dump(value: Any, indent: int | None = None) -> str:
    """JSON that every reader takes, whatever numbers there are."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_named(value), indent=indent, allow_nan=False)


def load(text: str) -> Any:
    """The inverse of `dump`.

    Raises:
        ValueError: it is not JSON.
    """
    return json.loads(text, object_hook=_numbers)


def received(text: str | bytes, what: str) -> Any:
    """A JSON text from outside; its size and depth are looked at before it is parsed.

    Args:
        text: from a node, or from a server.
        what: what to call it in the message.

    Raises:
        ValueError: it is no JSON, too large, or nested too deep.
    """
    if len(text) > SIZE:
        raise ValueError(f"{what} is larger than {SIZE} bytes")
    try:
        plain = text.decode() if isinstance(text, bytes) else text
        if _depth(plain) > DEPTH:
            raise ValueError(f"nested more than {DEPTH} deep")
        return json.loads(plain)
    except ValueError as error:
        raise ValueError(f"{what} cannot be read as JSON: {error}") from error


def _depth(text: str) -> int:
    """How deep brackets are nested; those inside strings do not count."""
    if text.count("[") + text.count("{") <= DEPTH:
        return 0
    depth = deepest = 0
    for mark in _MARKS.finditer(text):
        first = mark[0][0]
        if first in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif first in "]}":
            depth -= 1
    return deepest


def _named(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _named(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_named(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _numbers(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value if key in _TEXTS else _number(value) for key, value in found.items()}


def _number(value: Any) -> Any:
    if isinstance(value, str):
        return _NAMES.get(value, value)
    if isinstance(value, list):
        return [_number(inner) for inner in value]
    return value
