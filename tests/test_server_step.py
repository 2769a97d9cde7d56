"""Entries that are no parameters are averaged, whatever a server optimiser does with parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy

from fedsim import messages, registry
from fedsim._flwr import quiet
from fedsim.engine.simulate import simulate
from fedsim.errors import UserError
from fedsim.server_step import ServerStep
from fedsim.testing import Answer, Arrays, toy_client_app
from tests.helpers import run, tiny
from tests.strategies.test_matrix import ARGUMENTS

STATISTICS = frozenset({"var", "count"})
START: Arrays = {
    "w": np.array([0.0, 1.0], np.float32),
    "var": np.array([1.0, 0.01], np.float32),
    "count": np.array(0, np.int64),
}
CLIENTS = 7

OPTIMISERS: dict[str, dict[str, Any]] = {
    "fedadam": {"eta": 0.3},
    "fedyogi": {"eta": 0.3},
    "fedadagrad": {"eta": 0.3},
    "fedavgm": {"server_learning_rate": 1.5, "server_momentum": 0.9},
    "tests.user_strategies:SignStep": {},
}


def moved(client: int, arrays: Arrays, config: Any) -> tuple[Arrays, dict[str, float]]:
    """Weights go up, variances shrink, batches are counted; client 6 is far off where it counts."""
    far = 100 if client == 6 else 0
    return {
        "w": arrays["w"] + np.float32(0.1 + 0.01 * client),
        "var": arrays["var"] * np.float32(0.5),
        "count": arrays["count"] + np.int64(3 + far),
    }, {"num-examples": client + 1}


def play(strategy: Strategy, rounds: int, answer: Answer = moved) -> list[Arrays]:
    """The state after every round of a strategy inside a ServerStep."""
    step = ServerStep(strategy, STATISTICS)
    app, found = ServerApp(), []

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        arrays = messages.arrays_of(START)
        for number in range(1, rounds + 1):
            config = ConfigRecord({messages.ROUND: number})
            out = step.configure_train(number, arrays, config, grid)
            assert all(list(message.content["arrays"]) == list(START) for message in out)  # type: ignore[call-overload]
            replies = list(grid.send_and_receive(out))[::-1]
            changed, _ = step.aggregate_train(number, replies, messages.roster(grid))
            assert changed is not None
            values = messages.views_of(changed)
            found.append({name: np.array(values[name]) for name in START})
            arrays = messages.arrays_of({k: v.astype(START[k].dtype) for k, v in found[-1].items()})

    with quiet():
        simulate(app, toy_client_app(answer), CLIENTS)
    return found


def make(name: str, **keys: Any) -> Strategy:
    with quiet():
        strategy: Strategy = registry.resolve("strategies", name).target(**keys)
    return strategy


@pytest.mark.parametrize("name", OPTIMISERS)
def test_server_optimisers_step_on_parameters_alone(name: str) -> None:
    states = play(make(name, **OPTIMISERS[name]), rounds=3)
    for number, state in enumerate(states, start=1):
        np.testing.assert_allclose(state["var"], START["var"] * 0.5**number, rtol=1e-6)
        assert state["count"].dtype == np.int64
        assert state["count"] == 103 * number, "counters are the largest, as in our own mean"
    plain = 0.1 + 0.01 * np.average(range(CLIENTS), weights=range(1, CLIENTS + 1))
    assert abs(states[0]["w"][0] - plain) > 0.01, "the server took a step of its own"


@pytest.mark.parametrize("name", ["krum", "multikrum", "bulyan"])
def test_distances_are_of_parameters_and_statistics_of_the_chosen(name: str) -> None:
    """Client 3 counts far more batches than others; its parameters are in the middle, so it is chosen."""

    def answer(client: int, arrays: Arrays, config: Any) -> tuple[Arrays, dict[str, float]]:
        off = 1000 if client == 3 else 0
        return {
            "w": arrays["w"] + np.float32((client - 3) ** 3),
            "var": np.full(2, 1 + client, np.float32),
            "count": np.array(10 + off, np.int64),
        }, {"num-examples": 1}

    keys = {**ARGUMENTS[name]} | ({"num_nodes_to_select": 3} if name == "multikrum" else {})
    [state] = play(make(name, **keys), 1, answer)
    np.testing.assert_allclose(state["w"], START["w"], atol=1e-6)
    np.testing.assert_allclose(state["var"], 1 + 3)  # of client 3 and, as many on either side, its neighbours
    assert state["count"] == (10 if name == "bulyan" else 1010)


def test_flowers_plain_rules_are_left_alone() -> None:
    """The median of variances is safer than their mean: a rule without a step keeps it."""
    for name in ("flwr-fedavg", "flwr-fedprox", "fedmedian", "fedtrimmedavg", "fedavg", "unlearn"):
        assert not ServerStep(make(name, **ARGUMENTS.get(name, {})), STATISTICS).statistics


def test_noise_on_statistics_is_refused_with_a_way_out(tmp_path: Path) -> None:
    dp = {"name": "tests.user_strategies:private"}
    with (
        quiet(),
        pytest.raises(UserError, match=r"Clipping adds noise .* no\s+parameter.*\[payload\] personal"),
    ):
        run(tiny("rounds=1", model={"name": "cnn", "width": 4}, strategy=dp), tmp_path)
    with quiet():
        assert run(tiny("rounds=1", strategy=dp), tmp_path).summary["rounds"] == 1


@pytest.mark.parametrize(
    "strategy",
    [
        {"name": "fedadam", "eta": 0.5},
        {"name": "unlearn", "recover": {"name": "fedadam", "eta": 0.5}},
        {"name": "fedavgm", "server_momentum": 0.9, "server_learning_rate": 2.0},
    ],
)
def test_a_run_with_batchnorm_has_statistics_of_the_data(strategy: dict[str, Any], tmp_path: Path) -> None:
    """Variances stay positive, counters are those of FedAvg."""
    model = {"name": "cnn", "width": 4}
    client = {"name": "unlearn", "base": {"lr": 0.1, "batch_size": 16}}
    base = {"client": client} if strategy["name"] == "unlearn" else {}
    with quiet():
        state = run(tiny("rounds=2", model=model, strategy=strategy, **base), tmp_path / "a").state()
    moving = {name: v for name, v in state.items() if "running_var" in name}
    assert moving
    assert all((v > 0).all() for v in moving.values())
    counters = [int(v) for name, v in state.items() if name.endswith("num_batches_tracked")]
    sent = run(tiny("rounds=2", model=model), tmp_path / "b").state()
    assert counters == [int(v) for name, v in sent.items() if name.endswith("num_batches_tracked")]


def test_the_proximal_term_does_not_touch_statistics() -> None:
    """FedProx pulls parameters; statistics of a client that trains with it are those of its batches."""
    from clients.training import Recipe, back_propagation, fit
    from fedsim.building import build

    task = build(tiny(model={"name": "cnn", "width": 4}))
    own = [p for p in task.model.parameters() if p.requires_grad]
    found: list[dict[str, np.ndarray]] = []
    for mu in (0.0, 10.0):
        task.reset()
        torch.manual_seed(0)
        tool = torch.optim.SGD(own, lr=1e-4)
        recipe = Recipe(1e-4, 1.0, 1, 16, 0.0, 0.0, 0.0, mu)
        fit(task, task.data.client(0), recipe, tool, back_propagation, lr_scale=1.0, proximal_mu=mu)
        found.append({k: np.array(v) for k, v in messages.views_of(task.shared()).items()})
    for name in task.selection.statistics:
        np.testing.assert_array_equal(found[0][name], found[1][name])
