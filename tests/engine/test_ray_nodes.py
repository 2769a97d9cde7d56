"""RayGrid on Ray's own test cluster: several fake nodes on this machine, one of which disappears."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster

from fedsim.averaging import WeightedAverage
from fedsim.engine import ray as engine
from fedsim.engine.cluster import connect
from fedsim.errors import UserError
from tests.engine.ray_apps import slow_app
from tests.engine.test_ray import rounds


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head that offers one CPU; tests add nodes."""
    if ray.is_initialized():
        ray.shutdown()
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield made
    ray.shutdown()
    made.shutdown()


def at_reply(number: int, action: Callable[[], None]) -> Callable[[Any], None]:
    """Does something when the given reply of a run arrives."""

    def on_start(grid: Any) -> None:
        inner, left = grid.on_reply, [number]

        def seen(message: Any) -> None:
            left[0] -= 1
            if left[0] == 0:
                action()
            inner(message)

        grid.on_reply = seen

    return on_start


@pytest.mark.parametrize("nodes", [2, 4])
def test_losing_a_node_changes_no_bit(
    nodes: int, cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    added = [cluster.add_node(num_cpus=1) for _ in range(nodes - 1)]
    ray.init(address=cluster.address, log_to_driver=False)
    assert len({node["NodeID"] for node in ray.nodes()}) == nodes
    puts: list[Any] = []
    put = ray.put
    monkeypatch.setattr(ray, "put", lambda value: puts.append(value) or put(value))

    monkeypatch.setattr(engine, "_torch_is_used", lambda: False)
    big = {"w": np.linspace(-1, 1, 600_000, dtype=np.float32)}
    app = slow_app(str(tmp_path))
    whole = rounds(app, WeightedAverage(), start=big)
    lose = at_reply(20, lambda: cluster.remove_node(added[0]))  # in the middle of the second round
    found = rounds(app, WeightedAverage(), start=big, on_start=lose, engine="ray")
    assert vars(found) == vars(whole)
    assert sum(node["Alive"] for node in ray.nodes()) == nodes - 1
    # what workers are started with, then the arrays of three rounds: one object each, which Ray takes to
    # a node once
    assert len(puts) == 1 + 3


def test_an_existing_cluster_is_found_and_left_running(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    monkeypatch.setattr(engine, "_torch_is_used", lambda: False)
    app = slow_app(str(tmp_path))
    for start in ({"w": np.ones(5, np.float32)}, {"w": np.ones(10**6, np.float32)}):  # inline and stored
        found = rounds(app, WeightedAverage(), start=start, engine="ray", address="auto")
        assert vars(found) == vars(rounds(app, WeightedAverage(), start=start))
        assert ray.get_runtime_context().gcs_address == cluster.address
    ray.shutdown()
    ray.init(address=cluster.address, log_to_driver=False)  # it is still there
    assert ray.cluster_resources()["CPU"] == 1


def test_no_cluster_at_the_address_is_an_error() -> None:
    with pytest.raises(UserError, match=r"engine\.address = '127\.0\.0\.1:9': .* leave engine\.address out"):
        connect("127.0.0.1:9", 1)
