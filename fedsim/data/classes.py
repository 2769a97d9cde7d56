"""Class names: which class a word means, how a class is written down, and a node's labels as the server's.

A name comes first. `index:N` is the class at position N. A bare number that is no name is a position too, but
only where no name is a number: among folders 0, 1, 10, 11, 2 the number 4 could be either, and is refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from fedsim.data.sources import Arrays
from fedsim.errors import UserError, nearest

Word = str | int

_POSITION = "index:"
_NUMBER = re.compile(r"[-+]?\d+")
_SHOWN = 20


def position_of(word: Word, names: Sequence[str], where: str) -> int:
    """Position of the class that a word or number means.

    Args:
        word: a name, `index:N`, or a number.
        names: class names in the order of the labels.
        where: what to call the word in messages (`--class`, `[forget] classes`).

    Raises:
        UserError: there is no such class, or the word could mean two.
    """
    text = str(word)
    alike = [position for position, name in enumerate(names) if name == text]
    if len(alike) == 1:
        return alike[0]
    if alike:
        ways = " or ".join(f"{_POSITION}{position}" for position in alike)
        raise UserError(f"{where} {text}: {len(alike)} classes have this name; write {ways}")
    explicit = text.startswith(_POSITION)
    digits = text.removeprefix(_POSITION)
    there = digits.isdecimal() and int(digits) < len(names)
    numbered = any(_NUMBER.fullmatch(name) for name in names)
    if there and (explicit or not numbered):
        return int(digits)
    if there:
        raise UserError(
            f"{where} {text}: no class is named '{text}', and names that are numbers make a bare number "
            f"ambiguous; write a name ({nearest(text, names)}), or {_POSITION}{int(digits)} for the class at "
            f"that position, '{names[int(digits)]}'"
        )
    last = len(names) - 1
    places = f"{_POSITION}0 to {_POSITION}{last}" if numbered else f"0 to {last}"
    raise UserError(
        f"{where} {text}: there is no such class; by number {places}, or by name: {nearest(text, names)}"
    )


def positions_of(words: Iterable[Word], names: Sequence[str], where: str) -> list[int]:
    """`position_of` of several words, each class once."""
    return list(dict.fromkeys(position_of(word, names, where) for word in words))


def written(position: int, names: Sequence[str]) -> Word:
    """A word that `position_of` reads back: the class's number where that is one, its name, or `index:N`."""
    for word in (position, names[position]):
        try:
            if position_of(word, names, "") == position:
                return word
        except UserError:
            continue
    return f"{_POSITION}{position}"


def as_the_server(arrays: Arrays, names: Sequence[str], where: str) -> Arrays:
    """A node's own data with the server's classes and labels, matched by class name.

    The node may lack classes and may have them in another order. Names without samples are of no account.

    Args:
        arrays: the node's data; unnamed integer labels have their values as names.
        names: the server's classes in the order of its labels.
        where: what to call the data in messages.

    Raises:
        UserError: the node has samples of a class that the server does not know, or a name occurs twice.
    """
    own = arrays.classes
    if own == tuple(names):
        return arrays
    used = np.union1d(arrays.train_y, arrays.test_y).tolist()
    wanted = [own[label] for label in used]
    theirs, ours = Counter(names), Counter(wanted)
    unknown = [name for name in wanted if name not in theirs]
    if unknown:
        more = f" (nor {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise UserError(
            f"{where}: the server knows no class '{unknown[0]}'{more}; its classes are {_listed(names)}; "
            'rename the class folder, or name the labels (an npz file: an array "classes")'
        )
    twice = [name for name in wanted if theirs[name] > 1 or ours[name] > 1]
    if twice:
        raise UserError(
            f"{where}: class '{twice[0]}' occurs twice, here or in the server's data, so labels cannot be "
            "matched by name; rename one"
        )
    position = {name: number for number, name in enumerate(names)}
    there = np.full(len(own), -1, np.int64)
    there[used] = [position[name] for name in wanted]
    train_y, test_y = (there[np.asarray(labels)] for labels in (arrays.train_y, arrays.test_y))
    return replace(arrays, classes=tuple(names), train_y=train_y, test_y=test_y)


def _listed(names: Sequence[str]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
