"""VGG for small images with BatchNorm (arXiv 1409.1556), trained from scratch, one linear classifier.

Up to five resolutions, each ended by 2x2 max pooling; the mean over what pixels remain (one, at 32x32) makes
the features. Every convolution with its BatchNorm, ReLU and pooling is one of `blocks`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from fedsim.models.base import Classifier, DataInfo, Unit
from fedsim.models.images import ImageBackbone, check_images
from fedsim.models.resnet import CIFAR_MEAN, CIFAR_STD, mean_over_pixels

#: widths of the convolutions of each resolution
_VGG11 = ((64,), (128,), (256, 256), (512, 512), (512, 512))
_VGG16 = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)
_SMALL = ((32, 32), (64, 64), (128,))


class ConvUnit(nn.Module):
    """3x3 convolution, BatchNorm, ReLU and, where a resolution ends, 2x2 max pooling."""

    def __init__(self, inputs: int, outputs: int, *, pool: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        self.bn = nn.BatchNorm2d(outputs)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """[n, inputs, h, w] -> [n, outputs, h, w], halved with pooling."""
        x = functional.relu(self.bn(self.conv(x)))
        return functional.max_pool2d(x, 2) if self.pool else x


class Vgg(ImageBackbone):
    """Images -> features [n, width of the last convolution].

    Args:
        plan: widths of the convolutions, resolution by resolution.
    """

    def __init__(self, plan: Sequence[Sequence[int]]) -> None:
        super().__init__(CIFAR_MEAN, CIFAR_STD)
        self.blocks = nn.Sequential()
        inputs = 3
        for widths in plan:
            for number, width in enumerate(widths, start=1):
                self.blocks.append(ConvUnit(inputs, width, pool=number == len(widths)))
                inputs = width
        self.features = inputs

    def units(self) -> list[Unit]:
        """The convolutions, then the mean over pixels."""
        first, *others = [Unit((f"blocks.{number}",), block) for number, block in enumerate(self.blocks)]
        return [self.from_images(first), *others, Unit((), mean_over_pixels)]


def vgg_small(data: DataInfo, /) -> Classifier:
    """Five convolutions (32-32-64-64-128) with BatchNorm for images from 8x8 (0.14 M parameters)."""
    return _vgg("vgg-small", _SMALL, data, smallest=8)


def vgg11(data: DataInfo, /) -> Classifier:
    """VGG-11 with BatchNorm for 32x32 images (9.2 M parameters), trained from scratch."""
    return _vgg("vgg11", _VGG11, data, smallest=32)


def vgg16(data: DataInfo, /) -> Classifier:
    """VGG-16 with BatchNorm for 32x32 images (14.7 M parameters), trained from scratch."""
    return _vgg("vgg16", _VGG16, data, smallest=32)


def _vgg(name: str, plan: Sequence[Sequence[int]], data: DataInfo, *, smallest: int) -> Classifier:
    check_images(data, name, smallest=smallest)
    backbone = Vgg(plan)
    return Classifier(backbone, nn.Linear(backbone.features, len(data.classes)))
