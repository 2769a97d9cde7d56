"""Small networks for small images, trained from scratch: the baselines next to pre-trained backbones.

Weights come from torch's global RNG, which the platform seeds before it builds a model.
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from fedsim.errors import UserError
from fedsim.models.base import Classifier, DataInfo, Unit, run_units, to_unit
from fedsim.ranges import Count, Portion

Norm = Literal["batch", "group", "none"]


class Block(nn.Module):
    """Two 3x3 convolutions, each normalised, then 2x2 max pooling: [n, a, h, w] -> [n, b, h/2, w/2].

    Submodules are `conv1`, `bn1`, `conv2`, `bn2` (`gn1`, `gn2` with group normalisation), so that the
    pattern `*.bn?.*` finds exactly what FedBN keeps personal.
    """

    def __init__(self, inputs: int, outputs: int, norm: Norm) -> None:
        super().__init__()
        self.norm = {"batch": "bn", "group": "gn", "none": ""}[norm]
        for number, channels in ((1, inputs), (2, outputs)):
            bias = norm == "none"
            self.add_module(f"conv{number}", nn.Conv2d(channels, outputs, 3, padding=1, bias=bias))
            if norm == "batch":
                self.add_module(f"bn{number}", nn.BatchNorm2d(outputs))
            elif norm == "group":
                self.add_module(f"gn{number}", nn.GroupNorm(math.gcd(4, outputs), outputs))

    def forward(self, x: Tensor) -> Tensor:
        """One resolution of the network."""
        for number in (1, 2):
            x = self.get_submodule(f"conv{number}")(x)
            if self.norm:
                x = self.get_submodule(f"{self.norm}{number}")(x)
            x = functional.relu(x)
        return functional.max_pool2d(x, 2)


class ConvNet(nn.Module):
    """Two blocks and global average pooling: images [n, channels, h, w] -> features [n, 2 * width]."""

    def __init__(self, channels: int, width: int, norm: Norm, dropout: float) -> None:
        super().__init__()
        self.block1 = Block(channels, width, norm)
        self.block2 = Block(width, 2 * width, norm)
        self.dropout = nn.Dropout(dropout)

    def units(self) -> list[Unit]:
        """The two blocks, then pooling and dropout."""
        return [
            Unit(("block1",), lambda images: self.block1(2 * to_unit(images) - 1)),
            Unit(("block2",), self.block2),
            Unit(("dropout",), lambda x: self.dropout(x.mean((2, 3)))),
        ]

    def forward(self, images: Tensor) -> Tensor:
        """Features, float32."""
        return run_units(self.units(), images)


class Mlp(nn.Module):
    """Hidden layers, all as wide: inputs [n, ...] -> features [n, hidden]."""

    def __init__(self, inputs: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(inputs, hidden)
        self.more = nn.Sequential(
            *(nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU()) for _ in range(layers - 1))
        )

    def units(self) -> list[Unit]:
        """The layers; the last one makes the features."""
        more = [Unit((f"more.{number}",), layer) for number, layer in enumerate(self.more)]
        return [Unit(("hidden",), self._first), *more]

    def _first(self, inputs: Tensor) -> Tensor:
        return functional.relu(self.hidden(to_unit(inputs).flatten(1)))

    def forward(self, inputs: Tensor) -> Tensor:
        """Features, float32."""
        return run_units(self.units(), inputs)


def cnn(data: DataInfo, /, *, width: Count = 16, norm: Norm = "batch", dropout: Portion = 0.0) -> Classifier:
    """Four-layer convolutional network, trained from scratch.

    Args:
        width: channels of the first block; the second has twice as many.
        norm: normalisation after every convolution; `batch` keeps running statistics.
        dropout: share of features dropped before the head while training.

    Raises:
        UserError: samples are not images [channels, height, width] of at least 4x4 pixels.
    """
    shape = data.sample_shape
    if len(shape) != 3 or min(shape[1:]) < 4:
        raise UserError(
            f"model 'cnn' takes images [channels, height ≥ 4, width ≥ 4], the data are {list(shape)}; "
            'use [model] name = "mlp"'
        )
    head = nn.Linear(2 * width, len(data.classes))
    return Classifier(ConvNet(shape[0], width, norm, dropout), head)


class SignalNet(nn.Module):
    """Two strided convolutions over time, each group-normalised, and a mean: [n, t, c] -> [n, 2 * width]."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(channels, width, 9, stride=2, padding=4)
        self.gn1 = nn.GroupNorm(math.gcd(4, width), width)
        self.conv2 = nn.Conv1d(width, 2 * width, 9, stride=2, padding=4)
        self.gn2 = nn.GroupNorm(math.gcd(4, 2 * width), 2 * width)

    def units(self) -> list[Unit]:
        """The two convolutions, then the mean over time."""
        return [
            Unit(
                ("conv1", "gn1"), lambda x: functional.relu(self.gn1(self.conv1(x.float().transpose(1, 2))))
            ),
            Unit(("conv2", "gn2"), lambda x: functional.relu(self.gn2(self.conv2(x)))),
            Unit((), lambda x: x.mean(2)),
        ]

    def forward(self, signals: Tensor) -> Tensor:
        """Features, float32."""
        return run_units(self.units(), signals)


def signal_cnn(data: DataInfo, /, *, width: Count = 32) -> Classifier:
    """Two-layer convolutional network over time, for windows of sensor signals, trained from scratch.

    Args:
        width: channels of the first layer; the second has twice as many.

    Raises:
        UserError: samples are not signals [time, channels].
    """
    if len(data.sample_shape) != 2:
        raise UserError(
            f"model 'signal-cnn' takes signals [time, channels], the data are {list(data.sample_shape)}; "
            'use [model] name = "cnn" or "mlp"'
        )
    return Classifier(SignalNet(data.sample_shape[1], width), nn.Linear(2 * width, len(data.classes)))


def mlp(data: DataInfo, /, *, hidden: Count = 64, layers: Count = 1) -> Classifier:
    """Perceptron for inputs of any shape, trained from scratch.

    Args:
        hidden: width of the hidden layers.
        layers: how many hidden layers.
    """
    backbone = Mlp(math.prod(data.sample_shape), hidden, layers)
    return Classifier(backbone, nn.Linear(hidden, len(data.classes)))
