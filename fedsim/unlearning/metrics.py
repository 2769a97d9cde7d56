"""Figures of forgetting, all to be read beside models retrained without the data."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_TINY = 1e-12


def tow(unlearned: Sequence[float], retrained: Sequence[float]) -> float:
    """Tug of war: Π (1 - |difference|) over forget, retain and test accuracy; 1 is retraining.

    (Zhao et al., arXiv 2406.01257; formula from memory, not from the paper's text.)
    """
    return float(np.prod([1 - abs(a - b) for a, b in zip(unlearned, retrained, strict=True)]))


def js_divergence(left: Floats, right: Floats) -> float:
    """Mean Jensen-Shannon divergence of two models' probabilities [n, classes], in bits (0 to 1)."""
    p, q = np.clip(left, _TINY, 1), np.clip(right, _TINY, 1)
    middle = (p + q) / 2
    both = (p * np.log2(p / middle)).sum(1) + (q * np.log2(q / middle)).sum(1)
    return float(np.clip(both / 2, 0, 1).mean())


def probe(
    features: Floats, labels: NDArray[np.int64], tests: Floats, test_labels: NDArray[np.int64]
) -> float:
    """Accuracy of a fresh linear classifier on frozen features: is the class still there, below the head?

    Args:
        features: of training samples of all classes [n, d].
        labels: theirs [n].
        tests: of test samples of the forgotten classes [m, d].
        test_labels: theirs [m].

    Returns:
        NaN where features are not finite.
    """
    if not (np.isfinite(features).all() and np.isfinite(tests).all()):
        return math.nan
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it may stop early is no news
        fitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200)).fit(features, labels)
    return float((fitted.predict(tests) == test_labels).mean())


@dataclass(frozen=True)
class Floor:
    """How far two honest retrainings with different seeds are apart in one figure.

    Attributes:
        first: of one.
        second: of the other.
        resolution: smallest difference that means anything: one sample of an accuracy, two standard
            errors of an AUC.
    """

    first: float
    second: float
    resolution: float = 0.0

    @property
    def width(self) -> float:
        """Largest distance that is still noise."""
        return abs(self.first - self.second) + self.resolution

    def distance(self, value: float) -> float:
        """Of a figure to the nearer of the two."""
        return float(np.min(np.abs([value - self.first, value - self.second])))  # NaN where one of them is

    def inside(self, value: float) -> bool:
        """Whether a figure could be that of a third retraining."""
        return self.distance(value) <= self.width + 1e-12


def rounds_to(curve: Sequence[float], level: float) -> int | None:
    """First position of a curve that reaches a level; None: never."""
    return next((number for number, value in enumerate(curve) if value >= level), None)


def amount_at(amounts: Sequence[float], curve: Sequence[float], level: float) -> float | None:
    """What had been spent when a curve first reached a level (None: it never does).

    Args:
        amounts: spent up to each point of the curve, growing.
        curve: values.
        level: to be reached.
    """
    reached = rounds_to(curve, level)
    return None if reached is None else float(amounts[reached])
