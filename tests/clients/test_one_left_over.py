"""n mod batch_size = 1 where BatchNorm needs two samples: the one left over joins the batch before."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clients.training import Recipe, back_propagation, batches, fit
from fedsim import messages
from fedsim.building import build
from fedsim.config import Experiment
from fedsim.errors import NotEnoughReplies, UserError, warn_once
from fedsim.task import Task
from tests.helpers import run, tiny

RECIPE = Recipe(0.1, 1.0, None, 8, 0.0, 0.0, 0.0, 0.0)
VECTORS = {"name": "tests.odd_models:stack"}


def sizes(count: int, recipe: Recipe, *, joins: bool) -> list[int]:
    return [len(batch) for batch in batches(count, recipe, joins=joins)]


def test_batches_are_as_ever_unless_one_joins() -> None:
    for count in range(1, 40):
        torch.manual_seed(count)
        plain = list(batches(count, RECIPE))
        torch.manual_seed(count)
        order = torch.randperm(count).split(8)
        assert all((a == b.numpy()).all() for a, b in zip(plain, order, strict=True))
    assert sizes(17, RECIPE, joins=False) == [8, 8, 1]
    assert sizes(17, RECIPE, joins=True) == [8, 9]
    assert sizes(9, replace(RECIPE, epochs=2.0), joins=True) == [9, 9]
    assert sizes(17, replace(RECIPE, steps=3), joins=True) == [8, 9, 8]


def trained(task: Task, count: int, recipe: Recipe = RECIPE) -> tuple[dict[str, Any], dict[str, bytes]]:
    task.reset()
    torch.manual_seed(1)
    tool = torch.optim.SGD([p for p in task.model.parameters() if p.requires_grad], lr=0.1)
    rows = np.arange(count)
    found = fit(task, rows, recipe, tool, back_propagation, lr_scale=1.0, proximal_mu=0.0)
    return found, {name: v.tobytes() for name, v in messages.views_of(task.shared()).items()}


@pytest.mark.parametrize("model", [VECTORS, {"name": "tests.odd_models:one_pixel", "norm": "batch"}])
def test_the_sample_joins_and_is_counted(model: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    warn_once.cache_clear()
    task = build(tiny(model=model))
    with caplog.at_level(logging.WARNING, logger="fedsim"):
        found, state = trained(task, 17)
        assert trained(task, 17)[1] == state
    assert (found["num-examples"], found["samples"]) == (17, 17)
    [name] = [n for n in state if n.endswith("num_batches_tracked")][:1]
    assert np.frombuffer(state[name], np.int64)[0] == 2
    assert len([r for r in caplog.records if "joins the batch before it" in r.getMessage()]) == 1


def test_a_model_that_takes_one_sample_trains_on_it_as_ever() -> None:
    """BatchNorm over maps takes one image; the trial leaves no trace in statistics or random numbers."""
    task = build(tiny(model={"name": "cnn", "width": 4, "dropout": 0.3}))
    state = trained(task, 17)[1]
    task.reset()
    torch.manual_seed(1)
    task.model.train()
    tool = torch.optim.SGD(task.model.parameters(), lr=0.1)
    for part in torch.randperm(17).split(8):
        tool.zero_grad()
        inputs, labels = task.train_batch(part.numpy())
        task.loss(task.network, inputs, labels).backward()  # type: ignore[no-untyped-call]
        tool.step()
    assert {name: v.tobytes() for name, v in messages.views_of(task.shared()).items()} == state
    counters = [v for n, v in state.items() if n.endswith("num_batches_tracked")]
    assert all(np.frombuffer(v, np.int64)[0] == 3 for v in counters)


def test_steps_that_never_reach_the_last_batch_are_left_alone() -> None:
    task = build(tiny(model=VECTORS))
    found, _ = trained(task, 17, replace(RECIPE, steps=2))
    assert found["samples"] == 16


@pytest.mark.parametrize(
    ("count", "recipe", "message"),
    [
        (1, RECIPE, r"1 training sample.*\[partition\] min_samples = 2"),
        (5, replace(RECIPE, batch_size=1), r"batch_size = 1.*set client\.batch_size = 2 or more"),
    ],
)
def test_where_nothing_can_be_joined_the_fix_is_named(count: int, recipe: Recipe, message: str) -> None:
    task = build(tiny(model=VECTORS))
    with pytest.raises(UserError, match=message):
        trained(task, count, recipe)
    plain = build(tiny(model={**VECTORS, "norm": "none"}))
    assert trained(plain, count, recipe)[0]["samples"] == count


@pytest.mark.parametrize("count", [16, 17])
def test_maps_of_one_pixel_under_instance_norm_are_named(count: int) -> None:
    task = build(tiny(model={"name": "tests.odd_models:one_pixel", "norm": "instance"}))
    with pytest.raises(
        UserError, match=r"InstanceNorm in this model gets maps of one pixel.*larger\s+images"
    ):
        trained(task, count)


def left_over(*overrides: str, **tables: Any) -> Experiment:
    """40 samples a client in batches of 13: 13 + 13 + 13 + 1."""
    return tiny("rounds=1", "client.batch_size=13", *overrides, **{"model": VECTORS, **tables})


@pytest.mark.parametrize(
    "tables",
    [
        {},
        {"local": {"name": "dgl", "blocks": 2}},
        {"local": {"name": "dgl", "blocks": 2}, "model": {**VECTORS, "norm": "none"}},
        {"local": {"name": "man", "blocks": 2, "base": "dgl"}},
        {"evaluation": {"where": "clients", "fine_tune": 4}},
        {"tuning": {"name": "partial", "blocks": 1}},
        {"client": {"name": "unlearn", "base": {"lr": 0.1}}},
    ],
    ids=["plain", "local", "auxiliary", "followers", "fine-tune", "above-a-cut", "unlearn"],
)
def test_every_client_takes_part(tables: dict[str, Any], tmp_path: Path) -> None:
    base = tables.get("client", {}).get("base")
    experiment = left_over(**tables) if base is None else tiny(
        "rounds=1", "client.base.batch_size=13", **{"model": VECTORS, **tables}
    )  # fmt: skip
    done = run(experiment, tmp_path)
    assert [row["clients"] for row in done.run.history()[1:]] == [4]


def test_a_run_of_single_samples_ends_with_the_fix(tmp_path: Path) -> None:
    experiment = tiny("rounds=1", "client.batch_size=1", model=VECTORS)
    with pytest.raises(NotEnoughReplies, match=r"set client\.batch_size = 2 or more"):
        run(experiment, tmp_path)
