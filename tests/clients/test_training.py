"""The one training loop: against a plain PyTorch loop, and leaving nothing behind."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from clients.training import Recipe, back_propagation, batches, fit
from fedsim import messages, payload
from fedsim.app import client_app
from fedsim.building import build, cached
from fedsim.engine.simulate import simulate
from fedsim.errors import NotEnoughReplies
from fedsim.models.base import set_train_mode
from fedsim.task import Task
from fedsim.version import code_digest
from tests.helpers import tiny

RECIPE = Recipe(
    lr=0.1, epochs=2.0, steps=None, batch_size=8, momentum=0.9, weight_decay=0.01, clip=0.0, proximal_mu=0.0
)


def sgd(task: Task, recipe: Recipe = RECIPE) -> torch.optim.SGD:
    return torch.optim.SGD(
        [p for p in task.model.parameters() if p.requires_grad],
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )


def test_the_loop_equals_a_plain_pytorch_loop() -> None:
    task = build(tiny())
    rows = task.data.client(1)
    torch.manual_seed(3)
    metrics = fit(task, rows, RECIPE, sgd(task), back_propagation, lr_scale=0.5, proximal_mu=0.0)
    ours = messages.views_of(task.shared())

    task.reset()
    set_train_mode(task.model, training=True)
    torch.manual_seed(3)
    plain = torch.optim.SGD(task.model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    x = torch.from_numpy(np.array(task.data.arrays.train_x[rows]))
    y = torch.from_numpy(np.array(task.data.arrays.train_y[rows]))
    losses = []
    for _ in range(2):
        order = torch.randperm(len(rows))
        for part in order.split(8):
            plain.zero_grad()
            loss = F.cross_entropy(task.model(x[part]), y[part])
            loss.backward()
            plain.step()
            losses.append(loss.item() * len(part))
    for name, value in messages.views_of(task.shared()).items():
        np.testing.assert_array_equal(ours[name], value)
    assert metrics["num-examples"] == len(rows)
    assert metrics["loss"] == pytest.approx(sum(losses) / (2 * len(rows)), rel=1e-6)


@pytest.mark.parametrize("change", [{"steps": 1}, {"steps": 40}, {"epochs": 0.25}, {"epochs": 3.0}])
def test_examples_are_what_a_client_has_whatever_its_steps_take(change: dict[str, Any]) -> None:
    """n_k of FedAvg: not the samples of a few steps, in which clients of all sizes are alike."""
    task = build(tiny("partition.name=dirichlet", "partition.alpha=0.3", "partition.shots=30"))
    sizes = task.data.partition.sizes()
    assert len(set(sizes.tolist())) > 1
    for client in (int(sizes.argmin()), int(sizes.argmax())):
        rows, recipe = task.data.client(client), replace(RECIPE, **change)
        said = fit(task, rows, recipe, sgd(task), back_propagation, lr_scale=1.0, proximal_mu=0.0)
        assert said["num-examples"] == len(rows) == sizes[client]
        assert said["samples"] == sum(len(part) for part in batches(len(rows), recipe))


def test_proximal_term_is_the_gradient_of_the_penalty() -> None:
    """One SGD step with µ: w₁ = w₀ − lr·g; second step adds µ(w₁ − w₀)."""
    task = build(tiny())
    recipe = replace(RECIPE, epochs=1.0, steps=2, batch_size=1000, momentum=0.0, weight_decay=0.0)
    rows = task.data.client(0)

    def step_twice(mu: float) -> dict[str, np.ndarray]:
        task.reset()
        fit(task, rows, recipe, sgd(task, recipe), back_propagation, lr_scale=1.0, proximal_mu=mu)
        return messages.views_of(task.shared())

    start = messages.views_of(task.initial_payload())
    plain, pulled = step_twice(0.0), step_twice(3.0)
    one = replace(recipe, steps=1)
    task.reset()
    fit(task, rows, one, sgd(task, one), back_propagation, lr_scale=1.0, proximal_mu=3.0)
    first = messages.views_of(task.shared())
    for name in start:
        expected = plain[name] - 0.1 * 3.0 * (first[name] - start[name])
        np.testing.assert_allclose(pulled[name], expected, atol=2e-6)


def test_clipping_bounds_the_update() -> None:
    task = build(tiny())
    recipe = replace(RECIPE, steps=1, clip=0.01, momentum=0.0, weight_decay=0.0)
    fit(task, task.data.client(0), recipe, sgd(task, recipe), back_propagation, lr_scale=1.0, proximal_mu=0.0)
    start, end = messages.views_of(task.initial_payload()), messages.views_of(task.shared())
    moved = np.sqrt(sum(((end[k] - start[k]) ** 2).sum() for k in start))
    assert moved == pytest.approx(0.1 * 0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("epochs", "steps", "expected"),
    [(1.0, None, 4), (2.0, None, 8), (0.5, None, 2), (0.01, None, 1), (1.0, 7, 7)],
)
def test_epochs_and_exact_steps(epochs: float, steps: int | None, expected: int) -> None:
    found = list(batches(30, replace(RECIPE, epochs=epochs, steps=steps)))
    assert len(found) == expected
    whole = found[:4] if expected >= 4 else found
    assert len(np.unique(np.concatenate(whole))) == sum(len(b) for b in whole)
    if expected >= 4:
        assert sum(len(b) for b in whole) == 30


def ask(text: str, asked: list[int], task: Task, **config: Any) -> list[Message]:
    """Train the given clients of the real client app, one after the other, in one process."""
    answers: list[Message] = []
    app = ServerApp()
    instruction = {
        messages.ROUND: 1, messages.SEED: 0, messages.LR_SCALE: 1.0, messages.EXPERIMENT: text,
        messages.FROZEN: task.frozen_digest, messages.CODE: code_digest(), **config,
    }  # fmt: skip

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        who = messages.roster(grid)
        content = RecordDict({"arrays": task.initial_payload(), "config": ConfigRecord(instruction)})
        for client in asked:
            answers.extend(
                grid.send_and_receive([Message(content, dst_node_id=who.node(client), message_type="train")])
            )

    with suppress(NotEnoughReplies):  # which is said of a run where all failed
        simulate(app, client_app, task.experiment.clients)
    return answers


def arrays(message: Message) -> dict[str, bytes]:
    assert message.has_content(), message.error.reason
    record = message.content["arrays"]
    assert isinstance(record, ArrayRecord)
    return {k: v.tobytes() for k, v in messages.views_of(record).items()}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_client_leaves_no_trace_in_the_next_one(optimizer: str) -> None:
    """BatchNorm statistics, momentum: client 1 after client 0 equals client 1 alone, bit for bit."""
    experiment = tiny(
        model={"name": "cnn", "width": 4, "norm": "batch", "dropout": 0.2},
        client={"lr": 0.01, "optimizer": optimizer, "batch_size": 16},
    )
    task = cached(experiment.json())
    assert any("running_mean" in e.name for e in task.selection.shared)
    after_another = arrays(ask(experiment.json(), [0, 2, 1], task)[2])
    alone = arrays(ask(experiment.json(), [1], task)[0])
    assert after_another == alone
    assert alone != arrays(ask(experiment.json(), [0], task)[0])


def test_frozen_tensors_do_not_move() -> None:
    experiment = tiny(model={"name": "tiny-clip"}, tuning={"name": "bias"}, client={"lr": 0.5})
    task = cached(experiment.json())
    before = payload.frozen_digest(task.model, task.selection.changing)
    ask(experiment.json(), [0, 1], task)
    assert payload.frozen_digest(task.model, task.selection.changing) == before


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({messages.FROZEN: "0123456789abcdef"}, "the frozen part of this client's model"),
        ({messages.CODE: "0.0.1+000000000000"}, "install the same version on both"),
    ],
)
def test_another_backbone_or_another_code_is_refused(config: dict[str, str], message: str) -> None:
    experiment = tiny()
    reply = ask(experiment.json(), [0], cached(experiment.json()), **config)[0]
    assert reply.has_error()
    assert message in reply.error.reason


def test_flowers_fedprox_reaches_our_clients() -> None:
    """Flower's FedProx sends `proximal-mu` in the config; our clients obey it."""
    experiment = tiny(client={"lr": 0.1, "batch_size": 8, "epochs": 3})
    task = cached(experiment.json())
    plain = arrays(ask(experiment.json(), [0], task)[0])
    pulled = arrays(ask(experiment.json(), [0], task, **{"proximal-mu": 1.0})[0])
    assert plain != pulled


def test_a_step_runs_on_meta_tensors() -> None:
    """No `.item()`, no CPU target inside a step: it would fail on the meta device."""
    task = build(tiny(model={"name": "cnn"}))
    task.model.to("meta")
    loss = back_propagation(
        task,
        torch.zeros(4, 1, 8, 8, dtype=torch.uint8, device="meta"),
        torch.zeros(4, dtype=torch.int64, device="meta"),
    )
    assert loss.is_meta
    assert all(p.grad is not None and p.grad.is_meta for p in task.model.parameters())


def test_an_unknown_action_is_an_error_reply() -> None:
    experiment = tiny()
    task = cached(experiment.json())
    app = ServerApp()
    answers: list[Message] = []

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        config = ConfigRecord(
            {
                messages.ROUND: 1,
                messages.EXPERIMENT: experiment.json(),
                messages.FROZEN: task.frozen_digest,
                messages.CODE: code_digest(),
            }
        )
        out = [
            Message(RecordDict({"config": config}), dst_node_id=n, message_type="query.nothing")
            for n in grid.get_node_ids()
        ]
        answers.extend(grid.send_and_receive(out))

    with pytest.raises(NotEnoughReplies, match="all 4 messages failed"):
        simulate(app, client_app, 4)
    assert all("No query function registered with name 'nothing'" in a.error.reason for a in answers)
