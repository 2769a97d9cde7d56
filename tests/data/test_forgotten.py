"""[forget]: what is left to train on, what is forgotten, and who still takes part."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedsim import messages
from fedsim.building import build, load_data
from fedsim.data.federated import FederatedData
from fedsim.data.forgotten import check, without
from fedsim.errors import UserError
from tests.helpers import run, tiny


@pytest.fixture
def data() -> FederatedData:
    return load_data(tiny("evaluation.validation=0.2", "partition.shots=5"))


def test_classes_are_split_off_every_part(data: FederatedData) -> None:
    labels = np.asarray(data.arrays.train_y)
    left = without(data, [9, 2], [])
    lost = left.forgotten
    assert lost is not None
    assert not np.isin(labels[left.partition.indices], [2, 9]).any()
    assert np.isin(labels[lost.training.indices], [2, 9]).all()
    assert not np.isin(labels[left.validation], [2, 9]).any()
    assert set(labels[lost.validation]) == {2, 9}
    for client in range(4):
        assert left.had(client).tolist() == np.sort(data.client(client)).tolist()
        assert len(left.client(client)) == 5 * 8
    assert len(left.validation) + len(lost.validation) == len(data.validation)


def test_clients_take_their_share_with_them(data: FederatedData) -> None:
    left = without(data, [], [1])
    assert left.partition.sizes().tolist() == [50, 0, 50, 50]
    assert left.forgotten is not None
    assert left.forgotten.training.client(1).tolist() == data.client(1).tolist()
    assert left.validation.tolist() == data.validation.tolist()


def test_relearning_leaves_the_training_data_whole(data: FederatedData) -> None:
    left = without(data, [9], [], relearn=True)
    assert left.partition is data.partition
    assert left.forgotten is not None
    assert len(left.forgotten.training.indices) == 20


@pytest.mark.parametrize(
    ("classes", "clients", "said"),
    [
        ([], [4], r"there is no 4; the 4 clients are 0 to 3"),
        (list(range(10)), [], "no training data at all"),
        ([], [0, 1, 2, 3], "no training data at all"),
    ],
)
def test_mistakes(data: FederatedData, classes: list[int], clients: list[int], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check(data, classes, clients)


def test_a_class_that_nobody_has(data: FederatedData) -> None:
    left = without(data, [9], [])
    with pytest.raises(UserError, match=r"no client has samples of class 'nine'"):
        check(left, [9], [])
    assert len(without(left, [9], []).partition.indices) == len(
        left.partition.indices
    )  # one node may lack it


def test_forgotten_clients_are_not_asked_and_the_rest_is_measured_apart(tmp_path: Path) -> None:
    result = run(tiny("forget.clients=[1, 2]", "rounds=2"), tmp_path)
    assert {row["client"] for row in result.run.client_rows()} == {0, 3}
    row = result.run.history()[-1]
    assert row["retain_accuracy"] == row["accuracy"]
    task = build(tiny("forget.clients=[1, 2]"))
    task.load(messages.arrays_of(result.state()))
    measured = task.evaluate_training(np.sort(np.concatenate([load_data(tiny()).client(c) for c in (1, 2)])))
    assert row["forget_accuracy"] == pytest.approx(measured["accuracy"])


def test_forgotten_classes_are_measured_apart(tmp_path: Path) -> None:
    result = run(tiny("forget.classes=[3]", "rounds=4", "evaluation.validation=0.2"), tmp_path)
    row = result.run.history()[-1]
    assert row["forget_accuracy"] == 0.0  # nobody ever saw a three
    assert row["validation_forget_accuracy"] == 0.0
    share = (np.asarray(load_data(tiny()).arrays.test_y) == 3).mean()
    assert row["retain_accuracy"] * (1 - share) == pytest.approx(row["accuracy"])


def test_flowers_own_strategies_leave_them_out_too(tmp_path: Path) -> None:
    result = run(tiny("forget.clients=[0]", "rounds=1", strategy={"name": "flwr-fedavg"}), tmp_path)
    assert {row["client"] for row in result.run.client_rows()} == {1, 2, 3}


def test_a_split_seed_of_its_own_keeps_the_data_where_they_are() -> None:
    one, two = load_data(tiny("seed=0")), load_data(tiny("seed=5", "partition.seed=0"))
    assert one.partition.indices.tolist() == two.partition.indices.tolist()
    assert load_data(tiny("seed=5")).partition.indices.tolist() != one.partition.indices.tolist()


def test_frozen_backbones_have_features_of_what_is_forgotten(tmp_path: Path) -> None:
    head = {"tuning": {"name": "head"}, "model": {"name": "cnn", "width": 4}}
    cached = run(tiny("forget.classes=[3]", "rounds=1", "evaluation.validation=0.2", **head), tmp_path / "a")
    whole = run(
        tiny("forget.classes=[3]", "rounds=1", "evaluation.validation=0.2", "features.cache=false", **head),
        tmp_path / "b",
    )
    for key in ("forget_accuracy", "validation_forget_accuracy", "retain_accuracy"):
        assert cached.run.history()[-1][key] == pytest.approx(whole.run.history()[-1][key])
