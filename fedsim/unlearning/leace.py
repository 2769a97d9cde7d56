"""LEACE: the smallest affine change of h after which no linear reader finds z (arXiv 2306.03819, Th. 4.3).

    r(h) = h - W⁺ P W (h - µ)          W = Σ_hh^(-1/2),  P projects on the columns of W Σ_hz

in the low-rank form r(h) = h - ((h - µ) left) right with left = W U [d, q], right = Uᵀ W⁺ [q, d], where the
columns of U are an orthonormal basis of those of W Σ_hz.

A feature of which next to nothing is left is set to its mean: what remains of it is the rounding of float32,
which depends on z as the feature itself did and would be read by whoever divides by its standard deviation.

Cov(r(h), z) = 0 holds exactly on the samples behind the moments, for every invertible W: shrinkage of Σ_hh
changes how far h moves, not what is erased.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import UserError
from fedsim.unlearning.moments import Floats, Moments

_TOLERANCE = 1e-10  #: a correlation below this is none
_CONSTANT = 1e-6  #: deviation of an attribute, as a part of its size, below which it is rounding
_ROUNDING = 1e-4  #: what is left of a feature, as a part of its size, below which float32 tells z


@dataclass(frozen=True)
class Erasure:
    """The affine map, in float64.

    Attributes:
        mean: µ [d].
        left: [d, q]; columns beyond the rank are zero.
        right: [q, d].
        keep: bool [d]; a feature that is not kept is set to its mean.
        shrinkage: share of the spherical part in the covariance (0: none was needed).
    """

    mean: Floats
    left: Floats
    right: Floats
    keep: NDArray[np.bool_]
    shrinkage: float

    def __call__(self, h: Floats) -> Floats:
        """Erase: [n, d] -> [n, d]."""
        return np.where(self.keep, h - (h - self.mean) @ self.left @ self.right, self.mean)


def leace(moments: Moments) -> Erasure:
    """The eraser for some moments.

    With fewer samples than twice the features the covariance is shrunk towards a sphere by d / (d + n): a
    nearly singular one would make W blow up noise.

    Raises:
        UserError: there are no two samples, or the moments are not finite.
    """
    width, columns = moments.hz.shape
    if moments.count < 2:
        raise UserError(
            "leace: no client has two samples whose attribute is known; check the data's attribute"
        )
    sigma = moments.covariance
    if not (np.isfinite(sigma).all() and np.isfinite(moments.hz).all()):
        raise UserError("leace: the representations are not finite; training diverged: lower client.lr")
    share = width / (width + moments.count) if moments.count < 2 * width else 0.0
    sigma = (1 - share) * sigma + share * np.trace(sigma) / width * np.eye(width)
    values, vectors = np.linalg.eigh((sigma + sigma.T) / 2)
    alive = values > values.max() * width * np.finfo(np.float64).eps
    root = np.where(alive, np.sqrt(np.where(alive, values, 1)), 0)
    inverse = np.where(alive, 1 / np.where(alive, root, 1), 0)
    whiten, unwhiten = (vectors * inverse) @ vectors.T, (vectors * root) @ vectors.T
    varies = moments.deviation > _CONSTANT * np.sqrt(moments.zz / moments.count)
    scale = np.where(varies, moments.deviation, np.inf)
    basis, strength, _ = np.linalg.svd(whiten @ moments.cross_covariance / scale, full_matrices=False)
    basis = basis * (strength > _TOLERANCE)
    left, right = np.zeros((width, columns)), np.zeros((columns, width))
    left[:, : basis.shape[1]] = whiten @ basis
    right[: basis.shape[1]] = basis.T @ unwhiten
    rest = np.eye(width) - left @ right
    left_over = np.einsum("ij,ik,kj->j", rest, moments.covariance, rest, optimize=True)
    size = np.sqrt(np.diag(moments.hh) / moments.count)
    floor = np.maximum(_ROUNDING * size, _TOLERANCE * size.max())  # the second is for dead features
    keep = np.sqrt(np.maximum(left_over, 0)) > floor
    return Erasure(moments.mean, left, right, keep, share)
