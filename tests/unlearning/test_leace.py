"""LEACE in closed form: nothing linear is left, and clients' sums give what pooled data give."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedsim.data.attributes import Attribute
from fedsim.errors import UserError
from fedsim.unlearning.leace import leace
from fedsim.unlearning.moments import Floats, Moments, coded, known, shapes
from fedsim.unlearning.probes import attack

BINARY, TRIPLE, NUMBER = Attribute("b", ("no", "yes")), Attribute("t", ("x", "y", "z")), Attribute("n")


def samples(n: int = 500, d: int = 12) -> tuple[Floats, Floats]:
    """Correlated features with a large mean that hold a binary, a three-valued and a continuous attribute."""
    rng = np.random.default_rng(0)
    raw = np.stack([rng.integers(0, 2, n), rng.integers(0, 3, n), rng.normal(size=n)], 1).astype(float)
    z = coded(torch.from_numpy(raw), (BINARY, TRIPLE, NUMBER)).numpy()
    h = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + z @ rng.normal(size=(z.shape[1], d)) + 5.0
    return h, z


def largest_correlation(h: Floats, z: Floats) -> float:
    both = np.corrcoef(np.concatenate([h, z], 1).T)
    return float(np.abs(both[: h.shape[1], h.shape[1] :]).max())


def test_no_correlation_is_left() -> None:
    h, z = samples()
    assert z.shape[1] == 1 + 2 + 1
    assert largest_correlation(h, z) > 0.2
    assert largest_correlation(leace(Moments.of(h, z))(h), z) < 1e-6


def test_clients_sums_give_the_pooled_eraser() -> None:
    """Unequal clients, one with a constant attribute: the same map to 1e-9."""
    h, z = samples()
    order = np.argsort(z[:, 0], kind="stable")  # the first clients have one value only
    parts = np.split(order, [40, 200, 450])
    total = Moments.of(h[parts[0]], z[parts[0]])
    for rows in parts[1:]:
        total = total + Moments.from_arrays(Moments.of(h[rows], z[rows]).arrays())
    federated, pooled = leace(total), leace(Moments.of(h, z))
    np.testing.assert_allclose(federated(h), pooled(h), rtol=0, atol=1e-9)
    assert {k: v.shape for k, v in total.arrays().items()} == shapes(12, 4)


def test_it_is_the_smallest_change_and_erasing_twice_is_erasing_once() -> None:
    h, z = samples()
    erase = leace(Moments.of(h, z))
    once = erase(h)
    again = leace(Moments.of(once, z))
    np.testing.assert_allclose(again(once), once, atol=1e-8)
    np.testing.assert_allclose(erase(once), once, atol=1e-8)
    # projecting h off the columns of its covariance with z leaves no correlation either, but moves h more
    basis, _ = np.linalg.qr(Moments.of(h, z).cross_covariance)
    projected = h - (h - h.mean(0)) @ basis @ basis.T
    assert largest_correlation(projected, z) < 1e-6
    for metric in (np.eye(12), np.linalg.inv(np.cov(h.T))):
        moved = [np.einsum("nd,de,ne->n", m - h, metric, m - h).mean() for m in (once, projected)]
        assert moved[0] < moved[1]


def test_a_linear_probe_is_at_chance_afterwards() -> None:
    h, z = samples(3000)
    erased = leace(Moments.of(h[:2000], z[:2000]))(h)

    def probed(values: Floats) -> tuple[float, float]:
        x, target = torch.from_numpy(values).float(), torch.from_numpy(z[:, 0]).float()
        found = attack("linear", x[:2000], target[:2000], x[2000:], target[2000:], 2)
        return found.accuracy, found.error

    before, _ = probed(h)
    after, error = probed(erased)
    assert before > 0.6
    assert abs(after - 0.5) < 2.5 * error


def test_fewer_samples_than_features_are_shrunk_and_still_erased() -> None:
    h, z = samples(10, 30)
    erase = leace(Moments.of(h, z))
    assert erase.shrinkage == pytest.approx(30 / 40)
    assert largest_correlation(erase(h), z) < 1e-6
    assert leace(Moments.of(*samples(500, 30))).shrinkage == 0


def test_a_constant_attribute_changes_nothing() -> None:
    h, z = samples()
    np.testing.assert_array_equal(leace(Moments.of(h, np.ones_like(z)))(h), h)


def test_a_number_that_is_constant_but_for_rounding_changes_nothing() -> None:
    """Sums of 0.1 leave a variance of 1e-18, which is no deviation to divide by."""
    h, z = samples()
    eraser = leace(Moments.of(h, np.full((len(h), 1), 0.1)))
    assert np.abs(eraser(h) - h).max() == 0
    both = np.concatenate([z, np.full((len(h), 1), 1234.5678)], 1)
    np.testing.assert_allclose(leace(Moments.of(h, both))(h), leace(Moments.of(h, z))(h), atol=1e-9)


def test_samples_with_an_unknown_attribute_are_told_apart() -> None:
    z = torch.tensor([[1.0, 0.5], [-1.0, 0.5], [0.0, -1.0]])
    assert known(z, (BINARY, NUMBER)).tolist() == [True, False, True]


def test_bad_moments_are_errors() -> None:
    h, z = samples()
    with pytest.raises(UserError, match="no client has two samples"):
        leace(Moments.of(h[:1], z[:1]))
    h[3] = np.inf
    with pytest.raises(UserError, match="training diverged"), np.errstate(invalid="ignore"):
        leace(Moments.of(h, z))
