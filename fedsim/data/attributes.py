"""Attributes: what is known of a sample besides its label (glasses, gender, user).

Their values stand beside the labels, one column per attribute, float32 [n, attributes]: the position of a
categorical value (-1: not known), or the number itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsim import json_text
from fedsim.errors import UserError, nearest

Column = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
UNKNOWN = -1
_MOST = 1000  #: values of a categorical attribute


@dataclass(frozen=True)
class Attribute:
    """One attribute.

    Args:
        name: how it is asked for.
        values: names of the values of a categorical one, in order of their codes; empty: a number.
    """

    name: str
    values: tuple[str, ...] = ()

    @property
    def groups(self) -> int:
        """How many values it has (0: a number)."""
        return len(self.values)

    @property
    def columns(self) -> int:
        """How many numbers say all about it: one of a number, one less than values of a categorical one."""
        return max(self.groups - 1, 1)


def positions(names: Iterable[str], known: Sequence[Attribute]) -> list[int]:
    """Columns of some attributes, in the order asked for.

    Raises:
        UserError: one of them is unknown.
    """
    places = {attribute.name: place for place, attribute in enumerate(known)}
    for name in names:
        if name not in places:
            if not known:
                raise UserError(f"attribute '{name}': these data have no attributes")
            raise UserError(f"the data have no attribute '{name}': {nearest(name, places)}")
    return [places[name] for name in names]


def coded(
    parts: Mapping[str, npt.NDArray[Any]], name: str, where: str, values: Sequence[str] | None = None
) -> tuple[Attribute, dict[str, Column]]:
    """An attribute out of raw columns: integers are codes (-1: not known), text is coded, floats are numbers.

    Floats that are two whole numbers at most (0.0 and 1.0, say) are codes, too.

    Args:
        parts: columns [n] of the same kind by part, `train` and `test`.
        name: of the attribute.
        where: what to call them in messages.
        values: names of the codes, if there are any.

    Raises:
        UserError: a column is none, or holds NaN, or a code below -1.
    """
    everything = np.concatenate(list(parts.values()))
    if everything.ndim != 1 or everything.dtype.kind not in "uifbUS":
        raise UserError(
            f"{where}: must be integers, numbers or text [n], not {everything.dtype} {list(everything.shape)}"
        )
    if everything.dtype.kind == "f":
        bad = np.flatnonzero(~np.isfinite(everything))
        if len(bad):
            raise UserError(
                f"{where}: sample {bad[0]} is NaN or infinite; leave such samples out, or make the attribute "
                "categorical (integers), where -1 says 'not known'"
            )
        values_there = np.unique(everything)
        if len(values_there) > 2 or (values_there % 1 != 0).any():
            return Attribute(name), {part: column.astype(np.float32) for part, column in parts.items()}
        parts = {part: column.astype(np.int64) for part, column in parts.items()}
        everything = everything.astype(np.int64)
    if everything.dtype.kind in "US":
        texts = everything.astype(str)
        values = sorted(set(texts.tolist()) - {""})
        code = {text: number for number, text in enumerate(values)} | {"": UNKNOWN}
        found = {p: np.array([code[str(v)] for v in column], np.float32) for p, column in parts.items()}
        return Attribute(name, tuple(values)), found
    if everything.min(initial=0) < UNKNOWN:
        raise UserError(
            f"{where}: code {everything.min()} is negative; codes count from 0, -1 is 'not known'"
        )
    count = 1 + int(everything.max(initial=0))
    if count > _MOST:
        raise UserError(
            f"{where}: code {count - 1} is too large, codes count from 0 and there may be {_MOST} of them; "
            "write text for names, decimal points for numbers"
        )
    names = tuple(values) if values is not None else tuple(map(str, range(count)))
    if len(names) < count:
        raise UserError(f"{where}: code {count - 1} has no name, there are {len(names)}: {', '.join(names)}")
    return Attribute(name, names), {part: column.astype(np.float32) for part, column in parts.items()}


def to_json(attributes: Iterable[Attribute]) -> str:
    """What a server tells the nodes, whose own data may lack values or attributes."""
    return json.dumps([[attribute.name, attribute.values] for attribute in attributes])


def from_json(text: str) -> tuple[Attribute, ...]:
    """The inverse of `to_json`.

    Raises:
        UserError: it is something else; it comes from a server.
    """
    source = "the server's list of attributes"
    try:
        found = json_text.received(text, source)
    except ValueError as error:
        raise UserError(str(error)) from error
    attributes = []
    for row in found if isinstance(found, list) else [None]:
        match row:
            case [str(name), [*values]] if all(isinstance(value, str) for value in values):
                attributes.append(Attribute(name, tuple(values)))
            case _:
                raise UserError(f"{source} has {str(row)[:80]} where a name and its values should be")
    return tuple(attributes)


def conformed(
    own: Sequence[Attribute], z: Column | None, wanted: Sequence[Attribute], samples: int, where: str
) -> Column:
    """A node's own values as the server codes them, float32 [samples, wanted]; what it lacks is unknown.

    Args:
        own: attributes of the node's data, in the order of z's columns.
        z: their values, or None.
        wanted: attributes of the server's data.
        samples: rows.
        where: what to call the data in messages.

    Raises:
        UserError: a value that the server does not know, a number where it has groups, or no number.
    """
    known = {attribute.name: place for place, attribute in enumerate(own)}
    found = np.full((samples, len(wanted)), UNKNOWN, np.float32)
    for column, attribute in enumerate(wanted):
        if z is None or attribute.name not in known:
            if not attribute.groups:
                raise UserError(f"{where}: attribute '{attribute.name}' is missing; a number must be known")
            continue
        mine = own[known[attribute.name]]
        values = np.asarray(z)[:, known[attribute.name]]
        if bool(mine.groups) != bool(attribute.groups):
            kind = "a number" if mine.groups else "codes or text"
            raise UserError(f"{where}: attribute '{attribute.name}' must be {kind}, as in the server's data")
        strange = set(mine.values) - set(attribute.values)
        if strange:
            raise UserError(
                f"{where}: attribute '{attribute.name}' has the value '{min(strange)}'; the server knows "
                f"{', '.join(attribute.values)}"
            )
        code = np.array([*(attribute.values.index(value) for value in mine.values), UNKNOWN], np.float32)
        found[:, column] = code[values.astype(np.int64)] if mine.groups else values
    return found


def complaint(attributes: Sequence[Attribute], z: npt.NDArray[Any] | None, samples: int) -> str | None:
    """Why a table of attributes cannot be used, in words; None when it can."""
    if z is None:
        return "attributes are named, but there is no column of them" if attributes else None
    if z.shape != (samples, len(attributes)) or z.dtype != np.float32:
        return f"attributes must be float32 [{samples}, {len(attributes)}], not {z.dtype} {list(z.shape)}"
    for attribute, column in zip(attributes, z.T, strict=True):
        if not np.isfinite(column).all():
            bad = int((~np.isfinite(column)).sum())
            return f"attribute '{attribute.name}' is NaN or infinite in {bad} samples; -1 is 'not known'"
        if attribute.groups and not np.isin(column, np.arange(UNKNOWN, attribute.groups)).all():
            return f"attribute '{attribute.name}' has codes outside -1 to {attribute.groups - 1}"
    return None


def check(
    names: Sequence[str], known: Sequence[Attribute], parts: Mapping[str, npt.NDArray[Any]], labels: Labels
) -> None:
    """Whether attributes can be unlearned and measured, and do not say which class a sample has.

    Args:
        names: attributes to be unlearned.
        known: the data's attributes, in the order of the columns.
        parts: values [n, attributes] by part, `training` and `test`.
        labels: of the training samples [n].

    Raises:
        UserError: one is named twice, has one value only, or determines the label, alone or with others.
    """
    places = positions(names, known)
    for name, place in zip(names, places, strict=True):
        if names.count(name) > 1:
            raise UserError(f"[detacher] attributes names '{name}' twice")
        for part, z in parts.items():
            _check_values(known[place], z[:, place], part)
        if _determines(known[place], parts["training"][:, place], labels):
            raise UserError(
                f"[detacher] attribute '{name}' determines the task's label: a representation that loses it "
                "loses the task; choose another attribute, or another label"
            )
    groups = [place for place in places if known[place].groups]
    z = parts["training"][:, groups]
    if len(groups) > 1 and _tells(z[(z != UNKNOWN).all(1)], labels[(z != UNKNOWN).all(1)]):
        both = ", ".join(known[place].name for place in groups)
        raise UserError(
            f"[detacher] attributes {both} determine the task's label together: a representation that loses "
            "them loses the task; leave one out"
        )


def _check_values(attribute: Attribute, z: npt.NDArray[Any], part: str) -> None:
    found = np.unique(z[z != UNKNOWN] if attribute.groups else z)
    if len(found) > 1:
        return
    names = [attribute.values[int(code)] for code in found] if attribute.groups else found.tolist()
    what = f"one value, {names[0]}," if names else "no known value"
    hint = (
        " (-1 says 'not known': write -1 and 1 as 0 and 1)"
        if attribute.groups and (z == UNKNOWN).any()
        else ""
    )
    raise UserError(
        f"[detacher] attribute '{attribute.name}' has {what} in the {part} data{hint}; there is nothing to "
        "unlearn or to measure"
    )


def _determines(attribute: Attribute, z: npt.NDArray[Any], labels: Labels) -> bool:
    """Whether the values of one attribute give the label away; those of a number by thresholds."""
    if attribute.groups:
        return _tells(z[z != UNKNOWN, None], labels[z != UNKNOWN])
    order = np.lexsort((labels, z))
    changes = np.count_nonzero(np.diff(labels[order]))
    return bool(0 < changes == len(np.unique(labels)) - 1 and _tells(z[:, None], labels))


def _tells(z: npt.NDArray[Any], labels: Labels) -> bool:
    """Whether each combination of values [n, k] comes with one label, and labels differ."""
    pairs = np.unique(np.column_stack([z, labels]), axis=0)
    return len(pairs) == len(np.unique(pairs[:, :-1], axis=0)) and len(np.unique(labels)) > 1
