"""Batches that say nothing (blank, constant, equal images, one class) do not move shared weights far."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsim.local_learning import LocallySupervised
from fedsim.local_learning.heads import _Norm1d, _Norm2d, dgl, without_rounding
from fedsim.local_learning.objectives import supervised_contrast
from fedsim.models.base import DataInfo
from fedsim.models.vgg import vgg_small
from tests.local_learning.nets import LOCAL, batch

DATA = DataInfo(tuple("abcdefghij"), (3, 16, 16))


def batches(kind: str) -> tuple[Tensor, Tensor]:
    images, labels = batch(8)
    return {
        "blank": (torch.zeros_like(images), labels),
        "constant": (torch.full_like(images, 137), labels),
        "equal": (images[:1].expand_as(images).clone(), labels),
        "one class": (images, torch.full_like(labels, 2)),
        "blank, one class": (torch.zeros_like(images), torch.zeros_like(labels)),
    }[kind]


def moved(method: str, kind: str, **options: object) -> float:
    """How far three steps move the backbone and the head, L2."""
    torch.manual_seed(0)
    net = vgg_small(DATA)
    images, labels = batches(kind)
    learner = LocallySupervised(net, method, 4, sample=images, **options).train()  # type: ignore[arg-type]
    tool = torch.optim.SGD([p for p in learner.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    before = [p.detach().clone() for p in net.parameters()]
    for _ in range(3):
        learner.local_step(images, labels, tool)
    steps = [(p.detach() - old).square().sum() for p, old in zip(net.parameters(), before, strict=True)]
    return torch.stack(steps).sum().sqrt().item()


@pytest.mark.parametrize("kind", ["blank", "constant", "equal", "one class", "blank, one class"])
@pytest.mark.parametrize("method", LOCAL)
def test_batches_that_say_nothing_move_little(method: str, kind: str) -> None:
    """Back-propagation moves 1 to 2; unguarded norms of equal rows moved 1e4 (dgl) to 1e10 (man++)."""
    assert moved(method, kind) < 4


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("infopro", {"contrast": True, "head": "dgl"}),
        ("mlaan", {"compat": "official"}),
        ("man", {"bias": "channel"}),
    ],
)
def test_so_do_their_variants(method: str, options: dict[str, object]) -> None:
    assert moved(method, "blank", **options) < 4


def test_ordinary_values_pass_norms_bit_by_bit() -> None:
    torch.manual_seed(0)
    for mine, theirs, shape in (
        (_Norm1d(5, track_running_stats=False), nn.BatchNorm1d(5, track_running_stats=False), (6, 5)),
        (_Norm2d(5, track_running_stats=False), nn.BatchNorm2d(5, track_running_stats=False), (6, 5, 3, 3)),
    ):
        x, weights = torch.randn(shape) + 3, torch.randn(shape)
        gradients = []
        for norm in (mine, theirs):
            leaf = x.clone().requires_grad_()
            out = norm(leaf)
            (weights * out).sum().backward()
            gradients.append((out.detach(), leaf.grad))
        assert torch.equal(gradients[0][0], gradients[1][0])
        assert torch.equal(gradients[0][1], gradients[1][1])


def test_a_channel_of_rounding_errors_is_constant_and_has_no_gradient() -> None:
    x = torch.randn(6, 3)
    x[:, 1] = 2.5 + 2e-6 * torch.arange(6)
    x.requires_grad_()
    out = without_rounding(x)
    assert torch.equal(out[:, 1].detach(), torch.full((6,), 2.5))
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.sum(0).tolist() == [6.0, 0.0, 6.0]


def test_one_sample_taken_twice_gives_a_head_no_gradient_below_its_vectors() -> None:
    """What clients do with a last batch of one sample."""
    torch.manual_seed(0)
    head = dgl((8,), 3).train()
    x = torch.randn(1, 8).expand(2, 8).clone().requires_grad_()
    functional.cross_entropy(head(x), torch.tensor([1, 1])).backward()
    assert x.grad is not None
    assert x.grad.abs().max() == 0


def test_a_contrast_with_rows_of_zeros_is_bounded() -> None:
    features = torch.randn(6, 4)
    features[2:4] = 0
    features.requires_grad_()
    loss = supervised_contrast(features, torch.tensor([0, 0, 0, 1, 1, 1]))
    loss.backward()
    assert loss.isfinite()
    assert features.grad is not None
    assert features.grad.abs().max() < 100
