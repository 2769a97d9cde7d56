"""What goes wrong in Flower's own simulation engine, each reproduced there: not here."""

from __future__ import annotations

import time
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

from fedsim._flwr import quiet
from fedsim.averaging import WeightedAverage
from fedsim.engine.simulate import simulate
from fedsim.errors import UserError
from fedsim.testing import toy_client_app
from tests.engine.ray_apps import faulty_app, meeting_app, noisy_app
from tests.engine.test_ray import rounds
from tests.helpers import run, tiny

pytestmark = pytest.mark.usefixtures("shared_ray")


def ask(app: ClientApp, nodes: list[int], sends: int = 1, **options: Any) -> list[list[Message]]:
    """Query some clients, several times; returns the replies of every send."""
    server, answers = ServerApp(), []

    @server.main()
    def main(grid: Any, context: Context) -> None:
        for _ in range(sends):
            out = [
                Message(RecordDict(), dst_node_id=grid.roster.node(n), message_type="query") for n in nodes
            ]
            answers.append(list(grid.send_and_receive(out)))

    simulate(server, app, max(nodes) + 1, engine="ray", **options)
    return answers


def metric(replies: list[Message], key: str) -> list[Any]:
    return [reply.content["metrics"][key] for reply in replies]


def test_a_dead_worker_is_replaced_and_later_rounds_are_whole(tmp_path: Path) -> None:
    """Flower puts the dead actor back into its pool, where it swallows nearly every later message."""
    app = faulty_app("killed", 5, str(tmp_path))
    found = rounds(app, WeightedAverage(), 12, 2, fold=False, engine="ray", workers=2)
    assert len(found.seen) == 24
    assert sum(bool(values) for _, values, _ in found.seen) == 22


def test_a_share_of_a_gpu_must_fit_on_one_gpu_and_a_client_sees_one_device(tmp_path: Path) -> None:
    """Flower makes five actors of 0.4 out of two GPUs; the fifth never starts and its messages wait."""
    (replies,) = ask(meeting_app(str(tmp_path), 4), list(range(48)), gpu_fraction=0.4)
    assert len(set(metric(replies, "pid"))) == 4
    devices = [reply.content["config"]["devices"] for reply in replies]
    assert set(devices) == {"0", "1"}
    with pytest.raises(UserError, match="only 4 fit"):
        ask(noisy_app(), [0], gpu_fraction=0.4, workers=5)
    (without,) = ask(noisy_app(), [0], workers=1)
    assert without[0].content["config"]["devices"] == ""


def test_the_first_round_has_its_whole_cohort() -> None:
    """Flower samples while nodes are still being registered: 194 of 1,000 clients in round 1."""
    strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=1000)
    start = {"w": np.zeros(3, np.float32)}
    found = rounds(toy_client_app(), strategy, 1000, 1, start=start, engine="ray", workers=2)
    assert len(found.seen) == 1000


def test_all_workers_work_at_once_however_few_cores_there_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Flower keeps at most cores + 4 messages under way (here: pretend that there is one core)."""
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    (replies,) = ask(meeting_app(str(tmp_path), 8), list(range(96)), gpu_fraction=0.25)
    assert len(set(metric(replies, "pid"))) == 8


class Counted:
    """Knows how often it was pickled."""

    times = 0

    def __reduce__(self) -> tuple[Any, ...]:
        type(self).times += 1
        return Counted, ()


def test_the_client_app_is_pickled_once_not_with_every_message() -> None:
    app, burden = ClientApp(), Counted()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        assert burden is not None
        return Message(RecordDict(), reply_to=message)

    before = Counted.times
    ask(app, list(range(20)), 3, workers=2)
    assert Counted.times == before + 1


def test_messages_to_one_client_do_not_lose_each_others_state() -> None:
    """Flower runs them at the same time on copies of one Context: counters [1, 1, 2, 2]."""
    replies = ask(noisy_app(), [2, 2, 0, 2, 2], workers=2)[0]
    assert metric(replies, "calls") == [1, 2, 1, 3, 4]


@pytest.mark.parametrize("fold", [True, False])
def test_the_mean_of_half_precision_is_right(fold: bool) -> None:
    """A thousand tensors of 0.1: Flower's mean, summed up in float16, is 0.1058."""
    start = {"w": np.full(3, 0.1, np.float16)}
    same = toy_client_app(lambda client, arrays, config: (arrays, {"num-examples": 7}))
    found = rounds(same, WeightedAverage(), 1000, 1, start=start, fold=fold, engine="ray", workers=2)
    assert found.arrays["w"] == start["w"].tobytes()


def test_bfloat16_models_train(tmp_path: Path) -> None:
    """Flower refuses bfloat16 tensors."""
    digests = set()
    for number, options in enumerate([{"name": "serial"}, {"name": "ray", "workers": 2}]):
        experiment = tiny("rounds=1", engine=options, model={"name": "tests.bf16_model:make"})
        digests.add(run(experiment, tmp_path / str(number)).summary["digest"])
    assert len(digests) == 1


def test_a_round_that_runs_out_of_time_does_not_occupy_workers() -> None:
    """In Flower, late jobs keep their actors busy in the next round."""
    server, found = ServerApp(), []

    @server.main()
    def main(grid: Any, context: Context) -> None:
        def out() -> list[Message]:
            nodes = [grid.roster.node(n) for n in range(3)]
            return [Message(RecordDict(), dst_node_id=n, message_type="query") for n in nodes]

        started = time.monotonic()
        late = grid.send_and_receive(out(), timeout=0.0)
        found.extend([len(late), time.monotonic() - started, len(grid.send_and_receive(out()))])

    with quiet():
        simulate(server, noisy_app(), 3, engine="ray", workers=2)
    assert found[0] == 0
    assert found[1] < 1
    assert found[2] == 3


def sleepy(seconds: float) -> ClientApp:
    """Clients that sleep."""
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        time.sleep(seconds)
        return Message(RecordDict(), reply_to=message)

    return app


def test_a_thread_that_still_waits_when_the_server_app_ends_is_told() -> None:
    """It would keep the process from ending."""
    server, said = ServerApp(), []

    def send(grid: Any, out: list[Message]) -> None:
        for message in out:  # under way when the simulation ends, and after that
            with pytest.raises(RuntimeError, match="the simulation has ended") as told:
                grid.send_and_receive([message])
            said.append(told.value)

    threads = []

    @server.main()
    def main(grid: Any, context: Context) -> None:
        out = [Message(RecordDict(), dst_node_id=1000, message_type="query") for _ in range(2)]
        threads.append(Thread(target=send, args=(grid, out), daemon=True))
        threads[0].start()
        time.sleep(0.5)

    started = time.monotonic()
    simulate(server, sleepy(60), 1, engine="ray", workers=1)
    threads[0].join(20)
    assert len(said) == 2
    assert time.monotonic() - started < 50


def test_the_end_does_not_wait_for_replies_that_another_thread_has_pulled() -> None:
    server, got, threads = ServerApp(), [], []

    @server.main()
    def main(grid: Any, context: Context) -> None:
        ids = grid.push_messages([Message(RecordDict(), dst_node_id=1000, message_type="query")])

        def pull() -> None:
            while not got:
                got.extend(grid.pull_messages(ids))

        threads.append(Thread(target=pull, daemon=True))
        threads[0].start()

    simulate(server, sleepy(1), 1, engine="ray", workers=1)
    threads[0].join(20)
    assert len(got) == 1
