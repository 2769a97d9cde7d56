"""Digits with an attribute that is drawn here, and how drawn attributes depend on labels.

The dependence is a parameter: P(attribute | label) = (1 ± correlation) / 2, with plus for the second half of
the classes. Everything follows from the keys: the same images everywhere.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import numpy.typing as npt
from annotated_types import Ge, Le

from fedsim.data.attributes import Attribute
from fedsim.data.sources import DIGIT_WORDS, Arrays, Integers, all_digits
from fedsim.ranges import NonNegative

Correlation = Annotated[float, Ge(-1), Le(1)]
_TINTED_TEST = 600


def tinted_digits(
    *, tint: NonNegative = 0.25, noise: NonNegative = 0.12, correlation: Correlation = 0.0
) -> Arrays:
    """Scikit-learn's 8x8 digits in two channels, one of them brighter: attribute `tint` (`first`, `second`).

    1,197 training and 600 test images. How much brighter is noisy, so that no reader finds the tint always.

    Args:
        tint: mean difference of the channels' brightness from 1.
        noise: standard deviation of that difference.
        correlation: of the tint with "five or more".

    Returns:
        uint8 [n, 2, 8, 8]; classes are the words "zero" to "nine".
    """
    images, labels = all_digits()
    rng = np.random.default_rng(88)
    codes = correlated(labels >= 5, correlation, rng)
    shift = (2 * codes - 1) * tint + rng.normal(0.0, noise, len(codes))
    factors = np.stack([1 - shift, 1 + shift], 1)[:, :, None, None]
    pixels = np.rint(np.clip(images[:, None] * factors * 0.7, 0, 1) * 255).astype(np.uint8)
    train = len(labels) - _TINTED_TEST
    z = codes.astype(np.float32)[:, None]
    attributes = (Attribute("tint", ("first", "second")),)
    parts = (pixels[:train], labels[:train], pixels[train:], labels[train:])
    return Arrays(*parts, DIGIT_WORDS, None, attributes, z[:train], z[train:])


def correlated(high: npt.NDArray[np.bool_], correlation: float, rng: np.random.Generator) -> Integers:
    """A fair binary attribute whose correlation with a fair binary `high` [n] is the given one: int64 [n]."""
    chance = (1 + np.where(high, correlation, -correlation)) / 2
    return (rng.random(len(high)) < chance).astype(np.int64)
