"""A model whose backbone is bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedsim.models.base import Classifier, DataInfo


class Backbone(nn.Module):
    """Flatten, scale, one bfloat16 layer."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layer = nn.Linear(size, 16).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer((x.flatten(1).float() / 255).to(torch.bfloat16))
        return out.relu().float()


def make(data: DataInfo, /) -> Classifier:
    """A small half-precision model."""
    size = 1
    for n in data.sample_shape:
        size *= n
    return Classifier(Backbone(size), nn.Linear(16, len(data.classes)))
