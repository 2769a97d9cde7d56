"""VGG for 32x32 images with BatchNorm (arXiv 1409.1556), trained from scratch, one linear classifier.

Five resolutions, each ended by 2x2 max pooling; the mean over what pixels remain (one, at 32x32) makes
512 features. Every convolution with its BatchNorm, ReLU and pooling is one of `blocks`.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from fedsim.models.base import Classifier, DataInfo, Unit
from fedsim.models.images import ImageBackbone, check_images
from fedsim.models.resnet import CIFAR_MEAN, CIFAR_STD, mean_over_pixels

_WIDTHS = (64, 128, 256, 512, 512)
_CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 16: (2, 2, 3, 3, 3)}


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
    """Images -> features [n, 512].

    Args:
        depth: 11 or 16, counting the classifiers of the original.
    """

    features = _WIDTHS[-1]

    def __init__(self, depth: int) -> None:
        super().__init__(CIFAR_MEAN, CIFAR_STD)
        self.blocks = nn.Sequential()
        inputs = 3
        for width, count in zip(_WIDTHS, _CONVOLUTIONS[depth], strict=True):
            for number in range(count):
                self.blocks.append(ConvUnit(inputs, width, pool=number == count - 1))
                inputs = width

    def units(self) -> list[Unit]:
        """The convolutions, then the mean over pixels."""
        first, *others = [Unit((f"blocks.{number}",), block) for number, block in enumerate(self.blocks)]
        return [self.from_images(first), *others, Unit((), mean_over_pixels)]


def vgg11(data: DataInfo, /) -> Classifier:
    """VGG-11 with BatchNorm for 32x32 images (9.2 M parameters), trained from scratch."""
    return _vgg(11, data)


def vgg16(data: DataInfo, /) -> Classifier:
    """VGG-16 with BatchNorm for 32x32 images (14.7 M parameters), trained from scratch."""
    return _vgg(16, data)


def _vgg(depth: int, data: DataInfo) -> Classifier:
    check_images(data, f"vgg{depth}", smallest=32)
    return Classifier(Vgg(depth), nn.Linear(Vgg.features, len(data.classes)))
