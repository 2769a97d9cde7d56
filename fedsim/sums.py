"""Exact sums of what clients send: floating-point sums that do not depend on who computed them.

A mean is a sum of `weight * values` and of `weight`, both float64, divided and cast once at the end.
Floating-point sums depend on their order, so the order is fixed: one binary tree over the positions of
the cohort (clients in order of partition id). A leaf whose reply is missing or refused is skipped; it
does not shift its neighbours. An aligned block of 2^k positions is one subtree, so a worker may sum its
own block and the result stays bit-identical.

        ((0+1)+(2+3)) + ((4+5)+(6+·))          7 clients; client 7 would join at the dot
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

#: what a client weighs: its training samples n_k, one, or the samples that it passed through in the round
Weighting = Literal["examples", "uniform", "samples-seen"]

_PIECE = 2**15  #: values that are worked on at a time
_TOGETHER = 16  #: leaves that are summed in one pass
_WAITING = 2**26  #: bytes of leaves that may wait for that; two wait in any case


class Leaf(NamedTuple):
    """What one client sent: arrays, their weight, and of some of them weights of the rows."""

    values: Mapping[str, NDArray[Any]]
    weight: float
    rows: Mapping[str, NDArray[Any]] | None = None


class Pair(NamedTuple):
    """What two or more clients sent, not yet summed."""

    left: Raw
    right: Raw
    clients: int
    nbytes: int


Raw: TypeAlias = Leaf | Pair


@dataclass
class WeightedSum:
    """Σ weight·values and Σ weight of some clients (one element of an algebra with `+`)."""

    arrays: dict[str, NDArray[Any]]
    weight: float
    largest: dict[str, NDArray[Any]] = field(default_factory=dict)  #: integer entries: their maximum
    rows: dict[str, NDArray[Any]] = field(default_factory=dict)  #: where rows have weights: Σ of them

    @classmethod
    def of(
        cls,
        values: Mapping[str, NDArray[Any]],
        weight: float,
        rows: Mapping[str, NDArray[Any]] | None = None,
    ) -> WeightedSum:
        """A leaf. Integer entries (counters of BatchNorm, say) are not averaged: the maximum is kept.

        Args:
            values: name -> array.
            weight: of all of them, but for
            rows: name -> weights of the rows of that array, float64 [rows].
        """
        rows = rows or {}
        floating = {k: v for k, v in values.items() if v.dtype.kind in "fc"}
        return cls(
            arrays={
                k: np.multiply(v, _per_row(rows[k], v) if k in rows else weight, dtype=np.float64)
                for k, v in floating.items()
            },
            weight=float(weight),
            largest={k: v for k, v in values.items() if k not in floating},
            rows={k: np.array(v) for k, v in rows.items()},
        )

    @classmethod
    def of_raw(cls, node: Raw) -> WeightedSum:
        """The sum of what some clients sent, along their tree: bit for bit `of` and `add`, in one pass."""
        leaves = list(_leaves(node))
        plain = {
            name
            for name, values in leaves[0].values.items()
            if values.dtype.kind == "f" and all(_is_plain(leaf, name) for leaf in leaves)
        }
        rest = cls._of_parts(node, plain)
        pieces = [np.empty(_PIECE, np.float64) for _ in range(_height(node))]
        rest.arrays |= {name: _scaled_sum(name, node, leaves, pieces) for name in plain}
        return rest

    @classmethod
    def _of_parts(cls, node: Raw, without: Set[str]) -> WeightedSum:
        """The same array after array, less some of them."""
        if isinstance(node, Leaf):
            values = {k: v for k, v in node.values.items() if k not in without}
            return cls.of(values, node.weight, node.rows)
        return cls._of_parts(node.left, without).add(cls._of_parts(node.right, without))

    def add(self, other: WeightedSum) -> WeightedSum:
        """`self + other`, into the buffers of `self` where they can be written to (both are given up)."""
        for name, values in other.arrays.items():
            mine = self.arrays[name]
            self.arrays[name] = np.add(mine, values, out=mine if mine.flags.writeable else None)
        self.weight += other.weight
        self.largest = {k: np.maximum(v, other.largest[k]) for k, v in self.largest.items()}
        self.rows = {k: v + other.rows[k] for k, v in self.rows.items()}
        return self

    def mean(
        self, dtypes: Mapping[str, str], old: Mapping[str, NDArray[Any]] | None = None
    ) -> dict[str, NDArray[Any]]:
        """The weighted mean, cast once to the given dtypes, in their order.

        Args:
            dtypes: name -> dtype.
            old: where rows have weights of their own: what a row without any weight stays at.
        """
        old = old or {}
        return {
            name: self.largest[name] if name in self.largest else self._mean(name, dtype, old)
            for name, dtype in dtypes.items()
        }

    def _mean(self, name: str, dtype: str, old: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        total = self.arrays[name]
        if name not in self.rows:
            return _quotient(total, self.weight, dtype)
        weights = _per_row(self.rows[name], total)
        return np.where(weights > 0, total / np.where(weights > 0, weights, 1), old[name]).astype(dtype)


def _leaves(node: Raw) -> Iterator[Leaf]:
    """From left to right."""
    if isinstance(node, Leaf):
        yield node
    else:
        yield from _leaves(node.left)
        yield from _leaves(node.right)


def _height(node: Raw) -> int:
    return 0 if isinstance(node, Leaf) else 1 + max(_height(node.left), _height(node.right))


def _is_plain(leaf: Leaf, name: str) -> bool:
    return leaf.values[name].flags.c_contiguous and name not in (leaf.rows or ())


def _scaled_sum(
    name: str, node: Raw, leaves: Sequence[Leaf], more: Sequence[NDArray[np.float64]]
) -> NDArray[Any]:
    """Σ weight·values of one array, in pieces that stay in a core's cache.

    Args:
        name: of the array.
        node: in which order to add.
        leaves: of the node, from left to right.
        more: a piece of memory for each level of the node.
    """
    flat = [leaf.values[name].reshape(-1) for leaf in leaves]
    total = np.empty(len(flat[0]), np.float64)
    for start in range(0, len(total), _PIECE):
        out = total[start : start + _PIECE]
        parts = (values[start : start + _PIECE] for values in flat)
        _fill(out, node, parts, [piece[: len(out)] for piece in more])
    return total.reshape(leaves[0].values[name].shape)


def _fill(
    out: NDArray[np.float64],
    node: Raw,
    parts: Iterator[NDArray[Any]],
    more: Sequence[NDArray[np.float64]],
) -> None:
    """Write the sum of the next parts."""
    if isinstance(node, Leaf):
        # cast, then multiply in place: several times as fast as a multiplication that casts
        np.copyto(out, next(parts))
        out *= node.weight
    else:
        _fill(out, node.left, parts, more[1:])
        _fill(more[0], node.right, parts, more[1:])
        out += more[0]


def _quotient(total: NDArray[Any], weight: float, dtype: str) -> NDArray[Any]:
    """`(total / weight).astype(dtype)`, in pieces that stay in a core's cache."""
    found = np.empty(total.shape, dtype)
    above, out = total.reshape(-1), found.reshape(-1)
    for start in range(0, len(above), _PIECE):
        out[start : start + _PIECE] = above[start : start + _PIECE] / weight
    return found


def _per_row(weights: NDArray[Any], array: NDArray[Any]) -> NDArray[Any]:
    """Weights [rows] in the shape that multiplies the rows of an array."""
    return weights.reshape(-1, *[1] * (array.ndim - 1))


class TreeSum:
    """Adds subtrees of the fixed binary tree in any order; siblings are added as soon as both are there.

    The subtree `index` of level k covers the positions index·2^k up to (index + 1)·2^k; a leaf is a
    subtree of level 0. In order of position, O(log n) partial sums are held.
    """

    def __init__(self) -> None:
        self._parts: dict[tuple[int, int], WeightedSum | Raw | None] = {}
        self._height = 0

    def add(self, part: WeightedSum | Raw | None, index: int, level: int = 0) -> None:
        """Add one subtree (None: nothing there, which lets its sibling move up); no two may overlap."""
        self._height = max(self._height, level + index.bit_length())
        while (level, index ^ 1) in self._parts:
            sibling = self._parts.pop((level, index ^ 1))
            part = plus(sibling, part) if index & 1 else plus(part, sibling)
            level, index = level + 1, index >> 1
        self._parts[level, index] = part

    def add_leaf(
        self,
        values: Mapping[str, NDArray[Any]],
        weight: float,
        index: int,
        rows: Mapping[str, NDArray[Any]] | None = None,
    ) -> None:
        """Add what one client sent, which is kept until its sibling is there; a weight of 0 is nothing."""
        self.add(Leaf(values, weight, rows) if weight > 0 else None, index)

    def total(self) -> WeightedSum | None:
        """The sum of everything added (which is given up); what was never added counts as nothing."""
        part = self._take(self._height, 0)
        return None if part is None else _summed(part)

    def _take(self, level: int, index: int) -> WeightedSum | Raw | None:
        if (level, index) in self._parts:
            return self._parts.pop((level, index))
        if level == 0 or not self._parts:
            return None
        return plus(self._take(level - 1, 2 * index), self._take(level - 1, 2 * index + 1))


def plus(left: WeightedSum | Raw | None, right: WeightedSum | Raw | None) -> WeightedSum | Raw | None:
    """`left + right`, where None is nothing; few and small leaves are added later, in one pass."""
    if left is None or right is None:
        return left if right is None else right
    if isinstance(left, WeightedSum) or isinstance(right, WeightedSum):
        return _summed(left).add(_summed(right))
    (one, size), (two, more) = _extent(left), _extent(right)
    pair = Pair(left, right, one + two, size + more)
    waits = 2 * pair.clients <= _TOGETHER and 2 * pair.nbytes <= _WAITING
    return pair if waits else WeightedSum.of_raw(pair)


def _extent(node: Raw) -> tuple[int, int]:
    """Clients, bytes."""
    if isinstance(node, Leaf):
        return 1, sum(values.nbytes for values in node.values.values())
    return node.clients, node.nbytes


def _summed(part: WeightedSum | Raw) -> WeightedSum:
    """What is not yet summed; a sum as it is."""
    return part if isinstance(part, WeightedSum) else WeightedSum.of_raw(part)
