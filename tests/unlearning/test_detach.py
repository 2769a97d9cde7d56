"""Detachers: what is 0 for equal groups and pushes different ones together; nothing that needs a value."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fedsim import registry
from fedsim.data.attributes import Attribute
from fedsim.errors import UserError
from fedsim.unlearning import DETACHERS
from fedsim.unlearning.adversaries import RepresentationDetachment
from fedsim.unlearning.detach import SCALES, Covariance, Mmd, Space, standardised, usable
from fedsim.unlearning.statistics import GroupStatistics

BINARY, TRIPLE, NUMBER = Attribute("b", ("no", "yes")), Attribute("t", ("x", "y", "z")), Attribute("n")


def space(*attributes: Attribute) -> Space:
    return Space(attributes, width=6, classes=3, inputs=5)


def batch(n: int = 400, shift: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h, z (one binary column), labels, inputs; group 1 is shifted in the first feature."""
    torch.manual_seed(0)
    z = (torch.arange(n) % 2).float()[:, None]
    h = torch.randn(n, 6)
    h[:, 0] += shift * z[:, 0]
    return h, z, torch.arange(n) % 3, torch.rand(n, 5)


def make(name: str, *attributes: Attribute) -> nn.Module:
    torch.manual_seed(1)
    built: nn.Module = registry.resolve("detachers", name).target(space(*attributes))
    return built


def test_mmd_is_the_mean_over_pairs_of_samples() -> None:
    """Against the definition, written as loops over samples."""
    h, z, labels, inputs = batch(12, shift=2.0)
    s = standardised(h).double()
    distance = ((s[:, None] - s[None]) ** 2).sum(2)
    k = sum(torch.exp(-distance / (c * distance.mean())) for c in SCALES) / len(SCALES)
    a, b = [torch.nonzero(z[:, 0] == g)[:, 0].tolist() for g in (0, 1)]

    def mean(left: list[int], right: list[int]) -> float:
        values = [k[i, j].item() for i in left for j in right if i != j]
        return sum(values) / len(values)

    expected = mean(a, a) + mean(b, b) - 2 * mean(a, b)
    assert Mmd(space(BINARY))(h, z, labels, inputs).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["mmd", "covariance"])
def test_equal_groups_cost_nothing_and_different_ones_are_pushed_together(name: str) -> None:
    detacher = make(name, BINARY)
    assert abs(detacher(*batch()).item()) < 0.02
    h, *rest = batch(shift=4.0)
    h.requires_grad_()
    before = detacher(h, *rest)
    before.backward()
    assert before.item() > 0.1
    assert h.grad is not None
    moved = detacher(h.detach() - 20 * h.grad, *rest)
    assert moved.item() < before.item()
    force = -h.grad[:, 0]
    assert force[rest[0][:, 0] == 1].mean() < 0 < force[rest[0][:, 0] == 0].mean()


def test_mmd_given_the_label_ignores_what_the_label_explains() -> None:
    """Groups that differ only because their classes do."""
    h, _, _, inputs = batch()
    labels = torch.arange(400) % 2
    h[:, 0] += 4.0 * labels
    z = torch.where(torch.rand(400) < 0.9, labels, 1 - labels).float()[:, None]
    assert Mmd(space(BINARY))(h, z, labels, inputs).item() > 0.1
    assert abs(Mmd(space(BINARY), given_label=True)(h, z, labels, inputs).item()) < 0.03


def test_several_attributes_add_up() -> None:
    h, z, *rest = batch(shift=3.0)
    other = torch.randint(0, 3, (400, 1)).float()
    both = Mmd(space(BINARY, TRIPLE))(h, torch.cat([z, other], 1), *rest)
    single = Mmd(space(BINARY))(h, z, *rest) + Mmd(space(TRIPLE))(h, other, *rest)
    torch.testing.assert_close(both, single)


def test_samples_that_are_not_known_do_not_count() -> None:
    h, z, labels, inputs = batch(40, shift=3.0)
    z[30:] = -1
    for name in ("mmd", "covariance"):
        # h is standardised over the whole batch, so the part that is left must be a batch of its own
        whole = make(name, BINARY)(h, z, labels, inputs)
        assert torch.isfinite(whole)
        assert whole.item() != pytest.approx(make(name, BINARY)(*batch(40, shift=3.0)).item())
    assert usable(z, (BINARY,))
    assert not usable(torch.full((40, 1), -1.0), (BINARY,))


@pytest.mark.parametrize("name", [name for name in DETACHERS if name != "none"])
def test_a_single_group_gives_no_gradient_from_comparing(name: str) -> None:
    """All samples of one value: nothing to compare, no NaN."""
    h, z, labels, inputs = batch(20)
    z[:] = 1
    h.requires_grad_()
    value = make(name, BINARY)(h, z, labels, inputs)
    value.backward()
    assert torch.isfinite(value)
    assert h.grad is not None
    assert torch.isfinite(h.grad).all()
    assert not usable(z, (BINARY,))
    if name in ("mmd", "covariance"):
        assert value.item() == 0
        assert not h.grad.any()


def test_covariance_of_a_number_is_its_squared_correlation() -> None:
    torch.manual_seed(0)
    h, z = torch.randn(300, 6), torch.randn(300, 1)
    h[:, 2] = 3 * z[:, 0] + 0.1 * torch.randn(300)
    correlation = torch.corrcoef(torch.cat([h, z], 1).T)[-1, :-1]
    found = Covariance(space(NUMBER))(h, z, torch.zeros(300, dtype=torch.int64), h)
    assert found.item() == pytest.approx(correlation.square().mean().item(), rel=2e-2)


def test_trained_readers_estimate_the_information() -> None:
    """z = sign(h₀) has ln 2 nats; an independent z has none."""
    torch.manual_seed(0)
    h = torch.randn(600, 6)
    labels, inputs = torch.zeros(600, dtype=torch.int64), torch.rand(600, 5)

    def bound(z: Tensor) -> float:
        detacher = RepresentationDetachment(space(BINARY), keep_input=0, keep_task=0)
        tool = torch.optim.Adam(detacher.parameters(), lr=1e-2)
        for _ in range(100):
            rows = torch.randint(0, 300, (64,))
            tool.zero_grad()
            detacher.auxiliary_loss(h[rows], z[rows], labels[rows], inputs[rows]).backward()
            tool.step()
        return detacher(h[300:], z[300:], labels[300:], inputs[300:]).item()

    assert bound((h[:, :1] > 0).float()) > 0.5
    assert bound(torch.randint(0, 2, (600, 1)).float()) == 0  # the bound is clamped at nothing


@pytest.mark.parametrize("name", DETACHERS)
@pytest.mark.parametrize("attributes", [(BINARY,), (BINARY, TRIPLE)], ids=["one", "two"])
def test_a_detacher_runs_on_meta_tensors(name: str, attributes: tuple[Attribute, ...]) -> None:
    detacher = make(name, *attributes).to("meta")
    h = torch.zeros(8, 6, device="meta", requires_grad=True)
    z = torch.zeros(8, len(attributes), device="meta")
    labels, inputs = torch.zeros(8, dtype=torch.int64, device="meta"), torch.zeros(8, 5, device="meta")
    assert detacher(h, z, labels, inputs).is_meta
    assert usable(z, attributes).is_meta
    if hasattr(detacher, "auxiliary_loss"):
        detacher.auxiliary_loss(h, z, labels, inputs).backward()


@pytest.mark.parametrize("name", ["mmd", "gradient-reversal"])
def test_a_number_is_refused_where_groups_are_compared(name: str) -> None:
    with pytest.raises(UserError, match="'n' is a number; use name = \"covariance\""):
        make(name, BINARY, NUMBER)


def test_token_ids_cannot_be_reconstructed() -> None:
    with pytest.raises(UserError, match="keep_input = 0"):
        RepresentationDetachment(Space((BINARY,), 6, 3, 0))


# -------------------------------------------------------------------------- batches that say nothing


@pytest.mark.parametrize("name", ["mmd", "covariance", "gradient-reversal", "representation-detachment"])
def test_equal_samples_push_nobody_far(name: str) -> None:
    """Blank images: every row of h is the same but for rounding, which no standard deviation may blow up."""
    detacher = make(name, BINARY)
    _, z, labels, inputs = batch(32)
    h = torch.full((32, 6), 0.7) + 1e-7 * torch.randn(32, 6)
    h.requires_grad_()
    penalty = detacher(h, z, labels, inputs)
    if penalty.requires_grad:
        penalty.backward()
    assert penalty.isfinite()
    assert h.grad is None or h.grad.abs().max() < 1
    assert standardised(h).abs().max() == 0


def test_a_batch_whose_numbers_are_all_equal_teaches_a_reader_nothing() -> None:
    detacher = RepresentationDetachment(space(NUMBER), keep_input=0.0, keep_task=0.0)
    h, _, labels, inputs = batch(8)
    h.requires_grad_()
    z = torch.full((8, 1), 41.0)
    assert not usable(z, (NUMBER,))
    assert usable(z + torch.arange(8.0)[:, None], (NUMBER,))
    assert not usable(z[:1], (NUMBER,))
    loss = detacher.auxiliary_loss(h.detach(), z, labels, inputs)
    loss.backward()
    gradients = [p.grad.abs().max() for p in detacher.parameters() if p.grad is not None]
    assert all(g == 0 for g in gradients)
    assert detacher(h, z, labels, inputs).item() == 0
    assert loss.item() == 1  # as good as guessing


def test_features_beside_a_constant_one_are_standardised_as_ever() -> None:
    torch.manual_seed(0)
    h = 1e-3 * torch.randn(50, 3) * torch.tensor([1.0, 1.0, 0.0]) + torch.tensor([0.0, 0.0, 50.0])
    assert standardised(h)[:, :2].std(0, correction=0).min() > 0.99


def test_group_statistics_pull_equal_samples_nowhere() -> None:
    """They have no variance to measure the server's means in."""
    statistics = GroupStatistics((BINARY,), 4)
    statistics.sums[1], statistics.shares[1] = 3.0, 0.5
    statistics.begin()
    z = torch.zeros(5, 1)
    equal = torch.ones(5, 4).requires_grad_()
    pull = statistics.penalty(equal, z)
    pull.backward()
    assert pull.item() == 0
    assert equal.grad is not None
    assert equal.grad.abs().max() == 0
    assert statistics.penalty(torch.randn(5, 4), z).item() > 1


def test_kept_terms_are_a_squared_error_and_a_cross_entropy() -> None:
    """The docstring's units: nats for z, squared units of the input for x, a cross-entropy for y."""
    h, z, labels, inputs = batch(30)
    detacher = RepresentationDetachment(space(BINARY), keep_input=1.0, keep_task=0.0)
    assert detacher.decoder is not None
    plain = RepresentationDetachment(space(BINARY), keep_input=0.0, keep_task=0.0)
    plain.readers.load_state_dict(detacher.readers.state_dict())
    kept = detacher(h, z, labels, inputs) - plain(h, z, labels, inputs)
    error = (detacher.decoder(h) - inputs).square().mean()
    assert kept.item() == pytest.approx(error.item(), abs=1e-6)
