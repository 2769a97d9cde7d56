"""Tuning modes: what trains, what stands still."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedsim.errors import UserError
from fedsim.models.base import Classifier, DataInfo, set_train_mode
from fedsim.models.cnn import cnn, mlp
from fedsim.models.tuning import bias, full, head, norm, partial

DATA = DataInfo(tuple("abc"), (1, 8, 8))


def trained(model: Classifier) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_what_each_mode_trains_on_a_cnn() -> None:
    every = {name for name, _ in cnn(DATA).named_parameters()}
    heads = {"head.weight", "head.bias"}
    norms = {f"backbone.block{b}.bn{n}.{p}" for b in (1, 2) for n in (1, 2) for p in ("weight", "bias")}
    assert trained(full(cnn(DATA))) == every
    assert trained(head(cnn(DATA))) == heads
    assert trained(bias(cnn(DATA))) == {n for n in norms if n.endswith("bias")} | heads
    assert trained(bias(cnn(DATA), head=False)) == {n for n in norms if n.endswith("bias")}
    assert trained(norm(cnn(DATA))) == norms | heads
    assert trained(partial(cnn(DATA))) == {n for n in every if "block2" in n} | heads
    assert trained(partial(cnn(DATA), blocks=2)) == every


def test_statistics_of_a_frozen_backbone_never_move() -> None:
    for mode, moves in ((full, True), (bias, False), (norm, False), (head, False)):
        model = mode(cnn(DATA))
        set_train_mode(model, training=True)
        before = {k: v.clone() for k, v in model.named_buffers()}
        model(torch.rand(8, 1, 8, 8))
        moved = any(not torch.equal(v, before[k]) for k, v in model.named_buffers())
        assert moved == moves, mode.__name__


def test_only_the_last_block_is_in_train_mode_under_partial() -> None:
    model = partial(cnn(DATA))
    set_train_mode(model, training=True)
    modes = {n: m.training for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert modes == {n: "block2" in n for n in modes}
    set_train_mode(model, training=False)
    assert not any(m.training for m in model.modules())


def test_a_mode_that_selects_nothing_is_an_error() -> None:
    with pytest.raises(UserError, match="'norm' selects no parameter"):
        norm(mlp(DATA))
    with pytest.raises(UserError, match="blocks = 7, but this backbone has 2 blocks"):
        partial(cnn(DATA), blocks=7)

    class NoBias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 4, bias=False)

    with pytest.raises(UserError, match="'bias' selects no parameter"):
        bias(Classifier(NoBias(), nn.Linear(4, 3)))


def test_a_cnn_wants_images() -> None:
    with pytest.raises(UserError, match='use \\[model\\] name = "mlp"'):
        cnn(DataInfo(tuple("abc"), (30,)))
