"""First and second moments of representations and attributes: additive, so that federated equals pooled.

    n, Σ h [d], Σ h hᵀ [d, d], Σ z [q], Σ z² [q], Σ h zᵀ [d, q]        float64, where all attributes are known

z is coded for linear algebra: a number as it is, a categorical attribute as indicators of all values but the
first (q columns in all). Sums of different clients add up, so a secure aggregation may hide each of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.data.attributes import Attribute

Floats = NDArray[np.float64]
LARGEST = 4096  #: width of h up to which its [d, d] sums are taken (134 MB)


@dataclass(frozen=True)
class Moments:
    """Sums over some samples; one element of an algebra with `+`."""

    count: float
    h: Floats
    hh: Floats
    z: Floats
    zz: Floats
    hz: Floats

    @classmethod
    def of(cls, h: Floats, z: Floats) -> Moments:
        """Of representations [n, d] and coded attributes [n, q], float64."""
        return cls(float(len(h)), h.sum(0), h.T @ h, z.sum(0), (z * z).sum(0), h.T @ z)

    def __add__(self, other: Moments) -> Moments:
        return Moments(*(getattr(self, name) + getattr(other, name) for name in self.names()))

    @staticmethod
    def names() -> tuple[str, ...]:
        """Of the sums, as they travel."""
        return ("count", "h", "hh", "z", "zz", "hz")

    def arrays(self) -> dict[str, NDArray[Any]]:
        """As arrays by name, all float64."""
        return {name: np.atleast_1d(np.asarray(getattr(self, name), np.float64)) for name in self.names()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Moments:
        """The inverse of `arrays`."""
        parts = {name: np.asarray(arrays[name], np.float64) for name in cls.names()}
        return cls(float(parts.pop("count")[0]), **parts)

    @property
    def mean(self) -> Floats:
        """Of h [d]."""
        return self.h / self.count

    @property
    def covariance(self) -> Floats:
        """Of h [d, d]."""
        return self.hh / self.count - np.outer(self.mean, self.mean)

    @property
    def deviation(self) -> Floats:
        """Standard deviation of z [q]."""
        variance = self.zz / self.count - (self.z / self.count) ** 2
        return np.sqrt(np.maximum(variance, 0))

    @property
    def cross_covariance(self) -> Floats:
        """Of h and z [d, q]."""
        return self.hz / self.count - np.outer(self.mean, self.z / self.count)


def shapes(width: int, columns: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays for representations of `width` numbers and z of `columns`."""
    z = (columns,)
    return {"count": (1,), "h": (width,), "hh": (width, width), "z": z, "zz": z, "hz": (width, columns)}


def coded(z: Tensor, attributes: Sequence[Attribute]) -> Tensor:
    """Attributes [n, a] -> columns for linear algebra, float64 [n, q] (see the module's docstring)."""
    columns = [
        (z[:, i, None] == torch.arange(1, a.groups, device=z.device)) if a.groups else z[:, i, None]
        for i, a in enumerate(attributes)
    ]
    return torch.cat([column.double() for column in columns], 1)


def known(z: Tensor, attributes: Sequence[Attribute]) -> Tensor:
    """Which samples have all attributes known: bool [n]."""
    categorical = [i for i, attribute in enumerate(attributes) if attribute.groups]
    return (z[:, categorical] >= 0).all(1)
