"""A foreign grid behaves like ours: partition ids, packing, the same digest."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedsim import _flwr, messages
from fedsim.app import FederatedClientApp, client_app, serve
from fedsim.engine.exchange import FIRST_NODE
from fedsim.engine.grid import BaseGrid
from fedsim.engine.simulate import simulate
from fedsim.errors import UserError
from fedsim.finish import resume
from fedsim.forgetting.attribute import erasing
from fedsim.forgetting.request import opened
from fedsim.hooks import Hook
from fedsim.messages import arrays_of, views_of
from fedsim.runs import Run
from fedsim.version import code_digest
from fedsim.wire import WireGrid
from tests.helpers import StopAt, run, tiny
from tests.test_rounds import Notices


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
        context.node_config.pop("partition-id", None)
        if name is not None:
            context.node_config["partition-id"] = name
        return super().__call__(message, context)


def on_foreign_grid(
    experiment: Any, folder: Path, app: ClientApp = client_app, *hooks: Hook
) -> tuple[dict[str, Any], Foreign]:
    made: list[Foreign] = []
    server = ServerApp()
    target = Run.create(experiment, folder)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        assert isinstance(grid, BaseGrid)
        made.append(Foreign(grid))
        serve(experiment, made[0], target, hooks)

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


class Failing(Foreign):
    """What Flower says in the place of a node has the SuperLink as its source; it may not take a message.

    From the first training round on: `offline` nodes get an error reply of Flower's, messages to `gone` ones
    are not taken (as HTTP does it: no id; in memory: left out of the ids).
    """

    def __init__(self, inner: BaseGrid, offline: set[int], gone: set[int], *, in_memory: bool) -> None:
        super().__init__(inner)
        self.offline, self.gone, self.in_memory = offline, gone, in_memory
        self.made: dict[str, Message] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            client = message.metadata.dst_node_id - FIRST_NODE
            hello = message.metadata.message_type == "query.hello"
            if client in self.gone and not hello:
                ids += [] if self.in_memory else [""]
                continue
            [number] = super().push_messages([message])
            ids.append(number)
            if client in self.offline and not hello:
                error = Message(Error(5, "the node is offline"), reply_to=message)
                _flwr.set_source(error, _flwr.SUPERLINK_NODE_ID)
                self.made[number] = error
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = list(message_ids)
        assert all(wanted)
        return [
            *super().pull_messages([i for i in wanted if i not in self.made]),
            *(self.made.pop(i) for i in wanted if i in self.made),
        ]


@pytest.mark.parametrize("strategy", ["fedavg", "flwr-fedavg"])
@pytest.mark.parametrize("in_memory", [True, False])
def test_nodes_that_fail_or_are_gone_are_named_and_the_run_goes_on(
    strategy: str, in_memory: bool, tmp_path: Path
) -> None:
    """The aggregate is that of the others, whoever says that a node failed."""
    experiment = tiny("rounds=2", strategy={"name": strategy})
    notices = Notices()
    target = Run.create(experiment, tmp_path)
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        assert isinstance(grid, BaseGrid)
        serve(experiment, Failing(grid, {1}, {3}, in_memory=in_memory), target, (notices,))

    simulate(server, client_app, experiment.clients, seed=experiment.seed)
    assert target.summary()["rounds"] == 2
    rows = [row for row in target.client_rows() if "error" in row]
    assert [(row["round"], row["client"]) for row in rows] == [(1, 1), (1, 3), (2, 1), (2, 3)]
    assert [row["refused"] for row in target.history()] == [0, 2, 2]
    said = [text for text in notices.texts if "not used" in text]
    assert "client 1 not used: error: the node is offline" in said[0]
    assert f"client 3 not used: error: node {FIRST_NODE + 3} is gone" in said[1]
    # the same as where these two clients fail by themselves
    expected = on_foreign_grid(experiment, tmp_path / "raise", Raising({1, 3}))[0]
    assert target.summary()["digest"] == expected["digest"]


class Raising(FederatedClientApp):
    """Some clients cannot train."""

    def __init__(self, clients: set[int]) -> None:
        super().__init__()
        self.clients = clients

    def __call__(self, message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train" and context.node_id - FIRST_NODE in self.clients:
            raise RuntimeError("flat battery")
        return super().__call__(message, context)


class Hostile(FederatedClientApp):
    """Client 2 sends something else than it should, over the wire."""

    def __init__(self, change: Callable[[RecordDict], object]) -> None:
        super().__init__()
        self.change = change

    def __call__(self, message: Message, context: Context) -> Message:
        reply = super().__call__(message, context)
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == 2:
            self.change(reply.content)
        return reply


def _layout(content: RecordDict, text: bytes) -> None:
    content["layout"] = ConfigRecord({"layout": zlib.compress(text)})


HOSTILE: dict[str, tuple[Callable[[RecordDict], object], str]] = {
    "deep layout": (lambda c: _layout(c, b"[" * 200_000), "nested more than 32 deep"),
    "no layout": (lambda c: c.pop("layout"), "wrong names"),
    "layout of others": (lambda c: _layout(c, b'{"arrays": [["w", "<f4", [1]]]}'), "wrong names"),
    "NaN": (
        lambda c: c.update({"arrays": arrays_of({k: v * np.nan for k, v in views_of(c["arrays"]).items()})}),
        "holds NaN",
    ),
    "made-up dtype": (
        lambda c: c.update({"more": ArrayRecord({"w": Array("float33", (1,), "numpy.ndarray", b"x")})}),
        "cannot be read",
    ),
    "count": (lambda c: c["metrics"].update({"num-examples": -1}), "'num-examples' is -1"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_reply_over_the_wire_is_refused_and_named(kind: str, tmp_path: Path) -> None:
    change, said = HOSTILE[kind]
    notices = Notices()
    experiment = tiny("rounds=1", strategy={"name": "fedmedian"})
    summary, _ = on_foreign_grid(experiment, tmp_path / "a", Hostile(change), notices)
    refused = [text for text in notices.texts if "reply of client 2 not used" in text]
    assert len(refused) == 1
    assert said in refused[0]
    expected = on_foreign_grid(experiment, tmp_path / "b", Raising({2}))[0]
    assert summary["digest"] == expected["digest"]


class Says(FederatedClientApp):
    """Node 1 answers hello with something of its own, or has an odd config."""

    def __init__(self, **said: Any) -> None:
        super().__init__()
        self.said = said

    def __call__(self, message: Message, context: Context) -> Message:
        if context.node_id != FIRST_NODE + 1:
            return super().__call__(message, context)
        context.node_config.update(self.said.get("node_config", {}))
        reply = super().__call__(message, context)
        if message.metadata.message_type == "query.hello" and "hello" in self.said:
            return messages.reply(message, config=self.said["hello"])
        return reply


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ({"node_config": {"partition-id": "zero"}}, "partition-id is 'zero', not a whole number"),
        ({"node_config": {"partition-id": 1.5}}, "partition-id is 1.5, not a whole number"),
        ({"hello": {"code-digest": code_digest(), "partition-id": "zero"}}, "says partition-id 'zero'"),
        ({"hello": {"code-digest": code_digest()}}, "says partition-id None"),
        ({"hello": {"code-digest": code_digest(), "partition-id": True}}, "says partition-id True"),
        ({"hello": {"partition-id": 1}}, "runs another client app"),
        ({"hello": None}, "runs another client app"),
    ],
)
def test_an_odd_hello_is_one_line_that_names_the_node(
    said: dict[str, Any], text: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=text) as told:
        on_foreign_grid(tiny(), tmp_path, Says(**said))
    assert f"node {FIRST_NODE + 1} " in str(told.value)


def test_an_odd_memory_budget_is_named(tmp_path: Path) -> None:
    notices = Notices()
    on_foreign_grid(tiny("rounds=1"), tmp_path, Says(node_config={"memory-budget": "lots"}), notices)
    assert any("client 1" in t and "memory-budget is 'lots'" in t for t in notices.texts)


def test_a_run_on_nodes_is_not_resumed_or_changed_in_this_process(tmp_path: Path) -> None:
    """This machine need not have the clients' data; a finished run can still be looked at."""
    whole, _ = on_foreign_grid(tiny("rounds=2"), tmp_path / "whole")
    finished = Run.open(tmp_path / "whole" / "tiny")
    assert finished.on_nodes
    assert resume(finished.folder).summary == whole
    with pytest.raises(UserError, match="was made on nodes, which have the clients' data; fedsim forget"):
        opened(finished)
    with pytest.raises(UserError, match="was made on nodes"):
        erasing(finished, ["gender"])
    with pytest.raises(KeyboardInterrupt):
        on_foreign_grid(tiny("rounds=4"), tmp_path / "cut", client_app, StopAt(2))
    before = Run.open(tmp_path / "cut" / "tiny").history()
    with pytest.raises(UserError, match="was made on nodes, which have the clients' data; fedsim resume"):
        resume(tmp_path / "cut" / "tiny")
    assert Run.open(tmp_path / "cut" / "tiny").history() == before
    here = run(tiny("rounds=1"), tmp_path / "here")
    assert not here.run.on_nodes


def test_baselines_of_a_run_on_nodes_are_not_trained_here(tmp_path: Path) -> None:
    on_foreign_grid(tiny("rounds=1", baselines=["local-only"]), tmp_path)
    with pytest.raises(UserError, match="was made on nodes"):
        resume(tmp_path / "tiny")
