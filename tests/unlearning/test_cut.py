"""The cut: the same function until something is erased, in every part of the platform that runs a model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedsim.building import build
from fedsim.data.attributes import Attribute
from fedsim.errors import UserError
from fedsim.task import Task
from fedsim.unlearning.cut import Detachable, Eraser
from fedsim.unlearning.leace import leace
from fedsim.unlearning.moments import Moments
from fedsim.unlearning.statistics import GroupStatistics
from tests.helpers import tiny

TINTED: dict[str, Any] = {
    "data": {"name": "tinted-digits"},
    "model": {"name": "cnn", "width": 4, "norm": "batch"},
    "client": {"name": "attribute-unlearning", "lr": 0.05, "batch_size": 16},
}


def task(*overrides: str, **detacher: Any) -> Task:
    tables = {**TINTED, "detacher": {"name": "mmd", "attributes": ["tint"], **detacher}}
    return build(tiny(*overrides, **tables))


@pytest.mark.parametrize("cut", [1, 2, 3, None])
def test_a_cut_changes_nothing_until_it_erases(cut: int | None) -> None:
    cut_key = {} if cut is None else {"cut": cut}
    ours = task(**cut_key)
    plain = build(tiny(**{**TINTED, "client": {"lr": 0.05}}))
    model = ours.model
    assert isinstance(model, Detachable)
    x = torch.from_numpy(np.array(ours.data.arrays.test_x[:20]))
    for module in (model, plain.model):
        module.eval()
    assert torch.equal(model(x), plain.model(x))
    assert model.width == {1: 4 * 16, 2: 8 * 4, 3: 8, None: 8}[cut]
    names = {e.name for e in ours.selection.shared}
    assert {f"eraser.{part}" for part in ("mean", "left", "right", "keep")} == names - {
        e.name for e in plain.selection.shared
    }
    model.eraser.left[0, 0] = 1.0
    model.eraser.right[0, 0] = 1.0
    assert not torch.equal(model(x), plain.model(x))


def test_the_eraser_is_its_formula() -> None:
    eraser = Eraser(6, 2)
    for buffer in eraser.buffers():
        buffer.normal_()
    h = torch.randn(5, 3, 2)
    flat = h.flatten(1)
    eraser.keep.fill_(1)[2] = 0
    expected = flat - (flat - eraser.mean) @ eraser.left @ eraser.right
    expected[:, 2] = eraser.mean[2]
    torch.testing.assert_close(eraser(h), expected.reshape(5, 3, 2))


def test_what_is_left_of_a_feature_that_is_the_attribute_is_not_its_rounding() -> None:
    """Two values of float32 minus their mean: 1e-8 of them remain, and tell the attribute exactly."""
    torch.manual_seed(0)
    z = torch.randint(0, 2, (500, 1)).double()
    h = torch.randn(500, 4, dtype=torch.float64)
    h[:, 0] = 0.3 + 0.4 * z[:, 0]
    h[:, 1] += z[:, 0]
    h[:, 3] = 0  # a dead feature
    h = h.float()
    erasure = leace(Moments.of(h.double().numpy(), z.numpy()))
    assert erasure.keep.tolist() == [False, True, True, False]
    eraser = Eraser(4, 1)
    for part in ("mean", "left", "right", "keep"):
        getattr(eraser, part).copy_(torch.from_numpy(np.asarray(getattr(erasure, part))))
    erased = eraser(h).double()
    assert not erased[:, [0, 3]].var(0).any()
    assert abs(torch.corrcoef(torch.cat([erased[:, 1:3], z], 1).T)[2, :2]).max() < 1e-6


def test_what_is_below_rests() -> None:
    ours = task(cut=1)
    model = ours.model
    assert isinstance(model, Detachable)
    model.train()
    model.rest_below()
    assert not model.backbone.get_submodule("block1.bn1").training
    assert model.backbone.get_submodule("block2.bn1").training


def test_a_head_can_be_exchanged() -> None:
    model = task().model
    head = torch.nn.Linear(8, 3)
    other = model.with_head(head)
    x = torch.zeros(2, 2, 8, 8, dtype=torch.uint8)
    assert other(x).shape == (2, 3)
    assert model(x).shape == (2, 10)


def test_networks_of_a_detacher_are_shared_or_personal() -> None:
    shared = task(name="gradient-reversal")
    kept = task(name="gradient-reversal", auxiliary="personal")
    assert any(e.name.startswith("detacher.") for e in shared.selection.shared)
    assert {e.name.split(".")[0] for e in kept.selection.personal} == {"detacher"}
    assert not task(auxiliary="personal").selection.personal  # mmd has none


@pytest.mark.parametrize(
    ("detacher", "message"),
    [
        ({"attributes": ["tin"]}, r"no attribute 'tin': did you mean 'tint'"),
        ({"attributes": []}, "attributes is missing: name what to unlearn; the data have: tint"),
        ({"cut": 7}, r"cut = 7, but the backbone of model 'cnn' has 3 units; give 1 to 3"),
    ],
)
def test_what_is_not_there_is_named(detacher: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        task(**detacher)


def test_data_without_attributes_are_an_error() -> None:
    with pytest.raises(UserError, match="these data have no attributes"):
        task("data.name=digits")


def test_group_statistics_are_everybodys_means() -> None:
    """Two clients of different sizes, averaged by samples: pooled group means; each pulls to the other."""
    attributes = (Attribute("a", ("x", "y")),)
    torch.manual_seed(0)
    h, z = torch.randn(30, 4), (torch.arange(30) < 10).float()[:, None]
    h[:10] += 3
    parts = []
    for rows in (slice(0, 10), slice(10, 30)):  # the first client has group 1 alone
        module = GroupStatistics(attributes, 4)
        module.begin()
        for part in h[rows].split(5):
            module.collect(part, z[rows][: len(part)])
        module.end()
        parts.append((len(h[rows]), module.sums.clone(), module.shares.clone()))
    server = GroupStatistics(attributes, 4)
    server.sums.copy_(sum(n * sums for n, sums, _ in parts) / 30)
    server.shares.copy_(sum(n * shares for n, _, shares in parts) / 30)
    server.begin()
    torch.testing.assert_close(server._means, torch.stack([h[10:].mean(0), h[:10].mean(0)]))
    mine = h[:10].clone().requires_grad_()
    value = server.penalty(mine, z[:10])
    value.backward()
    assert mine.grad is not None
    assert value.item() > 1
    assert ((-mine.grad).mean(0) * (h[10:].mean(0) - h[:10].mean(0)) > 0).all()
    assert server.penalty(mine, torch.full((10, 1), -1.0)).item() == 0
