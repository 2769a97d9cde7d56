"""Black and white: one decision per dataset, from files and from arrays alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedsim.data.federated import load_own
from fedsim.data.image_folders import imagefolder
from fedsim.data.own_sets import npz
from fedsim.data.pixels import Spread, ValueRange, decide, from_json, read_picture, rgb, to_json
from fedsim.errors import UserError

GREY = np.linspace(0, 1, 64).reshape(8, 8)


def stored(path: Path, x: np.ndarray, **keys: Any) -> Any:
    """Images `x` [8, 8] as an archive, read again: what models get."""
    parts = {"x_train": np.stack([x] * 4), "x_test": x[None]}
    np.savez(path, **parts, y_train=np.arange(4) % 2, y_test=np.zeros(1, int))
    return npz(path=str(path), **keys)


def unit(x: np.ndarray) -> np.ndarray:
    return x / 255 if x.dtype == np.uint8 else x


@pytest.mark.parametrize(
    "x",
    [
        *((GREY * 255).round().astype(kind) for kind in ("uint8", "int64", "uint16", "float32", "float64")),
        *((GREY * 65535).round().astype(kind) for kind in ("uint16", "int32", "float64")),
        (GREY * 65535).astype(np.float32),
        (GREY * 4095).round().astype(np.uint16),
        (GREY * 255).astype(np.float32),
        (GREY * 255 - 128).round().astype(np.int8),
        2 * GREY - 1,
        GREY.astype(np.float16),
        GREY,
    ],
    ids=lambda x: f"{x.dtype}-{x.max():g}",
)
def test_the_same_picture_is_the_same_however_it_is_stored(x: np.ndarray, tmp_path: Path) -> None:
    found = stored(tmp_path / "a.npz", x)
    np.testing.assert_allclose(unit(found.train_x[0, 0]), GREY, atol=0.5 / 255 + 1e-6)
    assert any(
        f"values from {float(x.min()):g} to {float(x.max()):g}, read as" in note for note in found.notes
    )
    if np.issubdtype(x.dtype, np.integer) and x.max() == 255:  # nothing is lost, so it is the same dataset
        assert found.digest == stored(tmp_path / "b.npz", x.astype(np.uint8)).digest


def test_the_bundled_kind_of_arrays_is_not_touched(tmp_path: Path) -> None:
    for x in ((GREY * 200).astype(np.uint8), GREY.astype(np.float32)):
        found = stored(tmp_path / "a.npz", x)
        np.testing.assert_array_equal(found.train_x[0, 0], x)
        assert found.train_x.dtype == x.dtype


def test_what_fits_no_range_is_kept_and_said(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(8, 8)) * 1.5
    found = stored(tmp_path / "a.npz", x)
    np.testing.assert_allclose(found.train_x[0, 0], x, rtol=1e-6)
    assert any("are kept as they are" in note for note in found.notes)
    assert found.ranges == (ValueRange("float"),)
    wide = decide(Spread("float", -123.7, 151.1, whole=False), "auto", "")  # minus the mean of ImageNet
    assert wide.low is None


def test_a_decision_is_made_over_both_parts_and_can_be_overridden(tmp_path: Path) -> None:
    dark, bright = np.full((2, 4, 4), 1.0), np.full((2, 4, 4), 200.0)
    np.savez(tmp_path / "a.npz", x_train=dark, y_train=[0, 1], x_test=bright, y_test=[0, 1])
    found = npz(path=str(tmp_path / "a.npz"))
    assert (found.train_x.max(), found.test_x.max()) == (1, 200)
    assert found.train_x.dtype == np.uint8
    chosen = npz(path=str(tmp_path / "a.npz"), value_range=[0, 400])
    assert chosen.test_x.max() == pytest.approx(0.5)
    assert npz(path=str(tmp_path / "a.npz"), value_range="keep").test_x.max() == 200
    with pytest.raises(UserError, match=r"a\.npz: .*values go from 1 to 200, outside value_range = \[0, 1\]"):
        npz(path=str(tmp_path / "a.npz"), value_range=[0, 1])
    with pytest.raises(UserError, match=r"value_range must be \[black, white\]"):
        npz(path=str(tmp_path / "a.npz"), value_range=[255, 0])


def test_dark_data_say_so() -> None:
    from fedsim.data.pixels import described

    seen = Spread("uint8", 0, 1)
    assert "that is dark: if 1 is white, set value_range" in described(seen, decide(seen, "auto", ""))
    assert "dark" not in described(Spread("uint8", 0, 200), ValueRange("uint8", 0, 255))


def save(folder: Path, **images: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, (image, suffix) in images.items():
        image.save(folder / f"{name}.{suffix}")
    return folder


def test_sixteen_bits_and_floats_in_files_are_their_eight_bit_pictures(tmp_path: Path) -> None:
    """16 bits, big floats, small floats: all beside the same picture of 8 bits."""
    eight = Image.fromarray((GREY * 255).round().astype(np.uint8))
    sixteen = Image.fromarray((GREY * 65535).round().astype(np.uint16))
    for name, image, suffix in (
        ("png16", sixteen, "png"),
        ("tif16", sixteen, "tif"),
        ("small", Image.fromarray(GREY.astype(np.float32)), "tif"),
        ("large", Image.fromarray((GREY * 255).astype(np.float32)), "tiff"),
    ):
        root = tmp_path / name
        for kind in ("train", "test"):
            save(root / kind / "a", one=(image, suffix), eight=(eight, "png"))
        found = imagefolder(path=str(root), size=8)
        np.testing.assert_allclose(found.train_x[0].astype(int), found.train_x[1].astype(int), atol=1)
        assert found.train_x[0].max() == 255
        assert len(found.ranges) == 2


def test_files_with_unusual_numbers_are_refused_until_told(tmp_path: Path) -> None:
    heights = Image.fromarray((GREY * 900 - 100).astype(np.float32))
    save(tmp_path / "train" / "a", one=(heights, "tif"))
    save(tmp_path / "test" / "a", two=(heights, "tif"))
    with pytest.raises(
        UserError, match=r"one\.tif: float values from -100 to 800 .*set \[data\] value_range"
    ):
        imagefolder(path=str(tmp_path))
    found = imagefolder(path=str(tmp_path), size=8, value_range=[-100, 800])
    np.testing.assert_allclose(found.train_x[0, 0] / 255, GREY, atol=0.003)
    with pytest.raises(UserError, match=r"one\.tif: values go from -100 to 800"):
        imagefolder(path=str(tmp_path), value_range=[0, 800])


def pixel(image: Image.Image, file: Path, place: tuple[int, int] = (0, 0)) -> Any:
    image.save(file)
    return read_picture(file).image.getpixel(place)


def test_transparency_is_white_in_every_mode(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    clear.putpixel((1, 1), (9, 8, 7, 255))
    file = tmp_path / "a.png"
    assert pixel(clear, file) == (255, 255, 255)
    assert pixel(clear, file, (1, 1)) == (9, 8, 7)
    assert read_picture(file).remarks == ("with transparent parts (shown on white)",)
    assert pixel(Image.new("LA", (4, 4), (0, 0)), file) == (255, 255, 255)
    half = Image.new("LA", (4, 4), (0, 128))
    assert pixel(half, file)[0] == pytest.approx(127, abs=1)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert pixel(palette, file) == (10, 20, 30)
    palette.info["transparency"] = 0
    assert pixel(palette, file) == (255, 255, 255)
    grey = Image.new("L", (4, 4), 5)
    grey.info["transparency"] = 5
    assert pixel(grey, file) == (255, 255, 255)
    assert pixel(Image.new("RGBA", (4, 4), (1, 2, 3, 255)), file) == (1, 2, 3)
    assert not read_picture(file).remarks


def test_other_modes_keep_their_colours(tmp_path: Path) -> None:
    assert pixel(Image.new("1", (4, 4), 1), tmp_path / "a.png") == (255, 255, 255)
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    found = pixel(red, tmp_path / "a.jpg")
    assert found[0] > 200
    assert max(found[1:]) < 60


def test_photographs_stand_upright(tmp_path: Path) -> None:
    lying = Image.new("RGB", (8, 4))
    lying.putpixel((0, 0), (250, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter to the right
    lying.save(tmp_path / "a.png", exif=exif)
    found = read_picture(tmp_path / "a.png")
    assert found.image.size == (4, 8)
    assert found.image.getpixel((3, 0)) == (250, 0, 0)
    assert found.remarks == ("turned as EXIF says",)
    with Image.open(tmp_path / "a.png") as image:
        assert rgb(image, "").size == (4, 8)  # torchvision's sets go through the same place


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "the file is empty"), (b"hello", "no format that Pillow knows"), (None, "not a readable image")],
)
def test_damaged_images_are_named(content: bytes | None, said: str, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    if content is None:  # half a download
        Image.effect_noise((64, 64), 50).save(file)
        content = file.read_bytes()[:900]
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.png: .*{said}"):
        read_picture(file)


def test_an_image_too_large_to_unpack_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("1", (100, 100)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match=r"a\.png: not a readable image .*decompression bomb"):
        read_picture(tmp_path / "a.png")


def test_float_files_with_nan_are_named(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"a\.tif: 16 pixels are NaN or infinite"):
        read_picture(tmp_path / "a.tif")


def test_a_node_reads_its_pixels_as_the_server_does(tmp_path: Path) -> None:
    """A dark file alone would be read as 8 bits; a bright one cannot be read as the server's 8 bits."""
    server = stored(tmp_path / "server.npz", (GREY * 60000).astype(np.uint16))
    assert from_json(to_json(server.ranges)) == server.ranges
    dark = tmp_path / "dark.npz"
    stored(dark, (GREY * 200).astype(np.uint16))
    keys: dict[str, Any] = {"client": 0, "clients": 1, "classes": server.classes}
    alone = load_own(str(dark), {}, **keys).arrays
    assert alone.train_x.max() == 200
    joined = load_own(str(dark), {"size": 8}, **keys, ranges=server.ranges).arrays
    assert joined.train_x.max() == pytest.approx(200 / 65535)
    with pytest.raises(UserError, match=r"server\.npz: the server reads uint16 values as 0 .*to 255"):
        load_own(str(tmp_path / "server.npz"), {}, **keys, ranges=alone.ranges)
    # another dtype is another way of storing: its own range holds
    stored(tmp_path / "eight.npz", (GREY * 255).astype(np.uint8))
    other = load_own(str(tmp_path / "eight.npz"), {}, **keys, ranges=server.ranges).arrays
    assert other.train_x.max() == 255
