"""Cartoon faces, drawn from their labels.

The function behind `[data] name` and what it draws with stand in one file, whose stamp is part of the cache's
key: a face that is drawn differently is another dataset.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fedsim.data.attributes import Attribute
from fedsim.data.drawn import Correlation, correlated
from fedsim.data.sources import Arrays, Integers
from fedsim.errors import UserError
from fedsim.ranges import Count

Look = dict[str, int]

#: property -> names of its values, in the order of their codes
LOOKS: dict[str, tuple[str, ...]] = {
    "smile": ("no", "yes"),
    "glasses": ("no", "yes"),
    "beard": ("no", "yes"),
    "hat": ("no", "yes"),
    "skin": ("light", "tan", "brown", "dark"),
    "hair": ("black", "brown", "red", "blond"),
}
_SKIN = ((246, 215, 190), (224, 172, 122), (160, 106, 66), (94, 60, 40))
_HAIR = ((30, 26, 26), (98, 62, 38), (172, 72, 36), (222, 190, 110))
_CANVAS = 128  #: drawn at this size, then averaged down


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


def draw(look: Look, width: float, size: int, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """One face.

    Args:
        look: code of every property in `LOOKS`.
        width: of the face, 0 (narrow) to 1 (wide).
        size: height and width of the result.
        rng: position, size, tilt, background, light, noise.

    Returns:
        uint8 [3, size, size].
    """
    from PIL import Image, ImageDraw

    background = tuple(int(v) for v in rng.integers(70, 230, 3))
    image = Image.new("RGB", (_CANVAS, _CANVAS), background)
    pen = ImageDraw.Draw(image)
    centre = (64 + rng.uniform(-5, 5), 72 + rng.uniform(-4, 4))
    _face(pen, look, centre, (36 + 12 * width, 48.0), rng.uniform(0.9, 1.05))
    tilted = image.rotate(
        rng.uniform(-12, 12), Image.Resampling.BILINEAR, center=centre, fillcolor=background
    )
    small = np.asarray(tilted.resize((size, size), Image.Resampling.BOX), np.float64)
    noisy = small * rng.uniform(0.75, 1.15) + rng.normal(0, 6, small.shape)
    return np.rint(np.clip(noisy, 0, 255)).astype(np.uint8).transpose(2, 0, 1)


def _face(
    pen: Any, look: Look, centre: tuple[float, float], radii: tuple[float, float], scale: float
) -> None:
    """Everything in coordinates of the face: (0, 0) is its middle, (±1, ±1) its edges."""
    cx, cy = centre
    rx, ry = radii[0] * scale, radii[1] * scale

    def box(left: float, top: float, right: float, bottom: float) -> list[float]:
        return [cx + left * rx, cy + top * ry, cx + right * rx, cy + bottom * ry]

    line = max(1, round(3 * scale))
    skin, hair = _SKIN[look["skin"]], _HAIR[look["hair"]]
    dark = tuple(int(v * 0.55) for v in skin)
    pen.ellipse(box(-1.1, -1.15, 1.1, 0.35), fill=hair)
    pen.ellipse(box(-1, -1, 1, 1), fill=skin)
    pen.chord(box(-1, -1.02, 1, 0.2), 190, 350, fill=hair)
    if look["beard"]:
        pen.chord(box(-0.92, -0.55, 0.92, 1.02), 20, 160, fill=hair)
        pen.ellipse(box(-0.6, 0.3, 0.6, 0.86), fill=skin)
    for side in (-1, 1):
        x = 0.4 * side
        pen.ellipse(box(x - 0.17, -0.22, x + 0.17, -0.02), fill=(250, 250, 250))
        pen.ellipse(box(x - 0.08, -0.2, x + 0.08, -0.04), fill=(30, 30, 40))
        if look["glasses"]:
            pen.ellipse(box(x - 0.3, -0.33, x + 0.3, 0.1), outline=(15, 15, 20), width=line)
    if look["glasses"]:
        pen.line(box(-0.12, -0.15, 0.12, -0.15), fill=(15, 15, 20), width=line)
    pen.line(box(0, 0, -0.08, 0.25), fill=dark, width=line)
    if look["smile"]:
        pen.chord(box(-0.5, 0.05, 0.5, 0.8), 0, 180, fill=(250, 245, 240), outline=(120, 30, 30), width=line)
    else:
        pen.line(box(-0.36, 0.55, 0.36, 0.55), fill=(120, 30, 30), width=2 * line)
    if look["hat"]:
        pen.pieslice(box(-0.95, -1.45, 0.95, 0.15), 180, 360, fill=(60, 80, 150))
        pen.rectangle(box(-1.15, -0.72, 1.15, -0.58), fill=(40, 55, 110))
