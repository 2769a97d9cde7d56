"""Random resized crops and mirror images of stored images, for training alone.

    images as stored ─ crop of a random area, place and ratio, resized back ─ mirrored or not ─> as stored

Anew for every batch; or, with `views = k`, every training image has k fixed views, whose activations below
the first trainable parameter are computed once like those of plain images (`fedsim/features.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fedsim.errors import UserError

if TYPE_CHECKING:
    from fedsim.config import Experiment

DRAWS = 5  #: random numbers an image takes: area, ratio, two for the place, mirrored or not
_RATIO = math.log(4 / 3)  #: ratios of width to height lie between 3:4 and 4:3


def augments(experiment: Experiment) -> bool:
    """Whether training images are augmented."""
    keys = experiment.settings["augmentation"]
    return bool(keys["flip"] or keys["area"] < 1)


def check(experiment: Experiment, sample_shape: tuple[int, ...]) -> None:
    """Raise UserError unless the keys fit each other and samples are images."""
    if not augments(experiment):
        if experiment.settings["augmentation"]["views"]:
            raise UserError(
                "[augmentation] views are of augmented images; set area (0.08, say) or flip = true, too"
            )
        return
    if len(sample_shape) != 3:
        raise UserError(
            f"[augmentation] crops and mirrors images, the samples of these data are {list(sample_shape)}; "
            "leave the section out"
        )


def augmented(images: Tensor, draws: Tensor, keys: Mapping[str, Any]) -> Tensor:
    """Crops, resized back (bilinear), some of them mirrored; shape and dtype stay.

    Args:
        images: [n, c, h, w], uint8 or float32.
        draws: uniform in [0, 1), [n, 5], on the images' device.
        keys: of `[augmentation]`: `area`, the smallest part of an image that a crop shows, and `flip`.
    """
    shown = keys["area"] + (1 - keys["area"]) * draws[:, 0]
    ratio = torch.exp((2 * draws[:, 1] - 1) * (_RATIO if keys["area"] < 1 else 0.0))
    width, height = (shown * ratio).sqrt().clamp(max=1), (shown / ratio).sqrt().clamp(max=1)
    side = torch.where((draws[:, 4] < 0.5) & keys["flip"], -1.0, 1.0)
    across, down = (2 * draws[:, 2] - 1) * (1 - width), (2 * draws[:, 3] - 1) * (1 - height)
    none = torch.zeros_like(width)
    where = torch.stack([side * width, none, across, none, height, down], dim=1).view(-1, 2, 3)
    grid = functional.affine_grid(where, list(images.shape), align_corners=False)
    made = functional.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return made.round().clamp(0, 255).to(images.dtype) if images.dtype == torch.uint8 else made


@dataclass(frozen=True)
class View:
    """One fixed augmented view of an array of images; a row's depends on the row, the seed and the number.

    Attributes:
        images: [n, c, h, w].
        draws: float32 [n, 5].
        keys: of `[augmentation]`.
        key: what tells it from other views of the same images.
    """

    images: NDArray[Any]
    draws: NDArray[np.float32]
    keys: Mapping[str, Any]
    key: list[Any]

    @classmethod
    def of(cls, experiment: Experiment, images: NDArray[Any], number: int) -> View:
        """View `number` of an experiment's training images."""
        keys = experiment.settings["augmentation"]
        draws = np.random.default_rng([experiment.seed, number]).random((len(images), DRAWS), np.float32)
        return cls(images, draws, keys, [keys["area"], keys["flip"], experiment.seed, number])

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Views [len(rows), c, h, w] of some rows, as stored images."""
        images, draws = torch.from_numpy(self.images[rows]), torch.from_numpy(self.draws[rows])
        made: NDArray[Any] = augmented(images, draws, self.keys).numpy()
        return made
