"""Datasets that are drawn here, so that their attributes are known exactly; functions are names of `[data]`.

The attribute's dependence on the label is a parameter: P(attribute | label) = (1 ± correlation) / 2, with
plus for the second half of the classes. Everything follows from the keys: the same images everywhere.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from annotated_types import Ge, Le

from fedsim.data.attributes import Attribute
from fedsim.data.faces import LOOKS, Look, draw
from fedsim.data.sources import DIGIT_WORDS, Arrays, Integers, all_digits
from fedsim.errors import UserError
from fedsim.ranges import Count, NonNegative

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


def avatars(
    *,
    label: Literal["smile", "glasses", "beard", "hat", "skin", "hair"] = "smile",
    correlated_with: str = "glasses",
    correlation: Correlation = 0.0,
    size: Count = 32,
    train_samples: Count = 4000,
    test_samples: Count = 2000,
) -> Arrays:
    """Procedurally drawn cartoon faces, 6,000 by default, with exact labels (no photographs, no people).

    A face smiles or not, wears glasses, a beard, a hat or none, has one of four skin tones and of four hair
    colours, and is more or less wide (`width`, a number). One of these is the label, the others are
    attributes. Position, size, tilt, background and light vary. Drawn once, then cached.

    Args:
        label: what the task is to tell.
        correlated_with: the attribute with two values that depends on the label,
        correlation: and how much, from -1 to 1; all others are independent.
        size: height and width in pixels.
        train_samples: training images.
        test_samples: test images.

    Returns:
        uint8 [n, 3, size, size].
    """
    binary = [name for name, values in LOOKS.items() if len(values) == 2 and name != label]
    if correlated_with not in binary and correlation:
        raise UserError(f"[data] correlated_with must be one of {', '.join(binary)}, not '{correlated_with}'")
    count = train_samples + test_samples
    rng = np.random.default_rng(2022)
    codes: dict[str, Integers] = {name: rng.integers(0, len(v), count) for name, v in LOOKS.items()}
    y = codes[label]
    if correlation:
        codes[correlated_with] = correlated(2 * y >= len(LOOKS[label]), correlation, rng)
    width = rng.random(count).astype(np.float32)
    x = np.empty((count, 3, size, size), np.uint8)
    for row in range(count):
        look: Look = {name: int(column[row]) for name, column in codes.items()}
        x[row] = draw(look, float(width[row]), size, np.random.default_rng([2022, row]))
    others = [name for name in LOOKS if name != label]
    z = np.stack([*(codes[name].astype(np.float32) for name in others), width], 1)
    attributes = (*(Attribute(name, LOOKS[name]) for name in others), Attribute("width"))
    train, test = slice(None, train_samples), slice(train_samples, None)
    parts = (x[train], y[train], x[test], y[test])
    return Arrays(*parts, LOOKS[label], None, attributes, z[train], z[test])


def correlated(high: npt.NDArray[np.bool_], correlation: float, rng: np.random.Generator) -> Integers:
    """A fair binary attribute whose correlation with a fair binary `high` [n] is the given one: int64 [n]."""
    chance = (1 + np.where(high, correlation, -correlation)) / 2
    return (rng.random(len(high)) < chance).astype(np.int64)
