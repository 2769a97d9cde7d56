"""The attribute-unlearning client: λ = 0 is plain training to the bit, and its answers are what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clients.attribute_unlearning import Detaching, make, moments_of
from clients.training import Recipe, back_propagation, fit
from clients.training import make as standard
from fedsim import messages, registry
from fedsim.building import OwnData, build
from fedsim.data.attributes import Attribute, to_json
from fedsim.data.sources import DIGIT_WORDS
from fedsim.errors import UserError
from fedsim.task import Task
from fedsim.unlearning import DETACHERS
from fedsim.unlearning.cut import Detachable
from fedsim.unlearning.leace import leace
from fedsim.unlearning.measure import leakage, read
from tests.helpers import tiny
from tests.unlearning.test_cut import TINTED

RECIPE = Recipe(
    lr=0.05, epochs=1.0, steps=None, batch_size=16, momentum=0.9, weight_decay=0.0, clip=0.0, proximal_mu=0.0
)


def task(*overrides: str, **detacher: Any) -> Task:
    keys = {"name": "mmd", "attributes": ["tint"], **detacher}
    return build(tiny("partition.shots=8", *overrides, **TINTED, detacher=keys))


def trained(ours: Task, step: Any, client: int = 1, **config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """State and metrics after a round of one client."""
    ours.reset()
    tool = torch.optim.SGD([p for p in ours.model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    torch.manual_seed(3)
    if isinstance(step, Detaching):
        step.begin(ours, {messages.STRENGTH: 0.0, **config})  # type: ignore[arg-type]
    metrics = fit(ours, ours.data.client(client), RECIPE, tool, step, lr_scale=1.0, proximal_mu=0.0)
    if isinstance(step, Detaching):
        metrics |= step.end(ours)
    return {k: v.copy() for k, v in messages.views_of(ours.shared()).items()}, metrics


@pytest.mark.parametrize("name", DETACHERS)
def test_without_strength_it_is_back_propagation_to_the_bit(name: str) -> None:
    ours = task(name=name)
    with_step, metrics = trained(ours, Detaching(ours))
    plain, expected = trained(ours, back_propagation)
    assert metrics["loss"] == expected["loss"]
    for key in plain:
        assert with_step[key].tobytes() == plain[key].tobytes()


@pytest.mark.parametrize("name", [name for name in DETACHERS if name != "none"])
def test_strength_changes_the_encoder_and_the_networks_learn(name: str) -> None:
    ours = task(name=name)
    plain, _ = trained(ours, back_propagation)
    found, metrics = trained(ours, Detaching(ours), **{messages.STRENGTH: 1.0})
    moved = {key for key in plain if not np.array_equal(found[key], plain[key])}
    assert "backbone.block1.conv1.weight" in moved
    assert metrics["detach_skipped"] == 0
    networks = {key for key in plain if key.startswith("detacher.")}
    assert networks <= moved
    assert bool(networks) == (name in ("gradient-reversal", "representation-detachment"))


def test_a_head_round_moves_the_head_alone() -> None:
    ours = task()
    found, _ = trained(ours, Detaching(ours), **{messages.HEAD_ONLY: True})
    ours.reset()
    start = messages.views_of(ours.shared())
    moved = {key for key in start if not np.array_equal(found[key], start[key])}
    assert moved == {"head.weight", "head.bias"}


def test_an_isolated_block_learns_by_itself() -> None:
    """What is above the cut is trained, but no gradient of it reaches what is below."""
    ours = task(cut=1, isolated=True)
    first, metrics = trained(ours, Detaching(ours), **{messages.STRENGTH: 1.0})
    start = ours._resident.initial
    above = {key for key in first if key.startswith(("head.", "backbone.block2."))}
    for key in above:
        start[key].add_(torch.randn_like(start[key]) * 0.1 if start[key].is_floating_point() else 0)
    second, _ = trained(ours, Detaching(ours), **{messages.STRENGTH: 1.0})
    assert metrics["detach_penalty"] != 0
    for key in first:
        same = first[key].tobytes() == second[key].tobytes()
        assert same == (key not in above or key.endswith("num_batches_tracked")), key
    ours.reset()
    initial = messages.views_of(ours.shared())
    for key in ("boundary.weight", "backbone.block1.conv1.weight", "head.weight"):
        assert not np.array_equal(first[key], initial[key])
    found = leakage(ours)
    assert {"attack_mlp_tint", "attack_mlp_tint@2", "attack_mlp_tint@3"} <= set(found)


def test_an_isolated_block_holds_less_at_a_time() -> None:
    """The activations below the cut are gone before the rest is run; nothing is metered at the features."""
    peaks = []
    for isolated in (False, True):
        ours = task(cut=1, isolated=isolated)
        metrics = trained(ours, Detaching(ours), **{messages.STRENGTH: 1.0})[1]
        peaks.append(metrics["peak_bytes"])
        assert metrics["step_seconds"] > 0
    assert 0 < peaks[1] < 0.9 * peaks[0]
    assert "peak_bytes" not in trained(task(), Detaching(task()))[1]


def test_a_client_with_one_group_skips_and_counts_or_uses_the_servers_means() -> None:
    skew = ("partition.name=attribute-skew", "partition.attribute=tint", "partition.alpha=0.02")

    def constant(ours: Task) -> int:
        z = ours.data.arrays.train_z
        assert z is not None
        return next(c for c in range(4) if len(np.unique(z[ours.data.client(c)])) == 1)

    ours = task(*skew)
    client = constant(ours)
    found, metrics = trained(ours, Detaching(ours), client, **{messages.STRENGTH: 5.0})
    plain, _ = trained(ours, back_propagation, client)
    assert metrics["detach_skipped"] == 1.0
    assert all(np.array_equal(found[key], plain[key]) for key in plain)

    helped = task(*skew, group_statistics=True)
    model = helped.model
    assert isinstance(model, Detachable)
    assert model.statistics is not None
    start = helped._resident.initial
    start["statistics.shares"].fill_(0.5)
    start["statistics.sums"].normal_()
    found, metrics = trained(helped, Detaching(helped), client, **{messages.STRENGTH: 5.0})
    assert metrics["detach_skipped"] == 1.0
    assert metrics["detach_penalty"] > 0
    assert not np.array_equal(found["backbone.block1.conv1.weight"], plain["backbone.block1.conv1.weight"])
    z = helped.data.arrays.train_z
    assert z is not None
    shares = [float((z[helped.data.client(client)] == code).mean()) for code in (0, 1)]
    np.testing.assert_allclose(found["statistics.shares"], shares)


def test_a_node_without_the_attribute_trains_the_task_alone(tmp_path: Path) -> None:
    """A real node's own data need not say the attribute."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 255, (40, 2, 8, 8), np.uint8), np.arange(40) % 10
    words = np.array(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])
    z = np.arange(40) % 2
    np.savez(tmp_path / "with.npz", x=x, y=y, classes=words, z_tint=z)
    np.savez(tmp_path / "without.npz", x=x, y=y, classes=words)
    experiment = task().experiment
    said = to_json([Attribute("tint", ("0", "1"))])
    informed = build(experiment, OwnData(str(tmp_path / "with.npz"), 1, said, classes=DIGIT_WORDS))
    assert moments_of(informed, informed.data.client(1), released=False).count == 30
    ours = build(experiment, OwnData(str(tmp_path / "without.npz"), 1, said, classes=DIGIT_WORDS))
    found, metrics = trained(ours, Detaching(ours), **{messages.STRENGTH: 5.0})
    plain, _ = trained(ours, back_propagation)
    assert metrics["detach_skipped"] == 1.0
    assert all(np.array_equal(found[key], plain[key]) for key in plain)
    assert moments_of(ours, ours.data.client(1), released=False).count == 0


def test_moments_of_clients_add_up_and_erasing_leaves_no_correlation() -> None:
    """The whole chain on a real model: clients' sums -> eraser -> released representations, float32."""
    ours = task()
    trained(ours, back_propagation)
    total = moments_of(ours, ours.data.client(0), released=False)
    for client in range(1, 4):
        total = total + moments_of(ours, ours.data.client(client), released=False)
    rows = np.sort(ours.data.partition.indices)
    pooled = moments_of(ours, rows, released=False)
    np.testing.assert_allclose(total.hz, pooled.hz, rtol=1e-9)
    np.testing.assert_allclose(leace(total).left, leace(pooled).left, atol=1e-9)

    model = ours.model
    assert isinstance(model, Detachable)
    z = ours.attributes_of("train", rows)[:, 0].double()

    def correlation() -> float:
        (h, *_), _ = read(ours, "train", rows)
        both = torch.corrcoef(torch.cat([h.double(), z[:, None]], 1).T)
        return float(both[-1, :-1].abs().nan_to_num().max())

    assert correlation() > 0.1
    erasure = leace(total)
    for part in ("mean", "left", "right", "keep"):
        getattr(model.eraser, part).copy_(torch.from_numpy(getattr(erasure, part)))
    assert correlation() < 1e-6
    found = leakage(ours)
    assert abs(found["attack_linear_tint"] - 0.5) < 3 * found["attack_linear_tint_error"]


def test_a_cut_that_is_too_wide_is_an_error() -> None:
    ours = task("model.width=512", cut=1)
    with pytest.raises(UserError, match=r"has 8192 numbers, but second moments are taken up to 4096"):
        moments_of(ours, ours.data.client(0), released=False)


@pytest.mark.parametrize("name", DETACHERS)
def test_the_step_runs_on_meta_tensors(name: str) -> None:
    """No `.item()`, no CPU target, no branch on a value inside the step."""
    ours = task(name=name, group_statistics=True)
    ours.model.to("meta")
    step = Detaching(ours)
    config: Any = {messages.STRENGTH: 1.0}
    assert ours.model.statistics is not None  # type: ignore[union-attr]
    step.begin(ours, config)
    step.penalties, step.skipped = step.penalties.to("meta"), step.skipped.to("meta")
    inputs = torch.zeros(8, 2, 8, 8, dtype=torch.uint8, device="meta")
    labels, z = torch.zeros(8, dtype=torch.int64, device="meta"), torch.zeros(8, 1, device="meta")
    assert step(ours, inputs, labels, z).is_meta


def test_the_keys_are_those_of_the_standard_client() -> None:
    ours, theirs = registry.describe(make), registry.describe(standard)
    assert ours == theirs
    assert registry.summary(make) != registry.summary(standard)


def test_without_a_cut_there_is_no_such_client() -> None:
    with pytest.raises(UserError, match=r"set detacher.attributes = \[\"NAME\"\]"):
        make(build(tiny()))
