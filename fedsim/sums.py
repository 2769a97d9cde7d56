"""Exact sums of what clients send: floating-point sums that do not depend on who computed them.

A mean is a sum of `weight * values` and of `weight`, both float64, divided and cast once at the end.
Floating-point sums depend on their order, so the order is fixed: one binary tree over the positions of
the cohort (clients in order of partition id). A leaf whose reply is missing or refused is skipped; it
does not shift its neighbours. An aligned block of 2^k positions is one subtree, so a worker may sum its
own block and the result stays bit-identical.

        ((0+1)+(2+3)) + ((4+5)+(6+·))          7 clients; client 7 would join at the dot
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Weighting = Literal["examples", "uniform"]

_PIECE = 2**15  #: values that are worked on at a time


class Leaf(NamedTuple):
    """What one client sent: arrays, their weight, and of some of them weights of the rows."""

    values: Mapping[str, NDArray[Any]]
    weight: float
    rows: Mapping[str, NDArray[Any]] | None = None


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
    def of_two(cls, left: Leaf, right: Leaf) -> WeightedSum:
        """`of(*left) + of(*right)`, bit for bit, in one pass over plain arrays."""
        plain = {
            name
            for name, values in left.values.items()
            if values.dtype.kind in "fc"
            and values.flags.c_contiguous
            and right.values[name].flags.c_contiguous
            and name not in (left.rows or {})
            and name not in (right.rows or {})
        }
        rest = (
            cls.of({k: v for k, v in leaf.values.items() if k not in plain}, leaf.weight, leaf.rows)
            for leaf in (left, right)
        )
        both = next(rest).add(next(rest))
        both.arrays |= {name: _scaled_sum(name, left, right) for name in plain}
        return both

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


def _scaled_sum(name: str, left: Leaf, right: Leaf) -> NDArray[Any]:
    """Σ weight·values of one array of two leaves, in pieces that stay in a core's cache."""
    one, two = left.values[name].reshape(-1), right.values[name].reshape(-1)
    total = np.empty(len(one), np.float64)
    scaled = np.empty(min(_PIECE, len(one)), np.float64)
    for start in range(0, len(one), _PIECE):
        out = total[start : start + _PIECE]
        more = scaled[: len(out)]
        # cast, then multiply in place: several times as fast as a multiplication that casts
        np.copyto(out, one[start : start + _PIECE])
        out *= left.weight
        np.copyto(more, two[start : start + _PIECE])
        more *= right.weight
        out += more
    return total.reshape(left.values[name].shape)


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
        self._parts: dict[tuple[int, int], WeightedSum | Leaf | None] = {}
        self._height = 0

    def add(self, part: WeightedSum | Leaf | None, index: int, level: int = 0) -> None:
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

    def _take(self, level: int, index: int) -> WeightedSum | Leaf | None:
        if (level, index) in self._parts:
            return self._parts.pop((level, index))
        if level == 0 or not self._parts:
            return None
        return plus(self._take(level - 1, 2 * index), self._take(level - 1, 2 * index + 1))


def plus(left: WeightedSum | Leaf | None, right: WeightedSum | Leaf | None) -> WeightedSum | Leaf | None:
    """`left + right`, where None is nothing."""
    if left is None or right is None:
        return left if right is None else right
    if isinstance(left, Leaf) and isinstance(right, Leaf):
        return WeightedSum.of_two(left, right)
    return _summed(left).add(_summed(right))


def _summed(part: WeightedSum | Leaf) -> WeightedSum:
    """A leaf as a sum; a sum as it is."""
    return WeightedSum.of(*part) if isinstance(part, Leaf) else part
