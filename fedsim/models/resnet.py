"""CIFAR residual networks, trained from scratch (arXiv 1512.03385, section 4.2), with 1x1-conv shortcuts.

    image ─ stem (3x3 conv, 16) ─ n blocks of 16 ─ n of 32 ─ n of 64 ─ mean over pixels ─> [n, 64]

depth = 6 n + 2. The first block of the second and third stage halves the resolution. Units: `stem`,
`blocks` (one flat list), the mean.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from fedsim.models.base import Classifier, DataInfo, Unit
from fedsim.models.images import ImageBackbone, check_images

CIFAR_MEAN = (125.3 / 255, 123.0 / 255, 113.9 / 255)
CIFAR_STD = (63.0 / 255, 62.1 / 255, 66.7 / 255)
CIFAR10 = DataInfo(
    ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"), (3, 32, 32)
)
_WIDTHS = (16, 32, 64)


class Stem(nn.Module):
    """3x3 convolution, BatchNorm, ReLU: [n, 3, h, w] -> [n, width, h, w]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = _conv(3, width, 3)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Activations after the ReLU."""
        return functional.relu(self.bn(self.conv(x)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: [n, a, h, w] -> [n, b, h / stride, w / stride]."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, outputs, 3, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv(outputs, outputs, 3)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut.append(_conv(inputs, outputs, 1, stride)).append(nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Activations after the ReLU."""
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(y + self.shortcut(x))


class ResNet(ImageBackbone):
    """Images -> features [n, 64].

    Args:
        depth: 6 n + 2.
    """

    features = _WIDTHS[-1]

    def __init__(self, depth: int) -> None:
        super().__init__(CIFAR_MEAN, CIFAR_STD)
        self.stem = Stem(_WIDTHS[0])
        self.blocks = nn.Sequential()
        inputs = _WIDTHS[0]
        for stage, width in enumerate(_WIDTHS):
            for number in range((depth - 2) // 6):
                self.blocks.append(BasicBlock(inputs, width, 2 if stage and number == 0 else 1))
                inputs = width

    def units(self) -> list[Unit]:
        """Stem, residual blocks, mean over pixels."""
        blocks = [Unit((f"blocks.{number}",), block) for number, block in enumerate(self.blocks)]
        return [self.from_images(Unit(("stem",), self.stem)), *blocks, Unit((), mean_over_pixels)]


def mean_over_pixels(x: Tensor) -> Tensor:
    """[n, channels, h, w] -> [n, channels]."""
    return x.mean((2, 3))


def resnet20(data: DataInfo = CIFAR10, /) -> Classifier:
    """ResNet-20 for 32x32 images (0.27 M parameters), trained from scratch."""
    return _resnet(20, data)


def resnet32(data: DataInfo = CIFAR10, /) -> Classifier:
    """ResNet-32 for 32x32 images (0.47 M parameters), trained from scratch."""
    return _resnet(32, data)


def resnet56(data: DataInfo = CIFAR10, /) -> Classifier:
    """ResNet-56 for 32x32 images (0.86 M parameters), trained from scratch."""
    return _resnet(56, data)


def resnet110(data: DataInfo = CIFAR10, /) -> Classifier:
    """ResNet-110 for 32x32 images (1.73 M parameters), trained from scratch."""
    return _resnet(110, data)


def _resnet(depth: int, data: DataInfo) -> Classifier:
    check_images(data, f"resnet{depth}", smallest=4)
    return Classifier(ResNet(depth), nn.Linear(ResNet.features, len(data.classes)))


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """No bias; weights N(0, 2 / (kernel² * outputs))."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv
