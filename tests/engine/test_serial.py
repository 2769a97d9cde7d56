"""The engine contract on SerialGrid."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedMedian,
    FedTrimmedAvg,
    Krum,
    Strategy,
)

from fedsim import _flwr, messages
from fedsim._flwr import quiet
from fedsim.engine.serial import SerialGrid
from fedsim.engine.simulate import simulate
from fedsim.errors import UserError
from fedsim.hooks import Hook, Round
from fedsim.testing import toy_client_app
from tests.helpers import run, tiny


def ask(client_app: ClientApp, clients: int, sends: int = 1, *, seed: int = 0) -> list[list[Message]]:
    """Send one message to every client, `sends` times."""
    answers: list[list[Message]] = []
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        for _ in range(sends):
            shared = RecordDict({"config": ConfigRecord({"x": 1})})
            out = [Message(shared, dst_node_id=n, message_type="query") for n in grid.get_node_ids()]
            answers.append(list(grid.send_and_receive(out)))

    simulate(app, client_app, clients, seed=seed)
    return answers


def query_app(function) -> ClientApp:  # type: ignore[no-untyped-def]
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        values = function(message, context)
        return messages.reply(message, metrics=values or {})

    return app


def values(replies: list[Message], key: str) -> list[float]:
    return [m.content["metrics"][key] for m in replies]  # type: ignore[misc,index]


def test_nodes_are_a_function_of_the_partition() -> None:
    app = query_app(
        lambda m, c: {"who": c.node_config["partition-id"], "of": c.node_config["num-partitions"]}
    )
    replies = ask(app, 5)[0]
    assert values(replies, "who") == [0, 1, 2, 3, 4]
    assert set(values(replies, "of")) == {5}
    assert [m.metadata.src_node_id for m in replies] == sorted(m.metadata.src_node_id for m in replies)


def test_every_message_has_its_own_stream_and_the_server_keeps_its_own() -> None:
    def draw(message, context):  # type: ignore[no-untyped-def]
        found = {"p": random.random(), "n": float(np.random.rand()), "t": torch.rand(()).item()}
        random.seed(42)
        np.random.seed(42)
        torch.manual_seed(42)
        torch.set_num_threads(3)
        return found

    threads = torch.get_num_threads()
    first, second = ask(query_app(draw), 4, 2)
    again, _ = ask(query_app(draw), 4, 2)
    for key in "pnt":
        assert values(first, key) == values(again, key)
        assert len(set(values(first, key) + values(second, key))) == 8
    assert torch.get_num_threads() == threads

    seen: list[float] = []
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        random.seed(1)
        seen.append(random.random())
        out = [Message(RecordDict(), dst_node_id=n, message_type="query") for n in grid.get_node_ids()]
        list(grid.send_and_receive(out))
        seen.append(random.random())

    simulate(app, query_app(draw), 2)
    random.seed(1)
    assert seen == [random.random(), random.random()]


def test_an_exception_is_an_error_reply_with_its_traceback_and_changes_no_state() -> None:
    def fail(message, context):  # type: ignore[no-untyped-def]
        counter = context.state.get("n", MetricRecord({"n": 0}))["n"] + 1
        context.state["n"] = MetricRecord({"n": counter})
        if context.node_config["partition-id"] == 1:
            raise KeyError("the sensor is broken")
        return {"n": counter}

    for sent, replies in enumerate(ask(query_app(fail), 3, 3), start=1):
        assert replies[1].has_error()
        assert "client 1" in replies[1].error.reason
        assert "the sensor is broken" in replies[1].error.reason
        assert "in fail" in replies[1].error.reason  # the line that raised
        assert values([replies[0], replies[2]], "n") == [sent, sent]


def test_a_client_cannot_touch_what_others_receive() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        arrays = message.content["arrays"]
        assert isinstance(arrays, ArrayRecord)
        view = arrays["w"].numpy()
        seen = float(view[0])
        view[:] = 99
        del arrays["w"]
        message.content["config"]["x"] = 77  # type: ignore[index]
        return messages.reply(message, metrics={"seen": seen})

    server = ServerApp()
    found: list[Message] = []

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        shared = RecordDict(
            {"arrays": messages.arrays_of({"w": np.ones(2)}), "config": ConfigRecord({"x": 1})}
        )
        out = [Message(shared, dst_node_id=n, message_type="train") for n in grid.get_node_ids()]
        found.extend(grid.send_and_receive(out))
        assert shared["config"]["x"] == 1  # type: ignore[index]
        assert list(shared["arrays"]) == ["w"]  # type: ignore[arg-type]

    simulate(server, app, 3)
    assert values(found, "seen") == [1.0, 1.0, 1.0]


STOCK = {
    "FedAvg": FedAvg,
    "FedAdam": FedAdam,
    "FedMedian": FedMedian,
    "FedTrimmedAvg": FedTrimmedAvg,
    "Krum": lambda **k: Krum(num_malicious_nodes=1, **k),
    "DP": lambda **k: DifferentialPrivacyServerSideFixedClipping(
        FedAvg(**k), noise_multiplier=0.0, clipping_norm=100.0, num_sampled_clients=6
    ),
}


@pytest.mark.parametrize("name", STOCK)
def test_flowers_own_strategies_run_unmodified(name: str) -> None:
    """Through Flower's own `start`, twice with the same seed: equal, and moved by the clients' ones."""
    results = []
    for _ in range(2):
        strategy: Strategy = STOCK[name](fraction_evaluate=0.0)  # type: ignore[operator]
        app = ServerApp()

        @app.main()
        def main(grid: Grid, context: Context, strategy: Strategy = strategy) -> None:
            start = messages.arrays_of({"w": np.zeros(3, np.float32), "v.ü": np.ones((2, 2), np.float32)})
            result = strategy.start(grid, start, num_rounds=3)
            results.append(messages.views_of(result.arrays))

        with quiet():
            simulate(app, toy_client_app(), 6, seed=4)
    assert results[0]["w"].tobytes() == results[1]["w"].tobytes()
    assert (results[0]["w"] > 0).all()
    if name != "FedAdam":
        np.testing.assert_allclose(results[0]["w"], 3.0, rtol=1e-6)
        np.testing.assert_allclose(results[0]["v.ü"], 4.0, rtol=1e-6)


def test_flowers_sampling_is_reproducible_here() -> None:
    """Random node ids and sets make Flower's own engine sample other clients in every run."""
    cohorts = []
    for _ in range(2):
        app = ServerApp()
        asked: list[int] = []

        @app.main()
        def main(grid: Grid, context: Context, asked: list[int] = asked) -> None:
            strategy = FedAvg(fraction_train=0.3, fraction_evaluate=0.0)
            for number in (1, 2):
                out = strategy.configure_train(number, messages.arrays_of({}), ConfigRecord(), grid)
                asked.extend(m.metadata.dst_node_id for m in out)

        with quiet():
            simulate(app, toy_client_app(), 20, seed=9)
        cohorts.append(asked)
    assert cohorts[0] == cohorts[1]
    assert len(cohorts[0]) == 12


def test_one_simulation_at_a_time_and_the_identity_is_restored() -> None:
    app = ServerApp()
    errors: list[str] = []

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        with pytest.raises(UserError, match="already running") as caught:
            simulate(ServerApp(), ClientApp(), 1)
        errors.append(str(caught.value))

    simulate(app, ClientApp(), 1)
    assert errors
    with pytest.raises(RuntimeError):
        Message(RecordDict(), dst_node_id=1, message_type="train")  # no identity outside a simulation


def test_ten_thousand_clients_cost_nothing_before_they_are_asked() -> None:
    import tracemalloc

    def start(clients: int) -> tuple[float, int]:
        tracemalloc.start()
        began = time.perf_counter()
        grid = SerialGrid(ClientApp(), clients)
        sampled = messages.sample_clients(grid.roster.clients(), 0.001, 1, 0, 1)
        assert len(list(grid.get_node_ids())) == clients
        seconds = time.perf_counter() - began
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert sampled
        return seconds, size

    _, small = start(10)
    seconds, large = start(10_000)
    assert seconds < 2
    assert large - small < 50e6


def _stock_message() -> float:
    """Seconds of this process in which Flower makes and reads one message of 1 KB, at its own speed."""
    started = time.process_time()
    for _ in range(300):
        record = ArrayRecord([np.zeros(250, np.float32)])
        content = RecordDict({"arrays": record, "metrics": MetricRecord({"num-examples": 1, "loss": 0.5})})
        Message(content, dst_node_id=1, message_type="train")
        record.to_numpy_ndarrays()
    return (time.process_time() - started) / 300


def test_overhead_per_client_is_a_few_messages(tmp_path: Path) -> None:
    """Everything but training: 1 KB of shared state, 300 clients, rounds, grid, payload and run folder.

    Measured beside what Flower needs for one message, in seconds of this process.
    """

    class Clock(Hook):
        ends: ClassVar[list[float]] = []

        def round(self, result: Round) -> None:
            self.ends.append(time.process_time())

    rng = np.random.default_rng(0)
    x, y = rng.random((600, 4), np.float32), np.arange(600) % 10
    np.savez(tmp_path / "data.npz", x_train=x, y_train=y, x_test=x[:20], y_test=y[:20])
    experiment = tiny(
        rounds=7,
        data={"name": f"npz:{tmp_path / 'data.npz'}"},
        partition={"name": "iid", "clients": 300},
        client={"name": "tests.noop_client:make"},
    )
    result = run(experiment, tmp_path, Clock())
    assert result.summary["bytes_up"] == 7 * 300 * 1000
    with _flwr.acting_as_server(1):
        stock = np.median([_stock_message() for _ in range(5)])
    assert np.median(np.diff(Clock.ends)[1:]) / 300 < 8 * stock
