"""Nearest names, also of those that stand behind a prefix."""

from __future__ import annotations

import pytest

from fedsim import registry
from fedsim.errors import UserError


@pytest.mark.parametrize(
    ("kind", "name", "meant"),
    [
        ("datasets", "cifar100", "torchvision:CIFAR100"),
        ("datasets", "flowers-102", "torchvision:Flowers102"),
        ("datasets", "CIFAR10", "cifar10"),
        ("datasets", "FashionMNIST", "fashion-mnist"),
        ("datasets", "digts", "digits"),
        ("models", "vit_base_patch16_224", "timm:vit_base_patch16_224"),
        ("models", "vit-b-32", "open_clip:ViT-B-32"),
        ("models", "ResNet-20", "resnet20"),
        ("models", "timm", "timm:"),
    ],
)
def test_the_nearest_name_may_stand_behind_a_prefix(kind: str, name: str, meant: str) -> None:
    with pytest.raises(UserError, match=rf"did you mean '{meant}'\? \(fedsim list {kind}\)$"):
        registry.resolve(kind, name)


@pytest.mark.parametrize(
    ("kind", "name", "meant"),
    [
        ("datasets", "torchvison:CIFAR100", "torchvision:CIFAR100"),
        ("datasets", "image_folder:photos", "imagefolder:photos"),
        ("models", "Timm:resnet18", "timm:resnet18"),
    ],
)
def test_a_prefix_may_be_misspelt(kind: str, name: str, meant: str) -> None:
    with pytest.raises(UserError, match=rf"did you mean '{meant}'\?"):
        registry.resolve(kind, name)


def test_a_module_that_is_not_there_is_no_prefix() -> None:
    with pytest.raises(UserError) as caught:
        registry.resolve("strategies", "my_package.mine:Strategy")
    assert "did you mean" not in str(caught.value)
