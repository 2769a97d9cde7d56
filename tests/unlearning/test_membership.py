"""Membership inference: exact small cases, and power where there is something to find."""

from __future__ import annotations

import numpy as np
import pytest

from fedsim.unlearning.membership import (
    attack,
    auc,
    auc_error,
    learnt_auc_error,
    scores,
    true_positives,
)

RNG = np.random.default_rng(0)


def _probabilities(count: int, sharp: float) -> tuple[np.ndarray, np.ndarray]:
    labels = RNG.integers(0, 10, count)
    logits = RNG.normal(size=(count, 10))
    logits[np.arange(count), labels] += sharp
    grown = np.exp(logits)
    return grown / grown.sum(1, keepdims=True), labels


def test_auc_by_hand() -> None:
    assert auc(np.array([3.0, 4.0]), np.array([1.0, 2.0])) == 1.0
    assert auc(np.array([1.0, 4.0]), np.array([2.0, 3.0])) == 0.5
    assert auc(np.array([1.0, 1.0]), np.array([1.0])) == 0.5


def test_true_positives_at_few_false_ones() -> None:
    others = np.arange(200.0)  # two may be above the threshold
    assert true_positives(np.array([196.0, 197.5, 300.0, 5.0]), others) == 0.5
    assert true_positives(np.array([9.0]), np.full(100, 9.0)) == 0.0


def test_a_rate_below_one_sample_cannot_be_measured() -> None:
    members = np.arange(50.0)
    assert true_positives(members, np.arange(36.0)) is None
    assert true_positives(members, np.arange(99.0)) is None
    assert true_positives(members, np.arange(100.0)) == 0.0
    assert true_positives(members, np.arange(36.0), rate=1 / 36) == 15 / 50  # one of 36: above 34 are 15
    found = attack(*_probabilities(60, 1.0), *_probabilities(36, 1.0))
    assert {one["tpr"] for one in found.values()} == {None}


def test_scores_of_one_sample() -> None:
    found = scores(np.array([[0.5, 0.25, 0.25]]), np.array([1]))
    assert found["confidence"].tolist() == [0.5]
    assert found["entropy"][0] == pytest.approx(-1.5 * np.log(2))
    assert found["loss"][0] == pytest.approx(np.log(0.25))


def test_attacks_find_members_of_an_overfitted_model_and_nothing_where_nothing_is() -> None:
    known, unseen = _probabilities(150, 6.0), _probabilities(150, 1.0)
    power = attack(*known, *unseen)
    assert set(power) == {"confidence", "entropy", "loss", "model"}
    assert all(found["auc"] > 0.8 and (found["tpr"] or 0) > 0.1 for found in power.values())
    nothing = attack(*_probabilities(150, 1.0), *_probabilities(150, 1.0))
    assert all(abs(found["auc"] - 0.5) < 4 * auc_error(150, 150) for found in nothing.values())


def test_too_few_samples_teach_no_attack() -> None:
    assert "model" not in attack(*_probabilities(9, 1.0), *_probabilities(50, 1.0))


def test_the_error_of_an_auc_is_its_spread() -> None:
    drawn = [auc(RNG.normal(size=30), RNG.normal(size=20)) for _ in range(2000)]
    assert np.std(drawn) == pytest.approx(auc_error(30, 20), rel=0.1)


def test_a_learnt_attack_varies_more_than_a_fixed_one() -> None:
    """Simulated where there is nothing to find: the error covers what the AUC varies."""
    drawn = [attack(*_probabilities(40, 3.0), *_probabilities(20, 3.0))["model"]["auc"] for _ in range(12)]
    spread = np.std(np.array(drawn, dtype=float))
    assert auc_error(40, 20) < spread < 1.2 * learnt_auc_error(40, 20)
    assert learnt_auc_error(1000, 1000) == pytest.approx(1.205 * auc_error(1000, 1000))
