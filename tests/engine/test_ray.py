"""The engine contract on RayGrid: the bits of the serial engine, whatever happens to workers."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from itertools import count as counted
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg, FedMedian, Strategy

from fedsim import messages
from fedsim._flwr import quiet
from fedsim.averaging import WeightedAverage, weighting_of
from fedsim.engine.simulate import simulate
from tests.engine.ray_apps import faulty_app, noisy_app, slow_app
from tests.helpers import run, tiny

RAYS = [{"engine": "ray", "workers": n} for n in (1, 2, 3)]
START = {"w": np.linspace(-1, 1, 50, dtype=np.float32).reshape(5, 10), "n": np.array([3])}


pytestmark = pytest.mark.usefixtures("shared_ray")


class Watched:
    """What a train exchange gave: the strategy's answer and everything that was seen on the way."""

    def __init__(self) -> None:
        self.arrays: dict[str, bytes] = {}
        self.metrics: list[dict[str, Any]] = []
        self.seen: list[tuple[int, dict[str, Any], int]] = []
        self.refused: dict[int, str] = {}


def rounds(
    app: ClientApp,
    strategy: Strategy,
    clients: int = 13,
    count: int = 3,
    *,
    fold: bool = True,
    start: Any = START,
    on_start: Callable[[Any], None] = lambda grid: None,
    **engine: Any,
) -> Watched:
    """Play some training rounds and return everything that could differ between engines."""
    server, found = ServerApp(), Watched()

    @server.main()
    def main(grid: Any, context: Context) -> None:
        arrays = messages.arrays_of(start)
        if fold:
            grid.folding = weighting_of(strategy)

        def seen(message: Message) -> None:
            who = grid.roster.client(message.metadata.src_node_id)
            error = message.has_error()
            values = {} if error else dict(message.content.metric_records.get("metrics", {}))
            found.seen.append((who, values, 0 if error else messages.nbytes(message.content)))

        grid.on_reply = seen
        on_start(grid)
        for number in range(1, count + 1):
            out = strategy.configure_train(number, arrays, ConfigRecord({"server-round": number}), grid)
            replies = grid.send_and_receive(out)
            changed, metrics = strategy.aggregate_train(number, replies)
            arrays = changed if changed is not None else arrays
            found.metrics.append(dict(metrics or {}))
        found.arrays = {k: v.tobytes() for k, v in messages.views_of(arrays).items()}
        found.refused = dict(getattr(strategy, "refused", {}))

    with quiet():
        simulate(server, app, clients, seed=3, **engine)
    found.seen.sort(key=lambda row: (row[1].get("calls", 0), row[0]))
    return found


@pytest.mark.parametrize("make", [WeightedAverage, FedAvg, FedMedian], ids=lambda make: make.__name__)
def test_any_number_of_workers_gives_the_bits_of_the_serial_engine(make: Any) -> None:
    """States, seeds, metrics, what hooks see and byte counts, too; folded where the strategy declares it."""

    def strategy() -> Any:
        return make() if make is WeightedAverage else make(fraction_evaluate=0.0)

    whole = rounds(noisy_app(), strategy(), fold=False)
    assert len({row[1]["noise"] for row in whole.seen}) == 3 * 13
    assert [row[1]["calls"] for row in whole.seen] == [1] * 13 + [2] * 13 + [3] * 13
    for engine in [{"engine": "serial"}, *RAYS]:
        other = rounds(noisy_app(), strategy(), **engine)
        assert vars(other) == vars(whole), engine


def test_a_whole_experiment_has_one_digest_with_personal_state_and_without(tmp_path: Path) -> None:
    for personal in ([], ["head.*"]):
        found, rows = set(), []
        for number, engine in enumerate([{"name": "serial"}, {"name": "ray", "workers": 2}]):
            partition = {"name": "dirichlet", "alpha": 0.5, "clients": 9, "shots": 4}
            experiment = tiny(engine=engine, payload={"personal": personal}, partition=partition)
            result = run(experiment, tmp_path / f"{len(personal)}{number}")
            summary = result.summary
            found.add((summary["digest"], summary.get("digest_personal"), summary["bytes_up"]))
            lines = (result.run.folder / "clients.jsonl").read_text().splitlines()
            rows.append([line.partition('"seconds"')[0] for line in lines])
        assert len(found) == 1
        assert rows[0] == rows[1]


FAULTS = ["raises", "exits", "dies", "killed", "NaN", "wrong names", "wrong shapes", "absurd size"]


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_client_is_named_and_left_out(fault: str, fold: bool, tmp_path: Path) -> None:
    start = {"w": np.zeros(20, np.float32)}
    app = faulty_app(fault, 5, str(tmp_path))
    strategy = WeightedAverage()
    found = rounds(app, strategy, count=1, start=start, fold=fold, engine="ray", workers=2)
    assert set(found.refused) == {5}
    assert found.arrays["w"] == np.ones(20, np.float32).tobytes()
    assert len(found.seen) == 13
    if fault in ("dies", "killed"):
        assert "client 5: its worker died twice while it ran" in found.refused[5]
    else:
        serial = rounds(app, WeightedAverage(), count=1, start=start, fold=False)
        assert found.refused[5].splitlines()[0] == serial.refused[5].splitlines()[0]


def test_only_the_block_of_a_dead_worker_is_replayed_and_its_clients_alone(tmp_path: Path) -> None:
    found = rounds(
        faulty_app("dies once", 5, str(tmp_path)), WeightedAverage(), 40, 1, engine="ray", workers=2
    )
    assert found.refused == {}
    calls = [path.name.split("-")[0] for path in tmp_path.iterdir() if path.name != "died"]
    again = {int(who) for who in calls if calls.count(who) > 1}
    assert 5 in again
    assert len(again) <= 6
    assert len(set(calls)) == 40


def test_workers_killed_at_random_change_no_bit(tmp_path: Path) -> None:
    app = slow_app(str(tmp_path), 0.02)
    whole = rounds(app, WeightedAverage(), 30, 8)
    killed: list[int] = []

    def on_start(grid: Any) -> None:
        inner, rng = grid.on_reply, np.random.default_rng(0)
        at = set(rng.choice(np.arange(1, 230), 10, replace=False).tolist())
        replies = counted(1)

        def seen(message: Message) -> None:
            inner(message)
            alive = [int(p.name) for p in tmp_path.iterdir() if Path("/proc", p.name).exists()]
            if next(replies) in at and set(alive) - {os.getpid()}:
                killed.append(int(rng.choice(sorted(set(alive) - {os.getpid()}))))
                os.kill(killed[-1], signal.SIGKILL)

        grid.on_reply = seen

    found = rounds(app, WeightedAverage(), 30, 8, on_start=on_start, engine="ray", workers=2)
    assert len(killed) == 10
    assert vars(found) == vars(whole)


def test_a_hanging_client_is_ended_after_its_timeout(tmp_path: Path) -> None:
    started = time.monotonic()
    app = faulty_app("hangs", 5, str(tmp_path))
    found = rounds(app, WeightedAverage(), count=1, engine="ray", workers=2, timeout=1.0)
    assert found.refused == {5: "error: client 5: no answer within 1 s (engine.timeout)"}
    assert time.monotonic() - started < 30


def test_a_client_that_eats_all_memory_is_stopped_alone(tmp_path: Path) -> None:
    app = faulty_app("out of memory", 5, str(tmp_path))
    found = rounds(app, WeightedAverage(), count=1, engine="ray", workers=2, memory=0.5)
    assert set(found.refused) == {5}
    assert "MemoryError" in found.refused[5]
