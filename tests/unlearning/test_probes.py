"""Fresh attackers: chance where there is nothing, strong where there is something."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedsim.unlearning.fairness import odds_gap, parity_gap
from fedsim.unlearning.probes import KINDS, Attack, Kind, attack, new_probe


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [2, 5])
def test_random_labels_are_at_chance(kind: Kind, groups: int) -> None:
    """Mean of 5 draws, within 3 standard errors; the groups are unequal."""
    found = []
    for seed in range(5):
        rng = torch.Generator().manual_seed(seed)
        h = torch.randn(900, 10, generator=rng)
        z = (torch.rand(900, generator=rng).square() * groups).floor()
        found.append(attack(kind, h[:500], z[:500], h[500:], z[500:], groups, seed=seed))
    error = math.sqrt(sum(a.error**2 for a in found)) / len(found)
    assert abs(sum(a.accuracy for a in found) / len(found) - 1 / groups) < 3 * error
    assert found[0].chance == 1 / groups
    assert max(a.information for a in found) < 0.1


def test_an_exclusive_or_is_found_by_the_network_alone() -> None:
    rng = torch.Generator().manual_seed(0)
    h = torch.randn(2000, 4, generator=rng)
    z = (h[:, 0] * h[:, 1] > 0).float()
    linear, mlp = (attack(kind, h[:1500], z[:1500], h[1500:], z[1500:], 2) for kind in KINDS)
    assert abs(linear.accuracy - 0.5) < 0.1
    assert mlp.accuracy > 0.9
    assert 0.4 < mlp.information <= math.log(2)


def test_a_linear_trace_is_found_by_both_and_a_number_is_split_at_its_median() -> None:
    rng = torch.Generator().manual_seed(0)
    h = torch.randn(1000, 4, generator=rng)
    for kind in KINDS:
        assert attack(kind, h[:700], h[:700, 0] * 3 + 2, h[700:], h[700:, 0] * 3 + 2, 0).accuracy > 0.93


def test_figures_follow_from_the_confusion() -> None:
    found = Attack.of(torch.tensor([[30, 10], [10, 10]]))
    assert found.accuracy == pytest.approx((0.75 + 0.5) / 2)
    assert found.error == pytest.approx(math.sqrt(0.75 * 0.25 / 40 + 0.5 * 0.5 / 20) / 2)
    absent = Attack.of(torch.tensor([[3, 1, 0], [0, 0, 0], [2, 0, 2]]))
    assert (absent.chance, absent.accuracy) == (0.5, pytest.approx((0.75 + 0.5) / 2))


def test_unknown_values_and_a_single_group_are_no_attack() -> None:
    h = torch.randn(50, 3)
    z = torch.where(torch.arange(50) % 2 == 0, 1.0, -1.0)
    found = attack("linear", h, z, h, z, 2)
    assert found.accuracy == 0.5
    assert math.isnan(found.information)


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_number_and_constant_features_are_no_attack(kind: Kind) -> None:
    h = torch.randn(60, 4)
    found = attack(kind, h, torch.full((60,), 7.0), h, torch.full((60,), 7.0), 0)
    assert (found.accuracy, found.chance) == (0.5, 0.5)
    codes = torch.arange(60).float() % 2
    flat = torch.full((60, 4), 0.3) + 1e-8 * h  # rounding, which is not to be divided by its deviation
    blind = attack(kind, flat, codes, flat + torch.tensor([0.1, 0, 0, 0]), codes, 2)
    assert blind.accuracy == 0.5
    assert abs(blind.information) < 0.1


def test_a_probe_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second = (new_probe(4, 2, "mlp", seed=3) for _ in range(2))
    assert torch.equal(torch.rand(3), expected)
    for left, right in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(left, right)


def test_gaps() -> None:
    groups = np.array([0] * 10 + [1] * 10)
    labels = np.tile([0, 1], 10)
    fair, unfair = labels.copy(), np.where(groups == 1, 1, labels)
    assert parity_gap(fair, groups) == 0
    assert parity_gap(unfair, groups) == pytest.approx(0.5)
    assert odds_gap(unfair, labels, groups) == pytest.approx(1.0)
    assert odds_gap(fair, labels, groups) == 0
    # one group that is known, or none with enough samples: no gap could be measured, which is not a gap of 0
    assert np.isnan(parity_gap(unfair, np.where(groups == 1, -1, groups)))
    assert np.isnan(odds_gap(unfair[:6], labels[:6], groups[:6]))
