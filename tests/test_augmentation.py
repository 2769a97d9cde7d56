"""Crops and mirror images: the right pixels, training alone, fixed views with features of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from fedsim.augmentation import View, augmented
from fedsim.building import build
from fedsim.errors import UserError
from tests.helpers import run, tiny

IMAGES = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
MIRROR = {"area": 1.0, "flip": True}


def experiment(**augmentation: Any) -> Any:
    tables = {"tuning": {"name": "head"}, "augmentation": augmentation}
    return tiny("evaluation.validation=0.1", model={"name": "tiny-clip"}, **tables)


def test_a_mirror_image_is_one_and_the_rest_stays_to_the_bit() -> None:
    draws = torch.rand(6, 5)
    draws[:, 4] = torch.tensor([0.1, 0.9, 0.2, 0.5, 0.49, 0.8])
    made = augmented(IMAGES, draws, MIRROR)
    assert made.dtype == torch.uint8
    for row, mirrored in enumerate([True, False, True, False, True, False]):
        assert torch.equal(made[row], IMAGES[row].flip(-1) if mirrored else IMAGES[row])
    assert torch.equal(augmented(IMAGES, draws, {"area": 1.0, "flip": False}), IMAGES)


@pytest.mark.parametrize(("across", "down", "window"), [(0.0, 0.0, (0, 0)), (1.0, 0.0, (0, 8))])
def test_a_crop_is_a_part_of_the_image_resized(across: float, down: float, window: tuple[int, int]) -> None:
    """A quarter of the image, square: 8x8 pixels to 16x16, but at its border, where more of the image is."""
    draws = torch.tensor([[0.0, 0.5, across, down, 0.9]]).expand(6, 5)
    made = augmented(IMAGES.float() / 255, draws, {"area": 0.25, "flip": True})
    top, left = window
    part = IMAGES[:, :, top : top + 8, left : left + 8].float() / 255
    expected = functional.interpolate(part, size=(16, 16), mode="bilinear")
    torch.testing.assert_close(made[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], rtol=1e-4, atol=1e-5)


def test_crops_stay_inside_and_show_at_least_the_area() -> None:
    """Of an image whose pixels are their own coordinates."""
    line = torch.linspace(0, 1, 64)
    image = torch.stack([line.expand(64, 64), line[:, None].expand(64, 64)])[None].expand(500, 2, 64, 64)
    made = augmented(image, torch.rand(500, 5), {"area": 0.3, "flip": False})
    size = made.amax((2, 3)) - made.amin((2, 3))
    shown = size.prod(1)
    assert 0.25 < shown.min() < 0.35
    assert shown.max() <= 1.001
    assert (size[:, 0] / size[:, 1]).max() < 1.4
    assert made.min() >= 0
    assert made.max() <= 1


def test_runs_on_meta() -> None:
    made = augmented(IMAGES.to("meta"), torch.rand(6, 5, device="meta"), {"area": 0.1, "flip": True})
    assert made.shape == IMAGES.shape
    assert made.dtype == torch.uint8


def test_views_are_fixed_and_a_row_has_its_own() -> None:
    given = experiment(area=0.3, flip=True, views=2)
    images = build(given).data.arrays.train_x
    first, second = (View.of(given, images, number) for number in range(2))
    rows = np.array([5, 2, 9])
    np.testing.assert_array_equal(first[rows][1], first[np.array([2])][0])
    assert (first[rows] != second[rows]).any()
    assert (first[rows] != images[rows]).any()
    assert first.key != second.key
    assert first.key != View.of(experiment(area=0.4, flip=True, views=2), images, 0).key


def test_a_batch_is_augmented_anew_and_nothing_is_computed_once() -> None:
    task = build(experiment(area=0.3, flip=True))
    assert task.cut == 0
    rows = task.data.client(0)
    torch.manual_seed(1)
    first, labels = task.train_batch(rows)
    second, _ = task.train_batch(rows)
    assert not torch.equal(first, second)
    assert first.shape == task.data.arrays.train_x[rows].shape
    np.testing.assert_array_equal(labels, task.data.arrays.train_y[rows])
    torch.manual_seed(1)
    assert torch.equal(task.train_batch(rows)[0], first)


def test_views_are_the_same_with_and_without_the_cache() -> None:
    given = experiment(area=0.3, flip=True, views=2)
    cached, plain = build(given), build(given.replace("features.cache=false"))
    assert plain.network is plain.model
    rows = cached.data.client(2)
    outputs = []
    for task in (cached, plain):
        torch.manual_seed(3)
        inputs, _ = task.train_batch(rows)
        outputs.append(task.network(inputs))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


def test_a_batch_of_views_is_the_backbones_output_for_one_view_of_each_row() -> None:
    given = experiment(area=0.3, flip=True, views=3)
    task = build(given)
    assert task.network is task.model.head
    rows = task.data.client(1)
    with torch.no_grad():
        views = [View.of(given, task.data.arrays.train_x, number)[rows] for number in range(3)]
        known = torch.stack([task.model.backbone(torch.from_numpy(view)) for view in views])
    torch.manual_seed(0)
    found, _ = task.train_batch(rows)
    distance = (known - found).abs().amax(-1)
    assert (distance.amin(0) < 1e-4).all()
    assert len(set(distance.argmin(0).tolist())) == 3, "all views are drawn"


@pytest.mark.parametrize("views", [0, 2])
def test_what_is_measured_is_never_augmented(views: int) -> None:
    plain, changed = build(experiment()), build(experiment(area=0.1, flip=True, views=views))
    for split in ("test", "validation"):
        assert changed.evaluate_split(split) == pytest.approx(plain.evaluate_split(split), rel=1e-5)


def test_a_run_with_views_is_reproducible_and_views_count_towards_the_limit(tmp_path: Path) -> None:
    given = experiment(area=0.5, flip=True, views=2)
    assert run(given, tmp_path / "a").summary["digest"] == run(given, tmp_path / "b").summary["digest"]
    data = build(given).data
    values = 2 * len(data.partition.indices) + len(data.validation) + len(data.arrays.test_x)
    limit = values * 64 * 4 / 1e9
    assert build(given.replace(f"features.limit={limit * 1.001}")).cut > 0
    assert build(given.replace(f"features.limit={limit * 0.999}")).cut == 0


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"views are of augmented images; set area .* or flip = true"):
        build(experiment(views=2))
    file = tmp_path / "table.npz"
    np.savez(file, x=np.zeros((40, 5), np.float32), y=np.arange(40) % 2)
    with pytest.raises(UserError, match=r"crops and mirrors images, the samples of these data are \[5\]"):
        build(tiny("augmentation.flip=true", data={"name": f"npz:{file}"}, partition={"clients": 2}))
