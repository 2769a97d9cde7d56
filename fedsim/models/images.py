"""What every image backbone does before its network: stored pixels -> normalised RGB of the right size."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsim.errors import UserError
from fedsim.models.base import DataInfo, Unit, run_units, to_unit


class ImageBackbone(nn.Module, ABC):
    """A backbone that takes images as they are stored, [n, 1 or 3, h, w], uint8 or float32 in 0..1.

    Subclasses say what it consists of: `units`, the first of them with `from_images`.

    Args:
        mean: per RGB channel, of images in 0..1.
        std: likewise.
        size: height and width that images are resized to; None leaves them as they are.
        interpolation: how they are resized; pre-trained networks know images resized bicubically.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        size: tuple[int, int] | None = None,
        interpolation: str = "bicubic",
    ) -> None:
        super().__init__()
        self.size = size
        self.interpolation = interpolation
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1))

    def prepare(self, images: Tensor) -> Tensor:
        """Scale to 0..1, resize, repeat a single channel, normalise: float32 [n, 3, h, w]."""
        x = to_unit(images)
        if self.size is not None and x.shape[-2:] != self.size:
            x = functional.interpolate(x, size=self.size, mode=self.interpolation, antialias=True)
            x = x.clamp(0, 1)  # bicubic interpolation overshoots
        return (x.expand(-1, 3, -1, -1) - self.mean) / self.std

    def from_images(self, unit: Unit) -> Unit:
        """The unit with `prepare` in front of it."""
        return Unit(("mean", "std", *unit.parts), lambda images: unit.run(self.prepare(images)))

    @abstractmethod
    def units(self) -> list[Unit]:
        """See `fedsim.models.base.Divided`."""

    def forward(self, images: Tensor) -> Tensor:
        """Features [n, d], float32, for images as stored."""
        return run_units(self.units(), images)


def check_images(data: DataInfo, model: str, smallest: int = 1) -> None:
    """Raise UserError unless samples are images [1 or 3, h, w] of at least `smallest` pixels a side."""
    shape = data.sample_shape
    if len(shape) != 3 or shape[0] not in (1, 3) or min(shape[1:]) < smallest:
        least = f" of at least {smallest}x{smallest} pixels" if smallest > 1 else ""
        raise UserError(
            f"model '{model}' takes images [1 or 3 channels, height, width]{least}, "
            f"the data are {list(shape)}; choose another [model] name or [data] name"
        )


def resampled(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, str]:
    """Entries that got another shape with another image size (position embeddings): what they were made of.

    Args:
        before: the state as stored.
        after: the state at the new size.

    Returns:
        Name -> digest, as `Classifier` takes it.
    """
    from fedsim.payload import digest_of

    return {
        name: digest_of({"stored": before[name], "shape": torch.tensor(value.shape)})
        for name, value in after.items()
        if name in before and value.shape != before[name].shape
    }
