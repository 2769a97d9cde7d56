"""Couplings, heads and objectives against their equations; methods against each other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from fedsim.local_learning.couplings import Follower, Momentum, duplicate, leap_units
from fedsim.local_learning.heads import HEADS, Decoder, joined, linear, patches
from fedsim.local_learning.lambdas import weights_of
from fedsim.local_learning.objectives import Patched, Supervised, patch_count, supervised_contrast
from fedsim.local_learning.windows import Batch
from fedsim.models.resnet import BasicBlock
from tests.local_learning.nets import batch, gradients, learner


def test_an_ema_has_its_closed_form() -> None:
    """e_T = m^T e_0 + (1 - m^T) θ for a θ that stays."""
    live = nn.Linear(3, 2)
    follower = Follower(live, 0.9)
    start = follower.copy.weight.clone()
    with torch.no_grad():
        live.weight.add_(1.0)
    for _ in range(7):
        follower.follow()
    expected = 0.9**7 * start + (1 - 0.9**7) * live.weight
    torch.testing.assert_close(follower.copy.weight, expected)
    follower.rebuild()
    assert torch.equal(follower.copy.weight, live.weight)


def test_the_mean_of_emas_is_the_ema_of_the_mean() -> None:
    """Why aggregating EMAs in a federation is sound."""
    torch.manual_seed(0)
    emas, mean_live = [], [torch.zeros(4) for _ in range(5)]
    for _ in range(3):
        live = nn.Linear(4, 1, bias=False)
        nn.init.zeros_(live.weight)
        follower = Follower(live, 0.8)
        for step in range(5):
            with torch.no_grad():
                live.weight.copy_(torch.randn(1, 4))
            mean_live[step] += live.weight[0].detach() / 3
            follower.follow()
        emas.append(follower.copy.weight[0])
    expected = torch.zeros(4)
    for value in mean_live:
        expected = 0.8 * expected + 0.2 * value
    torch.testing.assert_close(torch.stack(emas).mean(0), expected)


def test_man_plus_with_scale_one_is_man() -> None:
    images, labels = batch()
    man, plus = learner("man", 4), learner("man++", 4)
    plus.load_state_dict(man.state_dict(), strict=False)
    man.gradients(images, labels)
    plus.gradients(images, labels)
    found = gradients(plus)
    for name, gradient in gradients(man).items():
        assert torch.equal(found[name], gradient)
    extra = found.keys() - gradients(man).keys()
    assert extra == {f"auxiliary.u{k}.coupling.scale" for k in range(3)}


def test_the_scale_moves_weight_from_the_ema_to_the_copy() -> None:
    torch.manual_seed(0)
    unit = BasicBlock(4, 4, 1)
    coupling = Momentum(unit, duplicate(unit, independent=True), 0.9, scaled=True, independent=True)
    x = torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        coupling.scale.fill_(2.0)
        assert torch.equal(coupling(x), 2 * coupling.bias(x))
        coupling.scale.fill_(0.0)
        assert torch.equal(coupling(x), 2 * coupling.ema(x))


def test_a_bias_of_channels_begins_with_the_ema_alone_and_trains() -> None:
    images, labels = batch()
    local = learner("man", 3, bias="channel")
    coupling = local.auxiliary["u1"].coupling
    x = torch.randn(2, 16, 16, 16)
    assert torch.equal(coupling(x), coupling.ema(x))
    local.gradients(images, labels)
    assert coupling.bias.values.shape == (1, 32, 1, 1)
    assert coupling.bias.values.grad.abs().sum() > 0
    trained, frozen = (
        sum(p.numel() for p in coupling.parameters() if p.requires_grad is kind) for kind in (True, False)
    )
    assert trained == 32 < frozen


def test_an_ema_moves_towards_the_next_blocks_first_unit_and_nothing_trains_it() -> None:
    images, labels = batch()
    local = learner("man", 2)
    ema = local.auxiliary["u1"].coupling.ema
    assert ema.source[0] is local.model.backbone.blocks[1]
    assert not any(p.requires_grad for p in ema.parameters())
    before = ema.copy.conv1.weight.clone()
    with torch.no_grad():
        local.model.backbone.blocks[1].conv1.weight.add_(1.0)
    local.gradients(images, labels)
    torch.testing.assert_close(ema.copy.conv1.weight, before + 0.005)


def test_copies_are_in_the_mode_of_the_units_that_they_copy() -> None:
    """Bias tuning keeps BatchNorm of a pre-trained unit in eval mode: so do its copies."""
    images, labels = batch()
    local = learner("mlaan", 3)
    local.model.eval()
    local.auxiliary.train()
    before = {name: value.clone() for name, value in local.auxiliary.named_buffers()}
    local.gradients(images, labels)
    assert before
    for name, value in local.auxiliary.named_buffers():
        assert torch.equal(value, before[name])


def test_official_copies_begin_with_weights_of_their_own() -> None:
    ours, official = learner("man", 2), learner("man", 2, compat="official")
    unit = ours.model.backbone.blocks[1].conv1.weight
    assert torch.equal(ours.auxiliary["u1"].coupling.bias.conv1.weight, unit)
    bias, ema = (getattr(official.auxiliary["u1"].coupling, name) for name in ("bias", "ema"))
    assert not torch.equal(bias.conv1.weight, unit)
    assert not torch.equal(bias.conv1.weight, ema.copy.conv1.weight)
    assert bias.conv1.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 32)), rel=0.05)


def test_official_mlaan_trains_the_last_block_by_its_cascade_alone() -> None:
    ours, official = learner("mlaan", 4), learner("mlaan", 4, compat="official")
    assert len(ours.windows) - len(official.windows) == 1
    assert [len(official.auxiliary[k].coupling.emas) for k in ("u1_cascade", "u2_cascade")] == [1, 1]
    assert [len(ours.auxiliary[k].coupling.emas) for k in ("u1_cascade", "u2_cascade")] == [2, 1]


def test_a_leap_begins_as_the_live_units_one_after_the_other() -> None:
    images, _ = batch()
    local = learner("mlaan", 4)
    local.eval()
    x = local.chain.run(0, 2, images)
    torch.testing.assert_close(local.auxiliary["u1_cascade"].coupling(x), local.chain.run(2, 4, x))


def test_windows_of_the_hierarchy() -> None:
    windows = learner("hpff", 4).windows
    spans = [(w.start, w.stop, w.weight) for w in windows]
    single, cascade = 0.001, 0.999
    assert spans == [
        (0, 1, single), (0, 2, cascade), (1, 2, single), (1, 3, cascade), (2, 3, single),
        (2, 4, cascade), (3, 4, single),
    ]  # fmt: skip


def test_a_cascade_of_one_block_is_independent_windows_with_both_weights() -> None:
    images, labels = batch()
    options = {"patches": 1, "independent_weight": 0.25, "cascade_weight": 0.5}
    local, plain = learner("hpff", 4, cascade=1, **options), learner("dgl", 4)
    for key, network in plain.auxiliary.items():
        for suffix in ("", "_cascade"):
            local.auxiliary[key + suffix].load_state_dict(network.state_dict())
    local.gradients(images, labels)
    plain.gradients(images, labels)
    for name, gradient in gradients(plain.model).items():
        torch.testing.assert_close(gradients(local.model)[name], 0.75 * gradient, rtol=1e-4, atol=1e-7)


# ------------------------------------------------------------------------------------------ patches


@pytest.mark.parametrize("shape", [(2, 3, 6, 8), (2, 3, 5, 7), (2, 10, 3)])
@pytest.mark.parametrize("n", [1, 2])
def test_patches_are_put_together_again(shape: tuple[int, ...], n: int) -> None:
    x = torch.randn(shape)
    parts = patches(x, n)
    assert len(parts) == n * n
    assert torch.equal(joined(parts, n), x)


@pytest.mark.parametrize("with_decoder", [False, True])
def test_two_passes_over_patches_are_the_direct_gradient(with_decoder: bool) -> None:
    torch.manual_seed(0)
    decoder = Decoder((4, 4, 4), (3, 8, 8)).double() if with_decoder else None
    objective = Patched(HEADS["dgl"]((4, 4, 4), 3).double(), decoder, 2, task=0.7, reconstruction=0.3)
    unit = nn.Conv2d(3, 4, 3, padding=1).double()
    data = Batch(torch.rand(5, 3, 16, 16), torch.tensor([0, 1, 2, 0, 1]))
    images = data.inputs.double()

    def found(run: Any) -> list[torch.Tensor]:
        unit.zero_grad()
        objective.zero_grad()
        loss = run(functional.avg_pool2d(unit(images), 2))
        both = [*unit.parameters(), *objective.parameters()]
        return [loss.detach(), *(p.grad.clone() for p in both if p.grad is not None)]

    def direct(x: torch.Tensor) -> torch.Tensor:
        loss = objective(x, data)
        (0.5 * loss).backward()
        return loss

    one = found(direct)
    two = found(lambda x: objective.backward(x, data, 0.5, torch.Tensor.backward))
    assert len(one) == len(two) > 10
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_a_mean_and_a_linear_layer_do_not_see_patches() -> None:
    head = linear((4, 6, 6), 3).double()
    x = torch.randn(2, 4, 6, 6).double()
    data = Batch(x, torch.tensor([0, 2]))
    whole = Supervised(head)(x, data)
    torch.testing.assert_close(Patched(head, None, 2)(x, data), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(Patched(head, None, 1)(x, data), whole, rtol=0, atol=0)


def test_maps_that_are_too_small_are_seen_whole_and_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    assert patch_count((8, 4, 4), 2) == 2
    assert patch_count((8, 5, 3), 2) == patch_count((8, 5, 3), 2) == 1
    assert patch_count((9,), 2) == 1
    said = [r.getMessage() for r in caplog.records if "[8, 5, 3]" in r.getMessage()]
    assert len(said) == 1
    assert "(n = 1)" in said[0]


# ------------------------------------------------------------------------------ heads, losses, λ


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("shape", [(16, 32, 32), (64, 8, 8), (256, 1, 1), (17, 12), (5,)])
def test_heads_take_what_windows_put_out(name: str, shape: tuple[int, ...]) -> None:
    assert HEADS[name](shape, 7)(torch.randn(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize(
    ("shape", "image"), [((16, 32, 32), (3, 32, 32)), ((64, 8, 8), (1, 28, 28)), ((8, 28, 28), (3, 224, 224)),
                         ((8, 14, 14), (3, 224, 224)), ((8, 7, 7), (3, 96, 96))]
)  # fmt: skip
def test_decoders_reach_the_image(shape: tuple[int, ...], image: tuple[int, ...]) -> None:
    assert Decoder(shape, image)(torch.randn(2, *shape)).shape == (2, *image)


def test_auxiliary_parameters_of_resnet32_are_those_of_the_specification() -> None:
    """K = 16: 0.84 M for DGL, 0.39 M for 1c2f, 1.44 M and 0.47 M frozen for MAN; the backbone has 0.47 M."""
    from fedsim.local_learning import LocallySupervised
    from fedsim.models.resnet import resnet32

    def counts(method: str, **options: Any) -> tuple[int, int]:
        parts = list(LocallySupervised(resnet32(), method, 16, **options).auxiliary.parameters())
        return tuple(sum(p.numel() for p in parts if p.requires_grad is kind) for kind in (True, False))

    assert counts("dgl")[0] == pytest.approx(0.84e6, rel=0.02)
    assert counts("dgl", head="1c2f")[0] == pytest.approx(0.39e6, rel=0.02)
    assert counts("greedy")[0] == pytest.approx(5e3, rel=0.2)
    trained, frozen = counts("man")
    assert trained == pytest.approx(1.44e6, rel=0.1)
    assert frozen == pytest.approx(0.47e6, rel=0.02)


def test_supervised_contrast_against_its_sum() -> None:
    torch.manual_seed(0)
    z, labels = torch.randn(6, 4), torch.tensor([0, 0, 1, 1, 1, 2])
    unit = functional.normalize(z)
    rows = []
    for i in range(6):
        others = [j for j in range(6) if j != i]
        total = sum(math.exp(unit[i] @ unit[j] / 0.07) for j in others)
        same = [j for j in others if labels[j] == labels[i]]
        terms = [-math.log(math.exp(unit[i] @ unit[j] / 0.07) / total) for j in same]
        rows.append(sum(terms) / max(len(same), 1))
    assert supervised_contrast(z, labels).item() == pytest.approx(sum(rows) / 6, rel=1e-4)
    assert supervised_contrast(z, torch.arange(6)).item() == 0


def test_weights_of_infopro_run_from_first_to_last() -> None:
    from fedsim.local_learning import LocallySupervised
    from fedsim.models.resnet import resnet32

    local = LocallySupervised(resnet32(), "infopro", 16)
    table = weights_of(local.chain, local.ends)
    assert len(table) == 15
    assert (table[0], table[-1]) == (pytest.approx((5.0, 0.05)), pytest.approx((0.2, 0.5)))
    assert table[7] == pytest.approx((2.6, 0.275))
    staged = weights_of(local.chain, local.ends, (5, 0), (0, 1), by_stage=True)
    assert sorted({round(one, 2) for one, _ in staged}) == [3.93, 4.29, 4.64]  # as the released code of MAN


def test_a_leap_has_every_change_of_shape_and_the_last_unit() -> None:
    shapes = [(16, 32, 32)] * 6 + [(32, 16, 16)] * 5 + [(64, 8, 8)] * 5
    assert leap_units(shapes, 2, 4) == [6, 9, 11, 15]
    assert leap_units(shapes, 2, 1) == [6, 11, 15]
    assert leap_units(shapes, 13, 4) == [14, 15]
    assert leap_units(shapes, 14, 4) == [15]
