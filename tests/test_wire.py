"""A foreign grid behaves like ours: partition ids, packing, the same digest."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedsim import messages
from fedsim.app import FederatedClientApp, client_app, serve
from fedsim.engine.exchange import FIRST_NODE
from fedsim.engine.grid import BaseGrid
from fedsim.engine.simulate import simulate
from fedsim.errors import UserError
from fedsim.runs import Run
from fedsim.wire import WireGrid
from tests.helpers import run, tiny


class Foreign(Grid):
    """A stranger's grid: the calls of a BaseGrid without being one, nodes in no particular order."""

    def __init__(self, inner: BaseGrid) -> None:
        self.inner = inner
        self.largest_record = 0

    def set_run(self, run: Any) -> None:
        self.inner.set_run(run)

    @property
    def run(self) -> Any:
        return self.inner.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        return self.inner.create_message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.inner.get_node_ids())[::-1]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        for message in messages:
            self._look(message)
        return self.inner.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(self.inner.pull_messages(message_ids))
        for message in replies:
            self._look(message)
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.pull_messages(list(self.push_messages(messages)))

    def _look(self, message: Message) -> None:
        if message.has_content():
            for record in message.content.values():
                if isinstance(record, ArrayRecord):
                    self.largest_record = max(self.largest_record, len(record))


class Nameless(FederatedClientApp):
    """Nodes whose config has another partition id than the engine's, or none."""

    def __init__(self, names: dict[int, int | None]) -> None:
        super().__init__()
        self.names = names

    def __call__(self, message: Message, context: Context) -> Message:
        name = self.names.get(context.node_id - FIRST_NODE, -2)
        del context.node_config["partition-id"]
        if name is not None:
            context.node_config["partition-id"] = name
        return super().__call__(message, context)


def on_foreign_grid(
    experiment: Any, folder: Path, app: ClientApp = client_app
) -> tuple[dict[str, Any], Foreign]:
    made: list[Foreign] = []
    server = ServerApp()
    target = Run.create(experiment, folder)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        assert isinstance(grid, BaseGrid)
        made.append(Foreign(grid))
        serve(experiment, made[0], target, ())

    simulate(server, app, experiment.clients, seed=experiment.seed)
    return target.summary(), made[0]


@pytest.mark.parametrize("model", ["cnn", "tests.bf16_model:make"])
def test_packed_on_a_foreign_grid_gives_the_same_digest_and_bytes(model: str, tmp_path: Path) -> None:
    experiment = tiny(model={"name": model})
    ours = run(experiment, tmp_path / "ours").summary
    theirs, grid = on_foreign_grid(experiment, tmp_path / "theirs")
    for key in ("digest", "accuracy", "loss", "bytes_up", "bytes_down"):
        assert theirs[key] == ours[key], key
    assert grid.largest_record <= 2  # one flat array per dtype, however many tensors


def test_bfloat16_counts_two_bytes_and_trains(tmp_path: Path) -> None:
    result = run(tiny(model={"name": "tests.bf16_model:make"}), tmp_path)
    sent = 64 * 16 * 2 + 16 * 2 + 16 * 10 * 4 + 10 * 4
    assert result.summary["bytes_up"] == 3 * 4 * sent
    rows = [json.loads(line) for line in (tmp_path / "tiny" / "clients.jsonl").read_text().splitlines()]
    assert {row["bytes_up"] for row in rows} == {sent}
    assert result.summary["accuracy"] > result.summary["accuracy_start"]


def test_nodes_without_a_partition_get_the_lowest_free_ones(tmp_path: Path) -> None:
    experiment = tiny("rounds=1")
    ours = run(experiment, tmp_path / "ours").summary
    swapped, _ = on_foreign_grid(experiment, tmp_path / "a", Nameless({0: None, 1: 3, 2: None, 3: 0}))
    assert swapped["digest"] == ours["digest"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({0: 1, 1: 1, 2: 2, 3: 3}, "both say partition-id 1"),
        ({0: 0, 1: 1, 2: 2, 3: 7}, r"partition ids \[0, 1, 2, 7\], expected 0 to 3"),
    ],
)
def test_contradictory_nodes_are_refused(names: dict[int, int | None], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        on_foreign_grid(tiny(), tmp_path, Nameless(names))


def test_a_node_with_other_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsim.app.code_digest", lambda: "0.0.1+abc")
    with pytest.raises(UserError, match=r"node 1000 runs fedsim 0\.0\.1\+abc"):
        on_foreign_grid(tiny(), tmp_path)


def test_a_wrong_number_of_nodes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSIM_NODE_WAIT", "0.1")
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        WireGrid(grid, 5)

    with pytest.raises(
        UserError, match=r"4 nodes are connected but the experiment has partition\.clients = 5"
    ):
        simulate(server, client_app, 4)


def test_the_server_waits_for_late_nodes(tmp_path: Path) -> None:
    """Flower's strategies compute the cohort before the nodes are there; here they are waited for."""
    server = ServerApp()
    found: list[int] = []

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        class Late(Foreign):
            looks = 0

            def get_node_ids(self) -> Iterable[int]:
                self.looks += 1
                return list(super().get_node_ids())[: self.looks]

        assert isinstance(grid, BaseGrid)
        found.extend(messages.roster(WireGrid(Late(grid), 4)).clients())

    simulate(server, client_app, 4)
    assert found == [0, 1, 2, 3]


class Careless(FederatedClientApp):
    """Client 2 sends packed arrays that are shorter than their layout says."""

    def __call__(self, message: Message, context: Context) -> Message:
        reply = super().__call__(message, context)
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == 2:
            packed = reply.content["arrays"]
            assert isinstance(packed, ArrayRecord)
            name = next(iter(packed))
            packed[name] = messages.arrays_of({name: packed[name].numpy()[:-1]})[name]
        return reply


def test_a_misshapen_packed_reply_is_refused_and_named(tmp_path: Path) -> None:
    summary, _ = on_foreign_grid(tiny("rounds=1"), tmp_path, Careless())
    rows = [json.loads(line) for line in (tmp_path / "tiny" / "clients.jsonl").read_text().splitlines()]
    assert ["error" in row for row in sorted(rows, key=lambda row: row["client"])] == [
        False,
        False,
        True,
        False,
    ]
    assert summary["rounds"] == 1


class WithOwnData(FederatedClientApp):
    """Every node has a file of its own and says where."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __call__(self, message: Message, context: Context) -> Message:
        context.node_config["data-path"] = str(self.folder / f"{context.node_id - FIRST_NODE}.npz")
        return super().__call__(message, context)


def test_nodes_with_private_files_equal_a_natural_partition(tmp_path: Path) -> None:
    """The server has a test set alone; each node trains on its own file."""
    rng = np.random.default_rng(0)
    x, y, owner = rng.random((90, 6), np.float32), np.arange(90) % 3, np.arange(90) // 30
    test = {"x_test": x[:9], "y_test": y[:9]}
    np.savez(tmp_path / "all.npz", x_train=x, y_train=y, groups=owner, **test)
    for client in range(3):
        mine = owner == client
        np.savez(tmp_path / f"{client}.npz", x_train=x[mine], y_train=y[mine], **test)
    experiment = tiny(
        data={"name": f"npz:{tmp_path / 'all.npz'}"}, partition={"name": "natural", "clients": 3}
    )
    ours = run(experiment, tmp_path / "ours").summary
    theirs, _ = on_foreign_grid(experiment, tmp_path / "theirs", WithOwnData(tmp_path))
    assert theirs["digest"] == ours["digest"]
    (tmp_path / "1.npz").unlink()
    again, _ = on_foreign_grid(experiment, tmp_path / "again", WithOwnData(tmp_path))
    assert again["digest"] != ours["digest"]
    lines = (tmp_path / "again" / "tiny" / "clients.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert {row["client"] for row in rows if "there is no" in row.get("error", "")} == {1}


def test_nodes_with_dark_images_read_them_as_the_server_does(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """16 bits: what clients 0 and 1 have would be 8 and 12 bits if it were all there is."""
    rng = np.random.default_rng(0)
    y, owner = np.arange(90) % 3, np.arange(90) // 30
    x = np.array([200, 4000, 65535])[owner][:, None, None] * rng.random((90, 4, 4))
    x = x.astype(np.uint16)
    test = {"x_test": x[::10], "y_test": y[::10]}
    np.savez(tmp_path / "all.npz", x_train=x, y_train=y, groups=owner, **test)
    for client in range(3):
        mine = owner == client
        own = {"x_test": x[mine][:6], "y_test": y[mine][:6]}
        np.savez(tmp_path / f"{client}.npz", x_train=x[mine], y_train=y[mine], **own)
    data = {"name": f"npz:{tmp_path / 'all.npz'}"}
    experiment = tiny("rounds=1", data=data, partition={"name": "natural", "clients": 3})
    ours = run(experiment, tmp_path / "ours").summary
    theirs, _ = on_foreign_grid(experiment, tmp_path / "theirs", WithOwnData(tmp_path))
    assert theirs["digest"] == ours["digest"]
    printed = capfd.readouterr().out
    assert printed.count("data of client 0: 30 training and 6 test samples") == 1
    assert "data of client 0: pixels: uint16 values from 0 to 19" in printed


def test_nodes_with_classes_in_an_order_of_their_own_equal_a_natural_partition(tmp_path: Path) -> None:
    """One node has all classes in another order, one lacks a class; one has a class that nobody knows."""
    rng = np.random.default_rng(1)
    names = np.array(["ash", "elm", "fir"])
    x, y, owner = rng.random((90, 6), np.float32), np.arange(90) % 3, np.arange(90) // 30
    owner[(owner == 1) & (y == 0)] = 0
    np.savez(
        tmp_path / "all.npz", x_train=x, y_train=y, groups=owner, x_test=x[:9], y_test=y[:9], classes=names
    )

    def write(client: int, own: list[str]) -> None:
        mine = (owner == client) & np.isin(names[y], own)
        labels = np.array([own.index(name) for name in names[y[mine]]])
        tests = {"x_test": x[mine][:2], "y_test": labels[:2]}
        np.savez(tmp_path / f"{client}.npz", x_train=x[mine], y_train=labels, classes=np.array(own), **tests)

    for client, own in enumerate((["fir", "ash", "elm"], ["fir", "elm"], ["ash", "elm", "fir"])):
        write(client, own)
    experiment = tiny(
        data={"name": f"npz:{tmp_path / 'all.npz'}"}, partition={"name": "natural", "clients": 3}
    )
    ours = run(experiment, tmp_path / "ours").summary
    theirs, _ = on_foreign_grid(experiment, tmp_path / "theirs", WithOwnData(tmp_path))
    assert theirs["digest"] == ours["digest"]
    names[2] = "yew"
    write(2, ["ash", "elm", "yew"])
    on_foreign_grid(experiment.replace("rounds=1"), tmp_path / "again", WithOwnData(tmp_path))
    lines = (tmp_path / "again" / "tiny" / "clients.jsonl").read_text().splitlines()
    said = {row["client"]: row["error"] for row in map(json.loads, lines) if "error" in row}
    assert said.keys() == {2}
    assert "the server knows no class 'yew'; its classes are ash, elm, fir" in said[2]
