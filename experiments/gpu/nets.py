"""LeNet and the CNN of `fedsim bench` (experiments/bench/workloads.py) as models of an experiment."""

from __future__ import annotations

from torch import nn

from fedsim.models.base import Classifier, DataInfo, Unit
from fedsim.models.images import ImageBackbone


class Plain(ImageBackbone):
    """A stack of layers behind images in 0..1."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        self.layers = layers

    def units(self) -> list[Unit]:
        """A single one."""
        return [self.from_images(Unit(("layers",), self.layers))]


def lenet(data: DataInfo, /) -> Classifier:
    """62,006 parameters with ten classes; images 3x32x32."""
    layers = nn.Sequential(
        nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(),
    )  # fmt: skip
    return Classifier(Plain(layers), nn.Linear(84, len(data.classes)))


def cnn(data: DataInfo, /) -> Classifier:
    """1,626,442 parameters with ten classes; images 3x32x32."""
    layers = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25),
        nn.Flatten(), nn.Linear(64 * 14 * 14, 128), nn.ReLU(), nn.Dropout(0.5),
    )  # fmt: skip
    return Classifier(Plain(layers), nn.Linear(128, len(data.classes)))
