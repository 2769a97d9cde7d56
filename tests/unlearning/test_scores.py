"""Channel scores: the paper's equations, federated sums, and which channels are chosen."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fedsim.errors import UserError
from fedsim.unlearning.scores import channel_sums, chosen, score, scores

ALL = torch.ones(4, dtype=torch.bool)


class TwoLayers(nn.Module):
    """A convolution and a linear layer over its pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.hidden = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.relu(self.conv(x))
        return torch.relu(self.hidden(maps.flatten(2).transpose(1, 2))).mean(1)


LAYERS = {"conv": 6, "hidden": 5}


def _batches(x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    y = torch.tensor([0] * 31 + [1] * 7 + [2] * 2)  # nobody has class 3
    return torch.randn(40, 1, 8, 8, generator=generator), y


@pytest.mark.parametrize("split", ["by class", "at random"])
def test_federated_scores_equal_pooled_ones(split: str, data: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    model, (x, y) = TwoLayers().eval(), data
    order = torch.arange(40) if split == "by class" else torch.randperm(40)
    pooled, count = channel_sums(model, LAYERS, [(x, y)], 4)
    total = {name: torch.zeros_like(value) for name, value in pooled.items()}
    seen = torch.zeros(4, dtype=torch.float64)
    for rows in order.split(11):  # label skew: whole clients without a class
        sums, counts = channel_sums(model, LAYERS, _batches(x[rows], y[rows], 3), 4)
        for name, value in sums.items():
            total[name] += value.float().double()  # what travels is float32
        seen += counts
    assert seen.tolist() == count.tolist() == [31, 7, 2, 0]
    for target in (0, 1, 2):
        one, other = scores(pooled, count, target), scores(total, seen, target)
        for name in LAYERS:
            assert one[name].isfinite().all()
            torch.testing.assert_close(other[name], one[name], rtol=0, atol=1e-6)


def test_the_sums_are_the_layers_mean_activations(data: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    model, (x, y) = TwoLayers().eval(), data
    sums, _ = channel_sums(model, LAYERS, _batches(x, y, 9), 4)
    maps = torch.relu(model.conv(x)).double()
    torch.testing.assert_close(sums["conv"][1], maps[y == 1].mean((2, 3)).sum(0), rtol=0, atol=1e-5)
    units = torch.relu(model.hidden(maps.float().flatten(2).transpose(1, 2))).double()
    torch.testing.assert_close(sums["hidden"][0], units[y == 0].mean(1).sum(0), rtol=0, atol=1e-4)


def test_clipping_bounds_what_one_sample_adds(data: tuple[Tensor, Tensor]) -> None:
    model, (x, y) = TwoLayers().eval(), data
    sums, _ = channel_sums(model, LAYERS, [(x[:1] * 1e4, y[:1])], 4, clip=0.5)
    assert sums["conv"][0].norm().item() == pytest.approx(0.5)


def test_a_scoring_step_runs_on_meta_tensors() -> None:
    model = TwoLayers().eval().to("meta")
    x, y = torch.empty(3, 1, 8, 8, device="meta"), torch.empty(3, dtype=torch.int64, device="meta")
    sums, counts = channel_sums(model, LAYERS, [(x, y)], 4, clip=1.0)
    assert sums["conv"].shape == (4, 6)
    assert counts.device.type == "meta"


def test_the_equations_by_hand() -> None:
    means = torch.tensor([[1.0, 3.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 5.0], [1.0, 1.0, 1.0]]).double()
    # occurs: class 0 (mean 4/3): channel 1; class 1 (mean 1): 0, 1; class 2 (mean 5/3): 2; class 3: all
    idf = [math.log(5 / 3), math.log(5 / 4), math.log(5 / 3)]
    assert score(means, 0, ALL).tolist() == pytest.approx([1 / 4 * idf[0], 3 / 4 * idf[1], 0])
    # the released code: the mean over classes of a channel is 1, 5/4, 3/2
    code = [math.log(4 / 4), math.log(4 / 2), math.log(4 / 2)]
    assert score(means, 0, ALL, "code").tolist() == pytest.approx([1 / 4 * code[0], 3 / 4 * code[1], 0])


def test_an_exclusive_channel_is_first_and_one_that_is_everywhere_is_0() -> None:
    torch.manual_seed(0)
    means = torch.rand(4, 8).double()
    means[:, 2] = 9.0  # everywhere, above every mean
    means[:, 5] = 0.0
    means[3, 5] = 9.0  # in class 3 alone
    found = score(means, 3, ALL)
    assert found.argmax() == 5
    assert found[2] == 0
    assert (means[3] / means[3].sum()).sum().item() == pytest.approx(1)


def test_scores_do_not_depend_on_the_scale_of_a_class() -> None:
    torch.manual_seed(0)
    means = torch.rand(4, 8).double()
    scaled = means * torch.tensor([3.0, 0.1, 7.0, 100.0]).double()[:, None]
    torch.testing.assert_close(score(scaled, 1, ALL), score(means, 1, ALL))


def test_dead_layers_and_absent_classes_are_no_part_of_it() -> None:
    means = torch.rand(4, 8).double()
    means[1] = 0
    assert score(means, 1, ALL).tolist() == [0.0] * 8
    present = torch.tensor([True, False, True, True])
    torch.testing.assert_close(score(means, 0, present), score(means[[0, 2, 3]], 0, ALL[:3]))
    torch.testing.assert_close(score(means, 0, ALL), score(means, 0, present))  # a dead row counts for nobody


def test_min_count_leaves_out_small_classes_and_refuses_a_small_target() -> None:
    counts = torch.tensor([50.0, 3.0, 40.0, 60.0]).double()
    sums = {"l": torch.rand(4, 8).double() * counts[:, None]}
    few = scores(sums, counts, 0, min_count=5)["l"]
    means = sums["l"] / counts[:, None]
    torch.testing.assert_close(few, score(means, 0, counts >= 5))
    assert not torch.equal(few, scores(sums, counts, 0)["l"])
    with pytest.raises(UserError, match=r"class 1 has 3 samples .* edit\.min_count = 5"):
        scores(sums, counts, 1, min_count=5)


def test_the_highest_of_every_layer_are_chosen_once() -> None:
    found = {"a": torch.tensor([0.0, 3, 1, 2]).double(), "b": torch.tensor([9.0, 8, 7, 6]).double()}
    first = chosen(found, 0.5)
    assert {name: mask.nonzero()[:, 0].tolist() for name, mask in first.items()} == {"a": [1, 3], "b": [0, 1]}
    second = chosen(found, 0.25, pruned=first)
    assert second["a"].nonzero()[:, 0].tolist() == [2]  # never a channel of score 0, never one twice
    assert second["b"].nonzero()[:, 0].tolist() == [2]
    assert chosen(found, 0.5, direction="lowest")["a"].nonzero()[:, 0].tolist() == [0, 2]
    assert int(chosen(found, 0.5, direction="random", seed=3)["b"].sum()) == 2
    everywhere = chosen(found, 0.25, scope="global")
    assert {name: int(mask.sum()) for name, mask in everywhere.items()} == {"b": 2}


def test_an_emptied_layer_is_named_and_so_is_a_ratio_that_prunes_nothing() -> None:
    found = {"small": torch.tensor([9.0, 9.0]).double(), "large": torch.rand(30).double()}
    with pytest.raises(UserError, match="leaves layer 'small' without a channel"):
        chosen(found, 0.2, scope="global")
    with pytest.raises(UserError, match="leaves layer 'small'"):
        chosen(found, 0.5, pruned={"small": torch.tensor([True, False])})
    with pytest.raises(UserError, match=r"edit.ratio = 0.01 prunes no channel .* small 2"):
        chosen(found, 0.01)
