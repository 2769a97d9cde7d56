"""Which stored value is black and which is white: the one place that decides it, for arrays and for files.

    numbers ─ spread (dtype, lowest, highest) ─ decide ─> ValueRange ─ scaled ─> uint8, or float32 in 0..1

The decision depends on the dtype and on the rough size of the values, over all parts of a dataset at once:

    bool            0 to 1
    uint8           0 to 255, whatever the values are
    int8            -128 to 127 if values are below -1
    whole numbers   0 to the smallest of 1, 16, 255, 4095, 65535 that holds them all
    other numbers   0 to 1, 0 to 255 or 0 to 65535, up to 5 % beyond (resizing overshoots); or -1 to 1
    anything else   no range: the values are kept (arrays) or refused (files)
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fedsim import json_text
from fedsim.data.archives import DAMAGE
from fedsim.errors import UserError

Array = npt.NDArray[Any]
#: what `[data] value_range` may be for arrays: decide, use the values as they are, or [black, white]
Wanted = Literal["auto", "keep"] | list[float]

_LEVELS = (1, 16, 255, 4095, 65535)  #: white, where numbers are whole: of 1, 4, 8, 12 and 16 bits
_SLACK = 0.05  #: of a range: resized images overshoot
_ORIENTATION = 0x0112  #: the EXIF tag
_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}


@dataclass(frozen=True)
class Spread:
    """What a decision is made from.

    Attributes:
        dtype: as stored; all floating-point types are "float".
        low: lowest value.
        high: highest value.
        whole: all values are whole numbers.
    """

    dtype: str
    low: float
    high: float
    whole: bool = True


@dataclass(frozen=True)
class ValueRange:
    """A decision: the stored values that are black and white; None and None: values are kept as they are."""

    dtype: str
    low: float | None = None
    high: float | None = None

    @property
    def text(self) -> str:
        """For messages."""
        if self.low is None or self.high is None:
            return "they are"
        return f"{self.low:g} (black) to {self.high:g} (white)"


def spread(arrays: Iterable[Array]) -> Spread:
    """What is stored in some arrays of one dataset (finite numbers of any dtype)."""
    found = []
    for array in arrays:
        name = "float" if array.dtype.kind == "f" else array.dtype.name
        low, high = (float(array.min()), float(array.max())) if array.size else (0.0, 0.0)
        whole = array.dtype.kind != "f" or bool((array == np.floor(array)).all())
        found.append(Spread(name, low, high, whole))
    return merged(found)


def merged(spreads: Sequence[Spread]) -> Spread:
    """Several spreads as one; the dtype is the first one's."""
    low, high = min(s.low for s in spreads), max(s.high for s in spreads)
    return Spread(spreads[0].dtype, low, high, all(s.whole for s in spreads))


def decide(seen: Spread, wanted: Wanted, where: str) -> ValueRange:
    """Which values are black and white.

    Args:
        seen: what is stored, in all parts of the dataset.
        wanted: `[data] value_range`.
        where: file, and key if there is one, for the error message.

    Raises:
        UserError: `wanted` is no range, or values lie outside it.
    """
    if wanted == "keep":
        return ValueRange(seen.dtype)
    if isinstance(wanted, str):
        return ValueRange(seen.dtype, *(_usual(seen) or ()))
    if len(wanted) != 2 or not np.isfinite(wanted).all() or not wanted[0] < wanted[1]:
        raise UserError(f"[data] value_range must be [black, white], two numbers in this order, not {wanted}")
    low, high = float(wanted[0]), float(wanted[1])
    slack = 0 if seen.whole else _SLACK * (high - low)
    if seen.low < low - slack or seen.high > high + slack:
        raise UserError(
            f"{where}: values go from {seen.low:g} to {seen.high:g}, outside value_range = "
            f"[{low:g}, {high:g}]; correct value_range in [data], or rescale these data"
        )
    return ValueRange(seen.dtype, low, high)


def _usual(seen: Spread) -> tuple[float, float] | None:
    """The usual range of such values, or None."""
    low, high = seen.low, seen.high
    if seen.dtype in ("bool", "uint8"):
        return 0, 1 if seen.dtype == "bool" else 255
    if seen.dtype == "int8" and low < -1:
        return -128, 127
    slack = 0 if seen.whole else _SLACK
    if -1 - slack <= low <= -0.5 and high <= 1 + slack:
        return -1, 1
    for level in _LEVELS if seen.whole else (1, 255, 65535):
        # a number between the levels (2.8, say, of standardised images) is no white
        plausible = seen.whole or level == 1 or high > level / 4
        if low >= -slack * level and high <= (1 + slack) * level and plausible:
            return 0, level
    return None


def scaled(x: Array, seen: Spread, chosen: ValueRange) -> Array:
    """Numbers as models take them: uint8 where 0..255 holds them exactly, else float32 (0..1 in a range)."""
    if chosen.low is None or chosen.high is None:
        return x.astype(np.float32)
    if (chosen.low, chosen.high) == (0, 255) and seen.whole:
        return x.astype(np.uint8)
    if (chosen.low, chosen.high) == (0, 1):
        return x.astype(np.float32)
    return (x.astype(np.float32) - np.float32(chosen.low)) / np.float32(chosen.high - chosen.low)


def described(seen: Spread, chosen: ValueRange, what: str = "pixels") -> str:
    """One line of the data card: what was decided."""
    text = f"{what}: {seen.dtype} values from {seen.low:g} to {seen.high:g}"
    if chosen.low is None or chosen.high is None:
        return f"{text} are kept as they are (most models expect 0 to 1: value_range = [black, white] scales)"
    text += f", read as {chosen.text}"
    if seen.high <= chosen.low + (chosen.high - chosen.low) / 8:
        text += f"; that is dark: if {seen.high:g} is white, set value_range"
    return text


def to_json(ranges: Iterable[ValueRange]) -> str:
    """What a server tells the nodes."""
    return json.dumps([astuple(one) for one in ranges])


def from_json(text: str) -> tuple[ValueRange, ...]:
    """The inverse of `to_json`.

    Raises:
        UserError: it is something else; it comes from a server.
    """
    source = "the server's list of value ranges"
    try:
        found = json_text.received(text, source)
    except ValueError as error:
        raise UserError(str(error)) from error
    ranges = []
    for one in found if isinstance(found, list) else [None]:
        match one:
            case [str(dtype), (int() | float() | None) as low, (int() | float() | None) as high]:
                ranges.append(ValueRange(dtype, low, high))
            case _:
                raise UserError(f"{source} has {str(one)[:80]} where a dtype, black and white should be")
    return tuple(ranges)


# ------------------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class Picture:
    """An image file that was read.

    Attributes:
        image: a Pillow image, "RGB", or "F" (one channel of numbers) where it has more than 8 bits.
        spread: of its values.
        remarks: what was done to it, each a short phrase that the data card counts.
    """

    image: Any
    spread: Spread
    remarks: tuple[str, ...] = ()


def read_picture(file: Path) -> Picture:
    """An image file: turned as its EXIF data say, transparent parts white, the first frame of several.

    Raises:
        UserError: names the file, which is empty, damaged, too large, or holds numbers that are not finite.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        if not file.stat().st_size:
            raise UserError(f"{file}: the file is empty (half a download?); remove or replace it")
        with Image.open(file) as image:
            return _picture(image, str(file))
    except UnidentifiedImageError as error:
        raise UserError(
            f"{file}: not a readable image (no format that Pillow knows); remove or replace it"
        ) from error
    except (*DAMAGE, Image.DecompressionBombError) as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"{file}: not a readable image ({reason}); remove or replace it") from error


def rgb(image: Any, where: str) -> Any:
    """A Pillow image of at most 8 bits as "RGB"; see `read_picture` for what is done to it.

    Raises:
        UserError: it has more than 8 bits.
    """
    found = _picture(image, where).image
    if found.mode != "RGB":
        raise UserError(
            f"{where}: an image has more than 8 bits (mode '{image.mode}'); bring such images as "
            '[data] name = "imagefolder:FOLDER"'
        )
    return found


def _picture(image: Any, where: str) -> Picture:
    from PIL import Image, ImageOps

    remarks = []
    if image.getexif().get(_ORIENTATION, 1) in range(2, 9):
        remarks.append("turned as EXIF says")
    if getattr(image, "n_frames", 1) > 1 and getattr(image, "format", "") != "MPO":
        remarks.append("with several frames (the first is taken)")
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        if not np.isfinite(values).all():
            raise UserError(
                f"{where}: {np.sum(~np.isfinite(values))} pixels are NaN or infinite; mend the file"
            )
        return Picture(Image.fromarray(values.astype(np.float32)), spread([values]), tuple(remarks))
    image = image.convert(_PREMULTIPLIED.get(image.mode, image.mode))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:
            remarks.append("with transparent parts (shown on white)")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    low, high = zip(*image.getextrema(), strict=True)
    return Picture(image, Spread("uint8", float(min(low)), float(max(high))), tuple(remarks))
