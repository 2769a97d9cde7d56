"""In which order the axes of stored samples are: images with channels first or last, windows of signals.

[n, h, w]        grey images          -> [n, 1, h, w]
[n, h, w, c]     channels last        -> [n, c, h, w]
[n, c, h, w]     channels first, as it is
[n, t, c]        windows of t time steps, as they are;  [n, c, t] -> [n, t, c]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fedsim.errors import UserError

Array = npt.NDArray[Any]
#: n samples, c channels, h height, w width, t time steps
Layout = Literal["auto", "NHW", "NHWC", "NCHW", "NTC", "NCT"]

_CHANNELS = (1, 3, 4)
_SMALLEST = 16  #: side of a grey image that is not square


def arranged(
    parts: Mapping[str, Array], layout: Layout, path: str
) -> tuple[dict[str, Array], bool, list[str]]:
    """Inputs of all parts in the order that models take.

    Args:
        parts: inputs [n, ...] by key.
        layout: `[data] layout`.
        path: the file, for messages.

    Returns:
        The same keys, whether samples are images, and notes for the data card.

    Raises:
        UserError: the layout does not fit, or parts have unequal axes.
    """
    key, first = next(iter(parts.items()))
    for other, x in parts.items():
        if x.shape[1:] != first.shape[1:]:
            raise UserError(
                f"{path}: training and test samples differ in shape: '{key}' has {list(first.shape[1:])}, "
                f"'{other}' {list(x.shape[1:])}"
            )
    notes: list[str] = []
    chosen: str = layout
    if layout == "auto":
        unsigned = all(x.dtype.kind in "uib" and (x >= 0).all() for x in parts.values())
        chosen, doubt = _guess(first.shape, unsigned)
        if chosen and doubt:
            notes.append(
                f"'{key}' {['n', *first.shape[1:]]} is taken as {chosen} ({doubt}); layout says otherwise"
            )
    elif len(layout) != first.ndim:
        raise UserError(
            f"{path}: [data] layout = \"{layout}\" has {len(layout)} axes, '{key}' has {first.ndim}: "
            f"{list(first.shape)}"
        )
    made = {name: np.ascontiguousarray(_moved(x, chosen)) for name, x in parts.items()}
    return made, chosen in ("NHW", "NHWC", "NCHW"), notes


def _moved(x: Array, layout: str) -> Array:
    if layout == "NHW":
        return x[:, None]
    if layout == "NHWC":
        return x.transpose(0, 3, 1, 2)
    return x.transpose(0, 2, 1) if layout == "NCT" else x


def _guess(shape: tuple[int, ...], unsigned: bool) -> tuple[str, str]:
    """The likely layout ("": neither images nor windows), and what to say of it where it is a guess."""
    if len(shape) == 3:
        _, a, b = shape
        similar = min(a, b) >= _SMALLEST and max(a, b) <= 2 * min(a, b)
        if a == b or unsigned or similar:
            return "NHW", "" if a == b else "grey images, not windows of a signal"
        long, short = ("NTC", "NCT") if a >= b else ("NCT", "NTC")
        return long, f"windows of {max(a, b)} time steps and {min(a, b)} channels, not {short} and no images"
    if len(shape) == 4:
        return _of_images(*shape[1:])
    return "", ""


def _of_images(a: int, b: int, c: int) -> tuple[str, str]:
    """Channels are few, or else images are square."""
    first, last = a in _CHANNELS, c in _CHANNELS
    if first != last:
        return ("NCHW", "") if first else ("NHWC", "")
    if (b == c) != (a == b):
        return ("NCHW", "") if b == c else ("NHWC", "")
    return "NCHW", "channels first or last: the shape does not tell"
