"""Unlearning end to end on digits: masks hold, phases resume, everyone is scored, mistakes are named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord
from safetensors.numpy import load_file

from fedsim import checkpoints, config, messages
from fedsim.building import build, load_data
from fedsim.config import Experiment
from fedsim.errors import UserError
from fedsim.finish import Result, resume
from fedsim.hooks import Hook
from fedsim.rounds import lr_scale
from strategies.federaser import FedEraser
from strategies.unlearn import Unlearn
from tests.helpers import StopAt, run, tiny
from tests.test_wire import on_foreign_grid

BASE: dict[str, Any] = {
    "model": {"name": "cnn", "width": 8},
    "client": {"lr": 0.1, "batch_size": 16, "momentum": 0.9, "weight_decay": 0.01, "epochs": 2.0},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run(tiny("rounds=4", "partition.shots=8", **BASE), tmp_path_factory.mktemp("trained"))


def unlearn(
    trained: Result, *overrides: str, edit: dict[str, Any] | None = None, **strategy: Any
) -> Experiment:
    document = trained.run.experiment().document()
    mine = {
        "name": "unlearn",
        "origin": str(trained.run.folder / "state.safetensors"),
        "digest": trained.summary["digest"],
        "targets": [9],
        "edit": edit or {"name": "prune", "ratio": 0.2},
        "recover": document["strategy"],
        **strategy,
    }
    document |= {
        "name": "forgets",
        "rounds": 3,
        "forget": {"classes": [9]},
        "strategy": mine,
        "client": {"name": "unlearn", "base": document["client"]},
    }
    return config.from_tables(document, source="test", overrides=overrides)


class Replies(Hook):
    """Keeps all replies."""

    def __init__(self) -> None:
        self.found: list[tuple[int, int, Any]] = []

    def reply(self, server_round: int, phase: str, client: int, message: Any) -> None:
        self.found.append((server_round, client, message))

    def of(self, server_round: int) -> Iterator[Any]:
        return (message for number, _, message in self.found if number == server_round)


def _pruned(result: Result) -> dict[str, np.ndarray]:
    tree, _ = result.run.latest_checkpoint()
    assert tree is not None
    found: dict[str, np.ndarray] = tree["strategy"]["pruned"]
    return found


def test_masked_weights_are_exactly_0_after_recovery(trained: Result, tmp_path: Path) -> None:
    """With momentum and weight decay, in the result and in every client's reply."""
    replies = Replies()
    result = run(unlearn(trained), tmp_path, replies)
    pruned = _pruned(result)
    assert {name: int(mask.sum()) for name, mask in pruned.items()} == {
        "backbone.block1.conv1": 2, "backbone.block1.conv2": 2,
        "backbone.block2.conv1": 3, "backbone.block2.conv2": 3,
    }  # fmt: skip
    states = [message.content["arrays"] for message in replies.of(3)]
    assert len(states) == 4
    for state in [*map(messages.views_of, states), result.state()]:
        for name, mask in pruned.items():
            norm = name.replace("conv", "bn")
            assert (state[f"{name}.weight"][mask] == 0).all()
            assert (state[f"{name}.weight"][~mask] != 0).all()
            for key, value in (("weight", 0), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
                assert (state[f"{norm}.{key}"][mask] == value).all()
                assert (state[f"{norm}.{key}"][~mask] != value).all()


def test_statistics_are_small_and_one_pass(trained: Result, tmp_path: Path) -> None:
    replies = Replies()
    run(unlearn(trained, "rounds=1"), tmp_path, replies)
    sent = [messages.nbytes(message.content) for message in replies.of(1)]
    assert sent == [10 * (8 + 8 + 16 + 16) * 4 + 10 * 8] * 4
    said = [message.content["metrics"] for message in replies.of(1)]
    assert [row["samples"] for row in said] == [80] * 4  # all that they have, the class too


def test_statistics_of_a_resnet20_are_28_kilobytes(tmp_path: Path) -> None:
    plain = {"model": {"name": "resnet20"}, "partition": {"name": "iid", "clients": 2, "shots": 2}}
    trained = run(tiny("rounds=1", **plain), tmp_path)
    replies = Replies()
    edit = {"name": "prune", "ratio": 0.2, "min_count": 1}
    run(unlearn(trained, "rounds=1", edit=edit), tmp_path, replies)
    assert [messages.nbytes(message.content) for message in replies.of(1)] == [688 * 10 * 4 + 80] * 2


def test_clients_with_nothing_but_the_class_are_scored_and_not_trained(tmp_path: Path) -> None:
    skewed = {"partition": {"name": "pathological", "clients": 5, "classes_per_client": 2, "overlap": False}}
    trained = run(tiny("rounds=2", **BASE, **skewed), tmp_path)
    counts = [set(np.flatnonzero(row)) for row in _class_counts(trained)]
    classes = sorted(counts[0])
    experiment = unlearn(
        trained, f"forget.classes={list(map(int, classes))}", targets=list(map(int, classes))
    )
    replies = Replies()
    result = run(experiment, tmp_path / "b", replies)
    asked = {number: sorted(c for n, c, _ in replies.found if n == number) for number in (1, 2, 3)}
    assert asked == {1: [0, 1, 2, 3, 4], 2: [0, 1, 2, 3, 4], 3: [1, 2, 3, 4]}
    assert result.run.history()[2]["train_pruned_channels"] > result.run.history()[1]["train_pruned_channels"]


def _class_counts(trained: Result) -> np.ndarray:
    return load_data(trained.run.experiment()).class_counts()


def test_a_model_whose_channels_do_not_travel_has_no_prunable_layer(tmp_path: Path) -> None:
    frozen = run(tiny("rounds=1", **{**BASE, "tuning": {"name": "head"}}), tmp_path)
    with pytest.raises(UserError, match="no prunable layer"):
        run(unlearn(frozen), tmp_path)


@pytest.mark.parametrize("stop", [1, 2])
@pytest.mark.parametrize("during", [False, True])
def test_interrupted_in_any_phase_it_goes_on(
    trained: Result, tmp_path: Path, stop: int, during: bool
) -> None:
    whole = run(unlearn(trained), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(unlearn(trained), tmp_path / "cut", StopAt(stop, during=during))
    assert resume(tmp_path / "cut" / "forgets").summary["digest"] == whole.summary["digest"]


def test_ray_and_a_foreign_grid_give_the_same(trained: Result, tmp_path: Path) -> None:
    experiment = unlearn(trained, "rounds=2", "forget.clients=[1]")
    ours = run(experiment, tmp_path / "serial").summary
    theirs, _ = on_foreign_grid(experiment, tmp_path / "foreign")
    parallel = run(experiment.replace("engine.name=ray", "engine.workers=2"), tmp_path / "ray").summary
    assert ours["digest"] == theirs["digest"] == parallel["digest"]


def test_flowers_strategies_recover_too_and_go_on_with_their_state(trained: Result, tmp_path: Path) -> None:
    recover = {"name": "fedavgm", "server_momentum": 0.9}
    whole = run(unlearn(trained, recover=recover), tmp_path / "whole")
    plain = run(unlearn(trained), tmp_path / "plain")
    with pytest.raises(KeyboardInterrupt):
        run(unlearn(trained, recover=recover), tmp_path / "cut", StopAt(2))
    assert resume(tmp_path / "cut" / "forgets").summary["digest"] == whole.summary["digest"]
    assert plain.summary["digest"] != whole.summary["digest"]
    state = whole.state()
    assert all((state[f"{name}.weight"][mask] == 0).all() for name, mask in _pruned(whole).items())


def test_noise_on_the_sums_moves_the_choice(trained: Result, tmp_path: Path) -> None:
    chosen = [
        {
            name: mask.tolist()
            for name, mask in _pruned(run(unlearn(trained, "rounds=1", edit=edit), tmp_path)).items()
        }
        for edit in (
            {"name": "prune", "ratio": 0.2, "clip": 1e6},
            {"name": "prune", "ratio": 0.2},
            {"name": "prune", "ratio": 0.2, "clip": 1.0, "noise": 100.0},
        )
    ]
    assert chosen[0] == chosen[1] != chosen[2]


def test_edits_of_the_server_alone_ask_nobody(trained: Result, tmp_path: Path) -> None:
    result = run(unlearn(trained, "rounds=2", edit={"name": "not"}), tmp_path)
    rows = result.run.history()
    assert rows[1]["clients"] == 0
    assert rows[1]["bytes_up"] == 0
    before = load_file(trained.run.folder / "state.safetensors")
    masked = run(unlearn(trained, "rounds=1", edit={"name": "head-mask"}), tmp_path / "h")
    assert masked.run.history()[1]["forget_accuracy"] == 0
    state = masked.state()
    assert all((state[name] == value).all() for name, value in before.items() if not name.startswith("head."))


def test_the_leaving_client_climbs_alone(trained: Result, tmp_path: Path) -> None:
    replies = Replies()
    experiment = unlearn(
        trained,
        "rounds=2",
        edit={"name": "pga", "lr": 0.05, "epochs": 2.0, "far": 1e9, "shares": [0.25]},
        kind="client",
        targets=[2],
    ).document()
    experiment["forget"] = {"clients": [2]}
    result = run(config.from_tables(experiment, source="test"), tmp_path, replies)
    assert [client for number, client, _ in replies.found if number == 1] == [2]
    assert sorted(client for number, client, _ in replies.found if number == 2) == [0, 1, 3]
    rows = result.run.history()
    assert rows[1]["forget_accuracy"] < rows[0]["forget_accuracy"]


def test_the_end_is_sustained_forgetting_with_accuracy_back() -> None:
    strategy = Unlearn(edit={"name": "none"}, patience=2, tolerance=0.05, forgotten=0.1)
    evaluations = [(0.9, 1.0), (0.9, 0.0), (0.9, 0.3), (0.9, 0.0), (0.8, 0.0), (0.86, 0.05), (0.9, 0.1)]
    done = []
    for retained, gone in evaluations:
        strategy.observe({"validation_accuracy": retained, "validation_forget_accuracy": gone})
        done.append(strategy.done())
    assert done == [False] * 6 + [True]  # a rebound and a dip each began the count anew
    blind = Unlearn(edit={"name": "none"}, patience=1)
    blind.observe({"accuracy": 1.0, "forget_accuracy": 0.0})
    blind.observe({"accuracy": 1.0, "forget_accuracy": 0.0})
    assert not blind.done()  # the test set ends nothing


def test_targets_are_written_as_classes_are_named_everywhere(trained: Result) -> None:
    task = build(unlearn(trained))
    strategy = Unlearn(targets=["index:3", "nine", 9], edit={"name": "prune"})
    strategy.begin(task)
    assert strategy._place().targets == [3, 9]
    assert strategy._edit.rounds(strategy.targets) == 2
    with pytest.raises(UserError, match=r"\[strategy\] targets ten: there is no such class"):
        Unlearn(targets=["ten"]).begin(task)
    with pytest.raises(UserError, match="'nine' is no client"):
        Unlearn(kind="client", targets=["nine"])


def test_recovery_has_the_schedule_to_itself(trained: Result, tmp_path: Path) -> None:
    """A cosine over the recovery rounds, whatever the edit took before."""
    scales: list[float] = []
    whole = run(unlearn(trained, "rounds=4", "schedule.kind=cosine"), tmp_path / "a")
    direct = run(unlearn(trained, "rounds=4", "schedule.kind=constant"), tmp_path / "b")
    assert whole.summary["digest"] != direct.summary["digest"]

    strategy = Unlearn(targets=[9], edit={"name": "prune"})
    strategy.begin(build(unlearn(trained, "rounds=4", "schedule.kind=cosine")))
    for number in (2, 3, 4):
        record = ConfigRecord({})
        strategy._scale(number, record)
        scales.append(float(record[messages.LR_SCALE]))  # type: ignore[arg-type]
    cosine = {"kind": "cosine", "warmup": 0, "final": 0.0}
    assert scales == [lr_scale(cosine, n, 3) for n in (1, 2, 3)]


@pytest.mark.parametrize(
    ("strategy", "overrides", "said"),
    [
        ({"edit": {"name": "prune", "ratio": 1.5}}, [], r"\[strategy.edit\] ratio: .* less than 1"),
        ({"edit": {"name": "prune", "ratio": 0.97, "direction": "lowest"}}, [], "leaves layer .backbone"),
        ({"edit": {"name": "prune", "ration": 0.1}}, [], "unknown key 'ration': did you mean 'ratio'"),
        ({"edit": {"name": "prun"}}, [], "unknown name 'prun' in edits: did you mean 'prune'"),
        ({"edit": {"name": "prune", "noise": 1.0}}, [], "set edit.clip above 0"),
        ({"edit": {"name": "prune", "idf": "mine"}}, [], r"\[strategy.edit\] idf"),
        ({"recover": {"name": "fedavgg"}}, [], "did you mean"),
        ({"recover": {"name": "fedavg", "fractoin": 0.5}}, [], "did you mean 'fraction'"),
        ({"origin": "nowhere.safetensors"}, [], "there is no 'nowhere.safetensors'"),
        ({"digest": "0" * 64}, [], "not the state that this run began with"),
        ({}, ["model.width=4"], "does not fit the model"),
        ({}, ["tuning.name=head"], "does not fit the model"),
        ({}, ['payload.personal=["head.*"]'], "stay with the clients"),
        ({"edit": {"name": "prune", "min_count": 500}}, [], "fewer than edit.min_count = 500"),
    ],
)  # fmt: skip
def test_mistakes(
    trained: Result, tmp_path: Path, strategy: dict[str, Any], overrides: list[str], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        run(unlearn(trained, *overrides, **strategy), tmp_path)


# -------------------------------------------------------------------------------------- FedEraser


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Result:
    experiment = tiny("rounds=3", "checkpoints.record_updates=true", "partition.shots=8", **BASE)
    return run(experiment, tmp_path_factory.mktemp("recorded"))


def test_recorded_updates_add_up_to_the_run(recorded: Result, trained: Result) -> None:
    folder = recorded.run.folder / "updates"
    state = messages.views_of(checkpoints.load(folder / "start.safetensors")["arrays"])
    for path in recorded.run.updates():
        rows = checkpoints.load(path)["clients"]
        assert sorted(rows) == [0, 1, 2, 3]
        total = sum(row["examples"] for row in rows.values())
        for name in rows[0]["update"]:
            mean = sum(row["update"][name] * (row["examples"] / total) for row in rows.values())
            state[name] = state[name] + mean
    final = recorded.state()
    for name, values in state.items():
        if values.dtype.kind == "f":
            np.testing.assert_allclose(values, final[name], atol=1e-5)


def test_recording_changes_nothing(recorded: Result, tmp_path: Path) -> None:
    plain = run(tiny("rounds=3", "partition.shots=8", **BASE), tmp_path)
    assert plain.summary["digest"] == recorded.summary["digest"]
    assert not plain.run.updates()


def _erasing(recorded: Result, **strategy: Any) -> Experiment:
    document = recorded.run.experiment().document()
    folder = str(recorded.run.folder / "updates")
    document |= {
        "name": "erased",
        "forget": {"clients": [3]},
        "strategy": {"name": "federaser", "updates": folder, "targets": [3], **strategy},
    }
    document["client"]["epochs"] = 2.0  # not fewer: three rounds are few
    return config.from_tables(document, source="test")


def test_erasing_replays_lengths_of_the_record_in_new_directions(recorded: Result, tmp_path: Path) -> None:
    replies = Replies()
    result = run(_erasing(recorded), tmp_path, replies)
    assert {client for _, client, _ in replies.found} == {0, 1, 2}
    assert {number for number, _, _ in replies.found} == {2, 3}  # the first round asks nobody
    strategy = FedEraser(str(recorded.run.folder / "updates"), [3])
    rows = checkpoints.load(recorded.run.updates()[1])["clients"]
    name = "head.weight"
    strategy._trained = frozenset([name])
    now = np.full_like(rows[0]["update"][name], 7.0)
    scaled = strategy._scaled(name, now, rows[0]["update"][name])
    assert np.linalg.norm(scaled) == pytest.approx(np.linalg.norm(rows[0]["update"][name]), rel=1e-5)
    assert np.unique(scaled).size == 1
    assert result.summary["accuracy"] > 0.7


def test_erasing_needs_a_record(tmp_path: Path, recorded: Result) -> None:
    with pytest.raises(UserError, match="holds no recorded updates"):
        run(_erasing(recorded, updates=str(tmp_path)), tmp_path)
