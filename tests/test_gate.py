"""Replies that pass the gate, and those that do not: under strategies of ours, of Flower and of a user."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, FedMedian, FedTrimmedAvg, Strategy

from fedsim import messages
from fedsim.averaging import WeightedAverage
from fedsim.engine.simulate import simulate
from fedsim.errors import NotEnoughReplies, UserError
from fedsim.intake import Intake
from fedsim.messages import Replies
from fedsim.server_step import ServerStep

BAD = 2  #: the client that sends something else
CLIENTS = 5
_MEAN_OF_OTHERS = (0 * 1 + 1 * 2 + 3 * 4 + 4 * 5) / (1 + 2 + 4 + 5)
START = {"w": np.zeros(3, np.float32), "n": np.array([0, 7])}
#: what a toy client's reply holds
Content = dict[str, Any]


def content(client: int) -> Content:
    """A good reply: w = client, weighted by client + 1."""
    values = {"w": np.full(3, client, np.float32), "n": np.array([client, 7])}
    return {
        "arrays": messages.arrays_of(values),
        "metrics": MetricRecord({"num-examples": client + 1, "loss": float(client)}),
    }


class Own(Strategy):
    """A user's own: the plain mean of whatever comes."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        sent = RecordDict({"arrays": arrays, "config": config})
        return [Message(sent, message_type="train", dst_node_id=node) for node in grid.get_node_ids()]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        got = [messages.views_of(m.content.array_records["arrays"]) for m in replies]
        mean = {name: np.mean([one[name] for one in got], axis=0) for name in got[0]}
        return messages.arrays_of(mean), MetricRecord({"loss": float("nan")})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> None:
        return None

    def summary(self) -> None:
        pass


class Taken:
    """What became of one round."""

    def __init__(self) -> None:
        self.notices: list[str] = []
        self.replies = Replies()
        self.arrays: dict[str, np.ndarray] | None = None
        self.metrics: dict[str, Any] = {}

    @property
    def refused(self) -> dict[int, str]:
        return self.replies.refused or {}


def take(strategy: Strategy, change: Callable[[int, Content], object]) -> Taken:
    """One round in which `change` may touch what a client sends."""
    taken, app, client_app = Taken(), ServerApp(), ClientApp()

    @client_app.train()
    def train(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        own = content(client)
        change(client, own)
        return Message(RecordDict(own), reply_to=message)

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        intake = Intake(ServerStep(strategy, frozenset()), messages.roster(grid), taken.notices.append)
        random.seed(0)
        out = list(strategy.configure_train(1, messages.arrays_of(START), ConfigRecord({}), grid))
        received = Replies(grid.send_and_receive(out))
        taken.replies = intake.admitted(1, out, received)
        arrays, metrics = intake.trained(1, taken.replies)
        if arrays is not None:
            taken.arrays = {name: np.array(v) for name, v in messages.views_of(arrays).items()}
        taken.metrics = dict((metrics or {}).items())

    simulate(app, client_app, CLIENTS)
    return taken


def _arrays(own: Content, **values: Any) -> None:
    whole = {**messages.views_of(own["arrays"]), **values}
    own["arrays"] = messages.arrays_of({name: v for name, v in whole.items() if v is not None})


def _header(own: Content, header: str) -> None:
    """An array whose `np.save` header says something else than there is."""
    text = header.ljust(117).encode() + b"\n"
    data = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(12)
    record = ArrayRecord(dict(own["arrays"]))
    record["w"] = Array("float32", (3,), "numpy.ndarray", data)
    own["arrays"] = record


_HUGE = "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }"
_OTHER = "{'descr': '<i4', 'fortran_order': False, 'shape': (3,), }"
_NESTED = "{'descr': '<f4', 'fortran_order': False, 'shape': " + "-" * 60 + "(3,), }"

#: what client 2 sends -> what is said of it
FAULTS: dict[str, tuple[Callable[[Content], object], str]] = {
    "NaN": (lambda own: _arrays(own, w=np.full(3, np.nan, np.float32)), "'w' holds NaN or infinity"),
    "infinity": (lambda own: _arrays(own, w=np.float32([0, np.inf, 0])), "'w' holds NaN or infinity"),
    "dtype": (lambda own: _arrays(own, w=np.zeros(3)), "'w' is float64(3,), expected float32(3,)"),
    "shape": (lambda own: _arrays(own, w=np.zeros(4, np.float32)), "'w' is float32(4,), expected"),
    "missing": (lambda own: _arrays(own, w=None), "wrong names (missing ['w']"),
    "more": (lambda own: _arrays(own, v=np.zeros(1)), "unexpected ['v'])"),
    "huge header": (lambda own: _header(own, _HUGE), "'w' cannot be read"),
    "other header": (lambda own: _header(own, _OTHER), "'w' says float32(3,) but holds int32(3,)"),
    "nested header": (lambda own: _header(own, _NESTED), "'w' cannot be read"),
    "no arrays": (lambda own: own.pop("arrays"), "no array record named 'arrays'"),
    "no metrics": (lambda own: own.pop("metrics"), "no metric record named 'metrics'"),
    "negative count": (lambda own: own["metrics"].update({"num-examples": -3}), "'num-examples' is -3"),
    "count is NaN": (lambda own: own["metrics"].update({"num-examples": np.nan}), "is nan, not a count"),
    "count is huge": (lambda own: own["metrics"].update({"num-examples": 1e300}), "1e+300, not a count"),
    "count is a list": (lambda own: own["metrics"].update({"num-examples": [1]}), "[1], not a count"),
    "NaN beside": (
        lambda own: own.update({"control": messages.arrays_of({"c": np.array([np.nan])})}),
        "'c' holds NaN",
    ),
    "raises": (lambda own: 1 / 0, "ZeroDivisionError"),
}
STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "fedavg": WeightedAverage,
    "flwr-fedavg": FedAvg,
    "fedmedian": FedMedian,
    "fedtrimmedavg": FedTrimmedAvg,
    "own": Own,
}


@pytest.fixture(scope="module")
def without() -> dict[str, dict[str, np.ndarray] | None]:
    """The state of each strategy where client 2 simply fails."""

    def fail(client: int, own: Content) -> None:
        if client == BAD:
            raise RuntimeError("gone")

    return {name: take(make(), fail).arrays for name, make in STRATEGIES.items()}


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_bad_reply_is_as_if_its_client_had_failed(
    name: str, without: Mapping[str, dict[str, np.ndarray] | None]
) -> None:
    expected = without[name]
    assert expected is not None
    for kind, (fault, said) in FAULTS.items():
        taken = take(STRATEGIES[name](), lambda client, own: fault(own) if client == BAD else None)  # noqa: B023
        assert list(taken.refused) == [BAD], kind
        assert said in taken.refused[BAD], kind
        assert taken.arrays is not None, kind
        for key, values in expected.items():
            assert taken.arrays[key].tobytes() == values.tobytes(), kind


def test_the_means_are_those_of_the_others(without: Mapping[str, dict[str, np.ndarray]]) -> None:
    np.testing.assert_allclose(without["fedavg"]["w"], _MEAN_OF_OTHERS, rtol=1e-6)
    np.testing.assert_allclose(without["flwr-fedavg"]["w"], _MEAN_OF_OTHERS, rtol=1e-6)
    np.testing.assert_array_equal(without["fedmedian"]["w"], 2.0)  # of 0, 1, 3 and 4
    np.testing.assert_array_equal(without["own"]["w"], 2.0)


#: metrics of client 2 -> the metric that nobody's mean has, and who differs
ODD: dict[str, tuple[Callable[[Content], object], str, str]] = {
    "one more": (
        lambda own: own["metrics"].update({"power": 3.0}),
        "power",
        f"client {BAD} sends a number, the others nothing",
    ),
    "one less": (
        lambda own: own["metrics"].pop("loss"),
        "loss",
        f"client {BAD} sends nothing, the others a number",
    ),
    "a list": (
        lambda own: own["metrics"].update({"loss": [1.0, 2.0]}),
        "loss",
        f"client {BAD} sends a list of 2, the others a number",
    ),
    "a record": (
        lambda own: own.update({"more": MetricRecord({"x": 1.0})}),
        "more",
        f"client {BAD} sends MetricRecord, the others nothing",
    ),
    "control": (
        lambda own: own.update({"more": messages.arrays_of({"c": np.zeros(2)})}),
        "more",
        f"client {BAD} sends ArrayRecord, the others nothing",
    ),
}


@pytest.mark.parametrize("make", [FedAvg, FedMedian])
@pytest.mark.parametrize("kind", ODD)
def test_flowers_strategies_are_shown_what_all_clients_send(kind: str, make: type[Strategy]) -> None:
    """One client with another metric ends no run, and its weights count."""
    change, name, said = ODD[kind]
    whole = take(make(), lambda client, own: None)
    taken = take(make(), lambda client, own: change(own) if client == BAD else None)
    assert taken.refused == {}
    assert taken.arrays is not None
    assert whole.arrays is not None
    assert taken.arrays["w"].tobytes() == whole.arrays["w"].tobytes()
    assert taken.notices == [f"{make.__name__} is not shown '{name}': {said}"]
    assert name not in taken.metrics


def test_a_metric_that_is_left_out_is_said_once_a_run() -> None:
    notices: list[str] = []
    app, client_app, strategy = ServerApp(), ClientApp(), FedAvg()

    @client_app.train()
    def train(message: Message, context: Context) -> Message:
        own = content(int(context.node_config["partition-id"]))
        own["metrics"][f"only-{context.node_config['partition-id']}"] = 1.0
        return Message(RecordDict(own), reply_to=message)

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        intake = Intake(ServerStep(strategy, frozenset()), messages.roster(grid), notices.append)
        for number in (1, 2):
            out = list(strategy.configure_train(number, messages.arrays_of(START), ConfigRecord({}), grid))
            intake.trained(number, intake.admitted(number, out, Replies(grid.send_and_receive(out))))

    simulate(app, client_app, 3)
    assert sorted(notices) == [
        f"FedAvg is not shown 'only-{i}': client {i} sends a number, the others nothing" for i in range(3)
    ]


@pytest.mark.parametrize("name", STRATEGIES)
def test_counts_of_zero_keep_the_state_and_it_is_said(name: str) -> None:
    taken = take(STRATEGIES[name](), lambda client, own: own["metrics"].update({"num-examples": 0}))
    assert taken.arrays is None
    assert taken.refused == {}
    assert taken.notices == ["round 1: 'num-examples' is 0 at every client, so the state stays as it was"]
    assert taken.metrics["loss"] == np.mean(range(CLIENTS))


def test_uniform_weights_need_no_counts() -> None:
    taken = take(
        WeightedAverage(weighting="uniform"),
        lambda client, own: own["metrics"].update({"num-examples": 0}),
    )
    assert taken.arrays is not None
    np.testing.assert_array_equal(taken.arrays["w"], 2.0)
    assert taken.notices == []


@pytest.mark.parametrize("value", [-1.0, float("nan"), None])
def test_the_strategys_own_weight_is_checked_inside_a_wrapper_too(value: float | None) -> None:
    def change(client: int, own: Content) -> None:
        own["metrics"]["shares"] = 1.0
        if client == BAD and value is None:
            del own["metrics"]["shares"]
        elif client == BAD:
            own["metrics"]["shares"] = value

    class Around(Own):
        def __init__(self) -> None:
            self.strategy = FedAvg(weighted_by_key="shares")

        def aggregate_train(
            self, server_round: int, replies: Iterable[Message]
        ) -> tuple[ArrayRecord | None, MetricRecord | None]:
            return self.strategy.aggregate_train(server_round, replies)

    taken = take(Around(), change)
    assert taken.refused == {BAD: f"'shares' is {value!r}, not a count"}
    assert taken.arrays is not None
    np.testing.assert_array_equal(taken.arrays["w"], 2.0)  # of 0, 1, 3 and 4, each with one share


@pytest.mark.parametrize("make", [WeightedAverage, FedAvg, Own])
def test_a_loss_that_is_no_number_leaves_the_mean(make: type[Strategy]) -> None:
    """The weights of such a client are good, and count (the round loop names it)."""
    whole = take(make(), lambda client, own: None)
    taken = take(
        make(), lambda client, own: own["metrics"].update({"loss": np.nan}) if client == BAD else None
    )
    assert taken.metrics["loss"] == pytest.approx(_MEAN_OF_OTHERS)
    assert taken.metrics["loss_unmeasured"] == 1
    assert taken.arrays is not None
    assert whole.arrays is not None
    np.testing.assert_array_equal(taken.arrays["w"], whole.arrays["w"])


@pytest.mark.parametrize("make", [WeightedAverage, FedMedian])
def test_another_metric_that_is_no_number_is_named_too(make: type[Strategy]) -> None:
    taken = take(
        make(),
        lambda client, own: own["metrics"].update({"power": np.inf if client == BAD else float(client)}),
    )
    assert taken.metrics["power"] == pytest.approx(_MEAN_OF_OTHERS)
    assert taken.metrics["power_unmeasured"] == 1
    assert taken.notices == [f"round 1: client {BAD} left out of the mean: power holds inf"]


def test_no_usable_reply_ends_the_run_and_names_every_client() -> None:
    with pytest.raises(NotEnoughReplies, match="no usable reply; training diverges: lower") as told:
        take(FedMedian(), lambda client, own: _arrays(own, w=np.full(3, np.nan, np.float32)))
    assert all(f"client {client}: 'w' holds NaN" in str(told.value) for client in range(CLIENTS))


def test_a_strategy_may_say_what_replies_hold() -> None:
    """Clients may send other arrays than they got: sketches, masks, gradients of some layers."""

    class Sketches(Own):
        def reply_shapes(self, message: Message) -> messages.Shapes:
            return {"sketch": ((2,), "float64")}

    def change(client: int, own: Content) -> None:
        wrong = np.zeros(3) if client == BAD else np.full(2, client, float)
        own["arrays"] = messages.arrays_of({"sketch": wrong})

    taken = take(Sketches(), change)
    assert taken.refused == {BAD: "'sketch' is float64(3,), expected float64(2,)"}
    assert taken.arrays is not None
    np.testing.assert_array_equal(taken.arrays["sketch"], 2.0)


def _returning(found: object) -> type[Strategy]:
    """A user's strategy whose `aggregate_train` returns what it should not."""

    class Wrong(FedAvg):
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            return found

    return Wrong


def test_a_state_that_a_strategy_breaks_is_named_once() -> None:
    broken = messages.arrays_of({"w": np.array([1, np.nan, 2], np.float32)})
    taken = take(_returning((broken, None))(), lambda client, own: None)
    assert taken.notices == [
        "round 1: Wrong made NaN or infinity of finite replies, in w: lower its step size, or check its "
        "aggregate_train"
    ]


def test_a_users_strategy_that_keeps_the_state_says_so() -> None:
    taken = take(_returning((None, None))(), lambda client, own: None)
    assert taken.notices == ["round 1: Wrong leaves the state as it was"]


@pytest.mark.parametrize("found", [3, None, (None,), ({"w": 1}, None)])
def test_what_aggregate_train_must_return_is_said(found: object) -> None:
    with pytest.raises(UserError, match=r"round 1: Wrong\.aggregate_train returned .*an ArrayRecord or None"):
        take(_returning(found)(), lambda client, own: None)


def test_an_error_reply_of_nobody_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """On a stranger's grid, what a SuperLink says in the place of a node has the SuperLink as its source."""
    from flwr.app import Error

    from fedsim import _flwr

    with _flwr.acting_as_server(run_id=1):
        sent = Message(RecordDict(), message_type="train", dst_node_id=31)
        gone, there = (Message(Error(5, "offline"), reply_to=sent) for _ in range(2))
    _flwr.set_source(gone, _flwr.SUPERLINK_NODE_ID)
    found = messages.by_client([gone, there], messages._SortedNodes((31, 57)))
    assert [client for client, _ in found] == [0]
    assert "which is none of the clients: offline" in caplog.text
