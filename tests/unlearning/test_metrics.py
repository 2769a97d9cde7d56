"""Figures of forgetting by hand; edits and ascent on small tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fedsim.errors import UserError
from fedsim.unlearning import ascent, edits
from fedsim.unlearning.metrics import Floor, amount_at, js_divergence, probe, rounds_to, tow


def test_tug_of_war_is_1_at_retraining() -> None:
    assert tow([0.1, 0.9, 0.8], [0.1, 0.9, 0.8]) == 1
    assert tow([0.6, 0.9, 0.8], [0.1, 0.9, 0.7]) == pytest.approx(0.5 * 1 * 0.9)


def test_divergence_is_0_for_the_same_and_1_bit_for_the_opposite() -> None:
    p, q = np.array([[1.0, 0.0], [0.5, 0.5]]), np.array([[0.0, 1.0], [0.5, 0.5]])
    assert js_divergence(p, p) == 0
    assert js_divergence(p, q) == pytest.approx(0.5)
    assert js_divergence(p, q) == js_divergence(q, p)


def test_a_probe_finds_a_class_that_the_head_hides() -> None:
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1, 2], 40)
    features = rng.normal(size=(120, 4)) + 4 * np.eye(4)[y]
    blind = rng.normal(size=(120, 4))
    assert probe(features, y, features[80:], y[80:]) > 0.95
    assert probe(blind[:60], y[::2], blind[60:], y[1::2]) < 0.6


def test_the_floor_is_the_distance_of_two_retrainings_and_never_less_than_a_sample() -> None:
    floor = Floor(0.50, 0.54, 0.01)
    assert floor.inside(0.45)
    assert floor.inside(0.59)
    assert not floor.inside(0.44)
    assert Floor(0.0, 0.0, 0.02).inside(0.02)
    assert not Floor(0.0, 0.0, 0.02).inside(0.03)


def test_what_was_spent_when_a_level_was_reached() -> None:
    curve = [0.1, 0.5, 0.4, 0.9]
    assert rounds_to(curve, 0.5) == 1
    assert amount_at([0, 10, 20, 30], curve, 0.6) == 30
    assert amount_at([0, 10, 20, 30], curve, 0.95) is None


# ------------------------------------------------------------------------------------------ edits


STATE = {
    "conv.weight": torch.ones(2, 1, 3, 3),
    "head.weight": torch.arange(6.0).reshape(3, 2),
    "head.bias": torch.ones(3),
}


def test_edits_change_what_they_say_and_nothing_else() -> None:
    head = nn.Linear(2, 3)
    turned = edits.negated(STATE, "conv")
    assert turned["conv.weight"].eq(-1).all()
    assert turned["head.weight"] is STATE["head.weight"]
    masked = edits.head_masked(STATE, head, [1])
    assert masked["head.weight"].tolist() == [[0, 1], [0, 0], [4, 5]]
    assert masked["head.bias"].tolist() == [1, -1e4, 1]
    fresh = edits.fresh_rows(STATE, head, [0, 2])
    assert fresh["head.weight"].tolist() == [[0, 0], [2, 3], [0, 0]]
    assert fresh["head.bias"].tolist() == [0, 1, 0]
    assert STATE["conv.weight"].eq(1).all()
    assert STATE["head.bias"].eq(1).all()


def test_edits_of_what_is_frozen_or_missing_are_refused() -> None:
    with pytest.raises(UserError, match=r"'stem.weight', which this \[tuning\] freezes"):
        edits.negated(STATE, "stem")
    with pytest.raises(UserError, match="linear head with a bias; this model's head is a Identity"):
        edits.head_masked(STATE, nn.Identity(), [0])


# ----------------------------------------------------------------------------------------- ascent


def test_the_reference_is_the_global_model_without_one_client() -> None:
    own, other = torch.tensor([4.0, 0.0]), torch.tensor([1.0, 3.0])
    mean = (own + 3 * other) / 4
    assert ascent.reference([mean], [own], 1 / 4)[0].tolist() == pytest.approx(other.tolist())
    assert ascent.distance([own, mean], [other, mean]).item() == pytest.approx(18.0)


def test_the_reference_is_the_mean_of_the_others_whatever_everybody_weighs() -> None:
    """Shares 0.6 and 4 x 0.1: taken for one of five alike, the big client would stay in by half."""
    torch.manual_seed(0)
    models, shares = torch.randn(5, 7, dtype=torch.float64), torch.tensor([0.6, 0.1, 0.1, 0.1, 0.1]).double()
    mean = shares @ models
    for client in range(5):
        others = [k for k in range(5) if k != client]
        expected = shares[others] @ models[others] / shares[others].sum()
        [found] = ascent.reference([mean], [models[client]], shares[client].item())
        torch.testing.assert_close(found, expected)


def test_steps_stay_in_the_ball_and_end_far_from_home() -> None:
    centre, own = torch.zeros(4), torch.full((4,), 0.1)
    w = torch.zeros(4)
    after = ascent.projection([w], [centre], torch.tensor(1.0), [own], far=0.5)
    w += 10.0
    after()
    assert w.square().sum().item() == pytest.approx(1.0)
    halted = w.clone()  # ‖w - own‖² = 4 · 0.4² = 0.64 > 0.5: this was the last step
    w -= 3.0
    after()
    assert torch.equal(w, halted)


def test_ascent_runs_on_meta_tensors() -> None:
    w = torch.empty(3, device="meta")
    ascent.projection([w], [w.clone()], torch.empty((), device="meta"), [w.clone()], far=1.0)()
    assert w.is_meta
