"""Small nets and batches for the tests of local learning."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedsim.local_learning import LocallySupervised
from fedsim.models.base import Classifier
from fedsim.models.resnet import ResNet, resnet32

#: all methods but back-propagation
LOCAL = ("greedy", "dgl", "infopro", "man", "man++", "hpff", "mlaan")


def small() -> Classifier:
    """A ResNet-8: stem and three blocks, four units."""
    torch.manual_seed(0)
    return Classifier(ResNet(8), nn.Linear(64, 10)).train()


def batch(n: int = 6, side: int = 16) -> tuple[Tensor, Tensor]:
    """Random images as stored, and labels of which some are the same."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (n, 3, side, side), generator=generator, dtype=torch.uint8)
    return images, torch.arange(n) % 3


def learner(method: str, blocks: int | None = None, **options: object) -> LocallySupervised:
    """A ResNet-8 under a method, in train mode; always the same weights."""
    net = small()
    sample = batch()[0]
    return LocallySupervised(net, method, blocks, sample=sample, **options).train()  # type: ignore[arg-type]


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """By name, those that are there."""
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def on_meta(method: str, blocks: int, n: int = 64) -> tuple[LocallySupervised, Tensor, Tensor]:
    """ResNet-32 on `meta` with a batch for it."""
    with torch.device("meta"):
        net = resnet32()
    images = torch.empty(n, 3, 32, 32, dtype=torch.uint8, device="meta")
    labels = torch.empty(n, dtype=torch.int64, device="meta")
    return LocallySupervised(net, method, blocks).train(), images, labels
