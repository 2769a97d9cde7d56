"""What a server may do with a grid: push, pull, send from threads, with timeouts; on both engines."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.server import ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg as OldFedAvg
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

from fedsim import _flwr, messages
from fedsim._flwr import quiet
from fedsim.engine import dispatch, waiting
from fedsim.engine.simulate import simulate
from fedsim.errors import NotEnoughReplies, UserError
from tests.engine.ray_apps import busy_app, faulty_app, importing_app

SERIAL: dict[str, Any] = {"engine": "serial"}
RAY: dict[str, Any] = {"engine": "ray", "workers": 2}


@pytest.fixture(params=["serial", "ray"])
def engine(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Both engines."""
    if request.param == "serial":
        return SERIAL
    request.getfixturevalue("shared_ray")
    return RAY


def serve(
    main: Callable[[Any], Any], app: ClientApp, engine: dict[str, Any], clients: int = 4, seed: int = 3
) -> Any:
    """Run a server's main function; returns what it returns."""
    server, found = ServerApp(), []

    @server.main()
    def run(grid: Any, context: Context) -> None:
        found.append(main(grid))

    with quiet():
        simulate(server, app, clients, seed=seed, run_config={"mode": "plain"}, **engine)
    return found[0]


def to(grid: Any, clients: Sequence[int], **config: Any) -> list[Message]:
    """Queries with one content."""
    content = RecordDict({"config": ConfigRecord(config)})
    return [Message(content, dst_node_id=grid.roster.node(c), message_type="query") for c in clients]


def metric(replies: Sequence[Message], key: str) -> list[Any]:
    return [reply.content["metrics"][key] for reply in replies]  # type: ignore[index]


def pulled(grid: Any, ids: Sequence[str]) -> Iterator[Message]:
    """All replies, as they come (within a minute)."""
    waiting, end = set(ids), time.monotonic() + 60
    while waiting and time.monotonic() < end:
        for reply in grid.pull_messages(list(waiting)):
            waiting.discard(reply.metadata.reply_to_message_id)
            yield reply


def wait_until(true: Callable[[], bool]) -> bool:
    """Whether something comes true within a minute."""
    end = time.monotonic() + 60
    while not true() and time.monotonic() < end:
        time.sleep(0.02)
    return true()


# ------------------------------------------------------------------------------- pushed messages


def test_what_is_pushed_is_delivered_before_the_next_send(engine: dict[str, Any], tmp_path: Path) -> None:
    def main(grid: Any) -> Any:
        ids = list(grid.push_messages(to(grid, [0, 2, 2])))
        calls = metric(grid.send_and_receive(to(grid, range(4))), "calls")
        return calls, sorted(metric(list(pulled(grid, ids)), "calls"))

    assert serve(main, busy_app(str(tmp_path)), engine) == ([2, 1, 3, 1], [1, 1, 2])


def test_what_is_pushed_and_never_pulled_is_delivered_in_the_end(
    engine: dict[str, Any], tmp_path: Path
) -> None:
    def main(grid: Any) -> None:
        grid.push_messages(to(grid, range(3)))
        grid.push_messages(to(grid, [1]))

    serve(main, busy_app(str(tmp_path)), engine)
    assert sorted(path.name.split("-")[0] for path in tmp_path.iterdir()) == ["0", "1", "1", "2"]


def test_a_message_is_delivered_as_it_was_pushed(engine: dict[str, Any], tmp_path: Path) -> None:
    """A server that changes its content, or pushes the very same message again, changes no earlier one."""

    def main(grid: Any) -> Any:
        [message] = to(grid, [1], x=1.0)
        first = list(grid.push_messages([message]))
        message.content["config"]["x"] = 2.0  # type: ignore[index]
        second = list(grid.push_messages([message]))
        assert message.metadata.message_id == second[0]
        found = {m.metadata.reply_to_message_id: m for m in pulled(grid, [*first, *second])}
        return metric([found[first[0]], found[second[0]]], "x")

    assert serve(main, busy_app(str(tmp_path)), engine) == [1.0, 2.0]


def test_serial_runs_one_client_a_pull_in_the_order_of_the_pushes(tmp_path: Path) -> None:
    def main(grid: Any) -> Any:
        ids = [*grid.push_messages(to(grid, [3, 1])), *grid.push_messages(to(grid, [2]))]
        found = [metric([m for m in grid.pull_messages(ids) if m.has_content()], "who") for _ in range(4)]
        later = list(grid.push_messages(to(grid, [0, 1])))
        early = list(grid.pull_messages(later[1:]))  # client 0 is before it
        return found, early, metric(list(grid.pull_messages(later[1:])), "who")

    assert serve(main, busy_app(str(tmp_path)), SERIAL) == ([[3], [1], [2], []], [], [1])


def test_an_asynchronous_server_is_reproducible_on_serial(tmp_path: Path) -> None:
    """It keeps two clients at work and asks the next one as soon as one answers."""

    def main(grid: Any) -> Any:
        seen, rng = [], np.random.default_rng(0)
        open_ids = set(grid.push_messages(to(grid, [0, 1])))
        while open_ids:
            for reply in grid.pull_messages(open_ids):
                open_ids.discard(reply.metadata.reply_to_message_id)
                seen.append((metric([reply], "who")[0], metric([reply], "p")[0]))
                if len(seen) < 9:
                    open_ids |= set(grid.push_messages(to(grid, [int(rng.integers(4))])))
        return seen

    first, second = (serve(main, busy_app(str(tmp_path)), SERIAL) for _ in range(2))
    assert first == second
    assert len({value for _, value in first}) == 10


@pytest.mark.usefixtures("shared_ray")
def test_ray_goes_on_behind_the_servers_back_and_hands_out_what_is_there(tmp_path: Path) -> None:
    def main(grid: Any) -> Any:
        ids = list(grid.push_messages(to(grid, range(4), **{"wait-for": 0})))
        assert wait_until(lambda: len(list(tmp_path.glob("?-*"))) == 4)  # nothing was pulled
        early = list(islice(pulled(grid, ids), 3))
        (tmp_path / "go").touch()
        return sorted(metric(early, "who")), metric(list(pulled(grid, ids[:1])), "who")

    assert serve(main, busy_app(str(tmp_path)), RAY) == ([1, 2, 3], [0])


# ------------------------------------------------------------------------ ids, nodes, contexts


def test_an_unknown_id_is_answered_with_an_error(engine: dict[str, Any], tmp_path: Path) -> None:
    """As Flower does: a loop that waits for it ends."""

    def main(grid: Any) -> Any:
        ids = list(grid.push_messages(to(grid, [2])))
        good = list(pulled(grid, [*ids, "nonsense"]))
        again = list(grid.pull_messages(ids))
        return ids, good, again

    ids, good, again = serve(main, busy_app(str(tmp_path)), engine)
    assert sorted(m.metadata.reply_to_message_id for m in good) == sorted([*ids, "nonsense"])
    [bad] = [m for m in good if m.has_error()]
    assert bad.error.code == again[0].error.code == _flwr.ErrorCode.MESSAGE_UNAVAILABLE
    assert "'nonsense'" in bad.error.reason
    assert again[0].metadata.reply_to_message_id == ids[0]


def test_a_message_to_an_unknown_node_is_left_out_and_said_once(
    engine: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def main(grid: Any) -> Any:
        out = to(grid, [1, 7, -5, 0])
        assert len(list(grid.push_messages(out))) == 2
        return metric(grid.send_and_receive(out), "who")

    with caplog.at_level(logging.WARNING, "fedsim"):
        assert serve(main, busy_app(str(tmp_path)), engine) == [1, 0]
    said = [record.getMessage() for record in caplog.records if record.name == "fedsim"]
    assert said[0].startswith("there is no node 1007 (nodes are 1000 to 1003)")
    assert said[1:] == ["the run has ended, but 4 messages went to nodes that are not there"]


def test_what_clients_change_in_their_configs_stays(engine: dict[str, Any], tmp_path: Path) -> None:
    """Of their own context only, and beside the state, which they find as they left it."""

    def main(grid: Any) -> Any:
        for mode in ("fast", ""):
            grid.send_and_receive(to(grid, [1, 3], mode=mode))
        replies = grid.send_and_receive(to(grid, range(4)))
        said = [reply.content["config"] for reply in replies]
        return [(row["tag"], row["mode"]) for row in said], metric(replies, "calls")

    found = serve(main, busy_app(str(tmp_path)), engine)
    assert found == ([("", "plain"), ("11", "fast"), ("", "plain"), ("33", "fast")], [1, 3, 1, 3])


def test_replies_have_ids_of_their_own(engine: dict[str, Any], tmp_path: Path) -> None:
    def main(grid: Any) -> Any:
        sent = grid.send_and_receive(to(grid, range(4), loses=2))
        ids = list(grid.push_messages(to(grid, range(4))))
        return [m.metadata.message_id for m in [*sent, *pulled(grid, [*ids, "nonsense"])]]

    found = serve(main, busy_app(str(tmp_path)), engine)
    assert len(set(found)) == 9
    assert all(found)


def test_a_message_that_is_no_reply_is_an_error() -> None:
    kept: list[Message] = []
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        kept.append(message)
        return messages.reply(kept[0])

    def main(grid: Any) -> Any:
        return [m.error.reason if m.has_error() else "" for m in grid.send_and_receive(to(grid, [0, 1]))]

    first, second = serve(main, app, SERIAL)
    assert first == ""
    assert second.startswith("client 1: ValueError: the client app returned a Message that is no reply")


# ------------------------------------------------------------------------------------- threads


def threaded(grid: Any) -> Any:
    """Every client is asked three times, each time all of them from threads of their own."""

    def ask(client: int) -> tuple[int, float, int]:
        [reply] = grid.send_and_receive(to(grid, [client]))
        return metric([reply], "who")[0], metric([reply], "p")[0], metric([reply], "calls")[0]

    with ThreadPoolExecutor(6) as pool:
        return [list(pool.map(ask, range(6))) for _ in range(3)]


def test_threads_of_the_server_change_no_number(engine: dict[str, Any], tmp_path: Path) -> None:
    def alone(grid: Any) -> Any:
        found = []
        for _ in range(3):
            replies = grid.send_and_receive(to(grid, range(6)))
            found.append(list(zip(*(metric(replies, key) for key in ("who", "p", "calls")), strict=True)))
        return found

    expected = serve(alone, busy_app(str(tmp_path)), SERIAL, clients=6)
    assert serve(threaded, busy_app(str(tmp_path)), engine, clients=6) == expected


@pytest.mark.usefixtures("shared_ray")
def test_threads_have_workers_of_their_own(tmp_path: Path) -> None:
    """Two threads send to two clients, of which one waits until the other was asked."""

    def main(grid: Any) -> Any:
        def second() -> Any:
            assert wait_until(lambda: bool(list(tmp_path.glob("0-*"))))
            found = metric(grid.send_and_receive(to(grid, [1])), "who")
            (tmp_path / "go").touch()
            return found

        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(second)
            return metric(grid.send_and_receive(to(grid, [0], **{"wait-for": 0})), "who"), other.result()

    assert serve(main, busy_app(str(tmp_path)), RAY) == ([0], [1])


class Adder(NumPyClient):
    """A client of the older API."""

    def fit(self, parameters: Any, config: Any) -> Any:
        return [parameters[0] + 1], 1, {}

    def evaluate(self, parameters: Any, config: Any) -> Any:
        return float(parameters[0].sum()), 1, {}


def older(minimum: int) -> ServerApp:
    """A server of the older API."""
    from flwr.common import ndarrays_to_parameters

    def components(context: Context) -> ServerAppComponents:
        start = ndarrays_to_parameters([np.zeros(2)])
        strategy = OldFedAvg(min_fit_clients=minimum, min_available_clients=minimum, initial_parameters=start)
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=3))

    return ServerApp(server_fn=components)


def test_an_app_of_the_older_api_ends(engine: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "flwr"):
        simulate(older(2), ClientApp(client_fn=lambda context: Adder().to_client()), 5, **engine)
    assert any("round 3: 6.0" in record.getMessage() for record in caplog.records)  # 3 rounds, 2 entries


# ---------------------------------------------------------------------- waits that cannot end


def test_flowers_waits_for_nodes_that_never_come_end() -> None:
    def main(grid: Any) -> None:
        FedAvg().start(grid, messages.arrays_of({"w": np.zeros(1)}), num_rounds=1)

    with pytest.raises(UserError, match=r"never be more than 1 node: .*--clients"):
        serve(main, ClientApp(), SERIAL, clients=1)
    with pytest.raises(UserError, match="never be more than 2 nodes"):
        simulate(older(3), ClientApp(), 2)


def test_a_servers_own_wait_for_nodes_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(waiting, "_SECONDS", 0.2)

    def sleeping(grid: Any) -> None:
        while len(list(grid.get_node_ids())) < 5:
            time.sleep(0.02)

    def spinning(grid: Any) -> None:
        while len(list(grid.get_nodes())) < 5:
            pass

    for main in (sleeping, spinning):
        with pytest.raises(UserError, match="never be more than 4 nodes"):
            serve(main, busy_app(str(tmp_path)), SERIAL)


def test_other_servers_may_ask_for_nodes_as_often_as_they_like(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(waiting, "_SECONDS", 0.1)
    errors: list[BaseException] = []

    def sends(grid: Any) -> None:
        for _ in range(20):
            grid.get_node_ids()
            grid.send_and_receive(to(grid, [0]))
            time.sleep(0.01)

    def computes(grid: Any) -> None:
        for _ in range(12):
            grid.get_node_ids()
            end = time.thread_time() + 0.015
            while time.thread_time() < end:
                pass

    def watches(grid: Any) -> None:
        def watch() -> None:
            try:
                for _ in range(20):
                    grid.get_node_ids()
                    time.sleep(0.01)
            except UserError as error:
                errors.append(error)

        thread = threading.Thread(target=watch)
        thread.start()
        thread.join()

    for main in (sends, computes, watches):
        serve(main, busy_app(str(tmp_path)), SERIAL)
    assert not errors


# ------------------------------------------------------------------------------------ timeouts


def test_a_sleeping_client_uses_up_nobodys_time(engine: dict[str, Any], tmp_path: Path) -> None:
    """Also where all clients share one worker; its state is what it was."""

    def main(grid: Any) -> Any:
        late = grid.send_and_receive(to(grid, range(4), sleeper=1), timeout=1.0)
        return metric(late, "who"), metric(grid.send_and_receive(to(grid, range(4))), "calls")

    options = engine if engine is SERIAL else {**engine, "workers": 1}
    started = time.monotonic()
    assert serve(main, busy_app(str(tmp_path)), options) == ([0, 2, 3], [2, 1, 2, 2])
    assert time.monotonic() - started < 50  # it would take 60 s


def test_a_client_that_ignores_the_alarm_is_late_all_the_same() -> None:
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        end = time.monotonic() + (0.3 if context.node_config["partition-id"] == 2 else 0.0)
        while time.monotonic() < end:
            with suppress(BaseException):
                time.sleep(0.01)
        return messages.reply(message, metrics={"who": context.node_config["partition-id"]})

    def main(grid: Any) -> Any:
        return metric(grid.send_and_receive(to(grid, range(4)), timeout=0.1), "who")

    assert serve(main, app, SERIAL) == [0, 1, 3]


@pytest.mark.usefixtures("shared_ray")
def test_a_worker_that_does_not_notice_the_end_of_a_clients_time_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_GRACE", 0.5)

    def main(grid: Any) -> Any:
        late = grid.send_and_receive(to(grid, range(4), stubborn=1), timeout=0.5)
        return metric(late, "who"), metric(grid.send_and_receive(to(grid, [2, 1])), "calls")

    started = time.monotonic()
    assert serve(main, busy_app(str(tmp_path)), {**RAY, "workers": 1}) == ([0, 2, 3], [2, 1])
    assert time.monotonic() - started < 50  # it would take 60 s


@pytest.mark.usefixtures("shared_ray")
def test_the_start_of_workers_is_nobodys_time(tmp_path: Path) -> None:
    """A worker takes more than half a second to start (of a kind that no other test has kept warm)."""

    def main(grid: Any) -> Any:
        return metric(grid.send_and_receive(to(grid, range(4)), timeout=0.5), "who")

    assert serve(main, busy_app(str(tmp_path)), {**RAY, "workers": 1, "threads": 3}) == [0, 1, 2, 3]


def test_with_no_time_at_all_messages_are_delivered_and_nobody_waits(
    engine: dict[str, Any], tmp_path: Path
) -> None:
    def main(grid: Any) -> Any:
        now = grid.send_and_receive(to(grid, range(4)), timeout=0.0)
        return list(now), metric(grid.send_and_receive(to(grid, range(4))), "calls")

    assert serve(main, busy_app(str(tmp_path)), engine) == ([], [2, 2, 2, 2])


# ----------------------------------------------------------------------------------- the end


def test_a_run_in_which_every_client_failed_is_an_error(engine: dict[str, Any], tmp_path: Path) -> None:
    def main(grid: Any) -> None:
        for client in range(4):
            grid.send_and_receive(to(grid, [client], loses=client))

    with pytest.raises(NotEnoughReplies, match=r"all 4 messages failed; .*client 0: ValueError: the sensor"):
        serve(main, busy_app(str(tmp_path)), engine)


def test_a_run_in_which_nobody_trained_is_an_error(tmp_path: Path) -> None:
    """Even if other messages were answered."""
    app, faulty = busy_app(str(tmp_path)), faulty_app("raises", 0, str(tmp_path))
    app.train()(faulty)

    def main(grid: Any) -> None:
        grid.send_and_receive(to(grid, range(4)))
        content = RecordDict({"arrays": messages.arrays_of({"w": np.zeros(1)})})
        grid.send_and_receive([Message(content, dst_node_id=grid.roster.node(0), message_type="train")])

    with pytest.raises(NotEnoughReplies, match="all 1 messages to train failed"):
        serve(main, app, SERIAL)


def test_failures_are_counted_in_one_line(
    engine: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def main(grid: Any) -> None:
        for _ in range(3):
            grid.send_and_receive(to(grid, range(4), loses=2))

    with caplog.at_level(logging.WARNING, "fedsim"):
        serve(main, busy_app(str(tmp_path)), engine)
    [said] = [record.getMessage() for record in caplog.records if record.name == "fedsim"]
    assert said.startswith("the run has ended, but 3 of 12 messages failed; the first says: client 2: ")


def test_a_server_that_fails_after_its_clients_says_so(tmp_path: Path) -> None:
    def main(grid: Any) -> None:
        metric(grid.send_and_receive(to(grid, range(4), loses=3)), "who")

    with pytest.raises(ValueError, match="content is None") as caught:
        serve(main, busy_app(str(tmp_path)), SERIAL)
    [note] = caught.value.__notes__
    assert note.startswith("before that, 1 of 4 messages failed; the first says: client 3: ValueError")


# ----------------------------------------------------------------------------------- generators


@pytest.mark.usefixtures("shared_ray")
def test_torch_that_a_client_imports_itself_draws_the_same(tmp_path: Path) -> None:
    """A worker of its own kind has no torch yet; this process has."""

    def main(grid: Any) -> Any:
        replies = grid.send_and_receive(to(grid, range(5)))
        return [metric(replies, key) for key in ("t", "threads", "late")]

    assert "torch" in sys.modules
    drawn, threads, late = serve(main, importing_app(), {**SERIAL, "threads": 2}, clients=5)
    assert late == [0] * 5
    found = serve(main, importing_app(), {**RAY, "workers": 1, "threads": 2}, clients=5)
    assert found == [drawn, threads, [1, 0, 0, 0, 0]]
    assert threads == [2] * 5
