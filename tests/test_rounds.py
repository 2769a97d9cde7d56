"""The round loop: resume with an equal digest, early stop, phases, evaluation on clients."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fedsim import config
from fedsim.errors import NotEnoughReplies, UserError
from fedsim.finish import resume, run_experiment
from fedsim.hooks import Hook, Round
from fedsim.rounds import lr_scale
from fedsim.runs import Run
from tests.helpers import StopAt, run, tiny

PERSONAL = {"payload": {"personal": ["head.*"]}}
CNN = {"model": {"name": "cnn", "width": 4}}
KINDS = {
    "fedavg": {},
    "fedavg, half of the clients": {"strategy": {"name": "fedavg", "fraction": 0.5}},
    "personal heads": PERSONAL,
    "BatchNorm": CNN,
    "cosine and FedProx": {
        "schedule": {"kind": "cosine", "warmup": 1},
        "client": {"lr": 0.1, "batch_size": 16, "proximal_mu": 0.1},
    },
    "Flower's FedAdam": {"strategy": {"name": "fedadam", "fraction_train": 0.5}},
    "Flower's FedAvgM": {"strategy": {"name": "fedavgm", "server_momentum": 0.9}},
    "checkpoint every second round": {"checkpoints": {"every": 2}},
}


@pytest.mark.parametrize("during", [False, True], ids=["between rounds", "inside a round"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_like_an_uninterrupted_one(kind: str, during: bool, tmp_path: Path) -> None:
    experiment = tiny("rounds=4", **KINDS[kind])
    whole = run(experiment, tmp_path / "whole")
    again = run(experiment, tmp_path / "again")
    assert whole.summary["digest"] == again.summary["digest"]
    with pytest.raises(KeyboardInterrupt):
        run(experiment, tmp_path / "cut", StopAt(3, during=during))
    folder = tmp_path / "cut" / "tiny"
    assert not Run.open(folder).finished
    result = resume(folder)
    for key in ("digest", "accuracy", "loss", "accuracy_start", "rounds", "bytes_up", "bytes_down"):
        assert result.summary[key] == whole.summary[key], key
    assert list(result.history.index) == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(result.history["accuracy"], whole.history["accuracy"])
    rows = [json.loads(line) for line in (folder / "clients.jsonl").read_text().splitlines()]
    assert len(rows) == len({(r["round"], r["client"], r["phase"]) for r in rows})


def test_killed_in_the_middle_of_a_round(tmp_path: Path) -> None:
    """kill -9, no handler runs; the resumed run has the digest of an uninterrupted one."""
    experiment = tiny("rounds=5")
    whole = run(experiment, tmp_path / "whole")
    (tmp_path / "slow.py").write_text(
        "import time, sys\n"
        "from pathlib import Path\n"
        "from fedsim.hooks import Hook\n"
        "from tests.helpers import run, tiny\n"
        "class Slow(Hook):\n"
        "    def reply(self, server_round, phase, client, message):\n"
        "        if server_round == 3 and client == 1:\n"
        "            Path(sys.argv[1], 'inside').touch()\n"
        "            time.sleep(60)\n"
        "run(tiny('rounds=5'), Path(sys.argv[1]) / 'cut', Slow())\n"
    )
    here = Path(__file__).resolve().parent.parent
    child = subprocess.Popen(
        [sys.executable, str(tmp_path / "slow.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(here)},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "inside").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait(10)
    assert (tmp_path / "inside").exists()
    result = resume(tmp_path / "cut" / "tiny")
    assert result.summary["digest"] == whole.summary["digest"]


def strict_rows(path: Path) -> list[dict[str, object]]:
    """JSON lines as a reader takes them that knows nothing of ours."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


class Notices(Hook):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def notice(self, text: str) -> None:
        self.texts.append(text)


def test_a_truncated_checkpoint_is_skipped_and_said(tmp_path: Path) -> None:
    experiment = tiny("rounds=4")
    whole = run(experiment, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(experiment, tmp_path / "cut", StopAt(3, during=True))
    folder = tmp_path / "cut" / "tiny"
    newest = Run.open(folder).checkpoints()[-1]
    newest.write_bytes(newest.read_bytes()[:-10])
    notices = Notices()
    assert resume(folder, [notices]).summary["digest"] == whole.summary["digest"]
    assert any("round-00002" in text and "trying the checkpoint before it" in text for text in notices.texts)


def test_a_checkpoint_of_another_experiment_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tiny(), tmp_path, StopAt(1))
    folder = tmp_path / "tiny"
    text = (folder / "experiment.toml").read_text()
    (folder / "experiment.toml").write_text(text.replace("lr = 0.1", "lr = 0.2"))
    with pytest.raises(UserError, match="belongs to another experiment"):
        resume(folder)


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tiny(), tmp_path, StopAt(1))
    with Run.open(tmp_path / "tiny").lock(), pytest.raises(UserError, match="in use"):
        resume(tmp_path / "tiny")


def test_a_name_that_is_taken_gets_a_suffix(tmp_path: Path) -> None:
    experiment = tiny("rounds=1")
    names = [Path(run(experiment, tmp_path).summary["run"]).name for _ in range(3)]
    assert names == ["tiny", "tiny-2", "tiny-3"]


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    result = run(tiny("rounds=1"), tmp_path)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "tiny").rglob("*") if p.is_file()}
    assert resume(tmp_path / "tiny").summary == result.summary
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "tiny").rglob("*") if p.is_file()}


def test_summary_and_bytes_are_counted_from_what_is_sent(tmp_path: Path) -> None:
    experiment = tiny("rounds=2", "partition.clients=3")
    result = run(experiment, tmp_path)
    size = sum(a.nbytes for a in result.state().values())
    assert result.summary["bytes_up"] == result.summary["bytes_down"] == 2 * 3 * size
    assert list(result.summary) == [
        "name", "strategy", "rounds", "clients", "accuracy", "loss", "accuracy_start",
        "bytes_up", "bytes_down", "seconds", "digest", "run",
    ]  # fmt: skip
    assert json.loads((tmp_path / "tiny" / "summary.json").read_text()) == result.summary
    assert list((tmp_path / "tiny" / "tensorboard").iterdir())


def test_early_stop_on_the_validation_split_returns_its_best_state(tmp_path: Path) -> None:
    experiment = tiny("rounds=30", "client.lr=2.0", "evaluation.validation=0.2", "evaluation.patience=2")
    result = run(experiment, tmp_path)
    history = result.history
    assert result.summary["rounds"] < 30
    best = int(history["validation_loss"].idxmin())
    assert result.summary["rounds"] == best + 2
    assert result.summary["accuracy"] == history["accuracy"][best]
    assert result.summary["accuracy"] != history["accuracy"].iloc[-1] or best == history.index[-1]


def test_patience_needs_a_validation_split(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluation\.validation = 0\.1"):
        run(tiny("evaluation.patience=2"), tmp_path)


def test_stock_fedavg_with_too_few_clients_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"min_available_nodes = 9 clients but there are 4; set strategy"):
        run(tiny(strategy={"name": "flwr-fedavg", "min_available_nodes": 9}), tmp_path)


def test_when_nobody_can_train_the_run_says_why_and_can_be_resumed(tmp_path: Path) -> None:
    experiment = tiny(client={"name": "tests.broken_client:make"})
    with pytest.raises(NotEnoughReplies, match="the battery is empty"):
        run(experiment, tmp_path)
    assert Run.open(tmp_path / "tiny").checkpoints()


@pytest.mark.parametrize("pattern", ["head.*", "*.bn?.*"], ids=["FedPer", "FedBN"])
def test_fedper_and_fedbn_are_two_lines(pattern: str, tmp_path: Path) -> None:
    """[payload] personal = [...]: those names never travel, differ between clients and survive a reload."""
    experiment = tiny(f'payload.personal=["{pattern}"]', "evaluation.split=local", **CNN)
    result = run(experiment, tmp_path)
    prefix = pattern.split("*", maxsplit=1)[0] or ".bn"
    assert result.state()
    assert not any(prefix in name for name in result.state())
    tree, _ = result.run.latest_checkpoint()
    assert tree is not None
    states = [tree["clients"][client]["personal"] for client in range(4)]
    assert all(prefix in name for name in states[0])
    name = next(n for n in states[0] if n.endswith("weight"))
    assert len({state[name].numpy().tobytes() for state in states}) == 4
    assert {"accuracy_spread", "accuracy_worst"} <= set(result.history.columns)


def test_local_only_sends_nothing_and_centralised_is_one_client(tmp_path: Path) -> None:
    alone = run(tiny(strategy={"name": "local-only"}), tmp_path / "a")
    assert alone.summary["bytes_up"] == alone.summary["bytes_down"] == 0
    assert alone.summary["accuracy"] > alone.summary["accuracy_start"]
    pooled = run(tiny(strategy={"name": "centralised"}), tmp_path / "b")
    assert pooled.summary["clients"] == 1
    rows = [json.loads(r) for r in (tmp_path / "b" / "tiny" / "clients.jsonl").read_text().splitlines()]
    assert {row["num-examples"] for row in rows} == {4 * 4 * 10}


def test_one_client_federated_equals_centralised(tmp_path: Path) -> None:
    one = run(tiny("partition.clients=1"), tmp_path / "a")
    pooled = run(tiny("partition.clients=1", strategy={"name": "centralised"}), tmp_path / "b")
    assert one.summary["digest"] == pooled.summary["digest"]


def test_schedules_are_functions_of_the_global_round() -> None:
    base = {"kind": "constant", "warmup": 0, "final": 0.0, "step_every": 2, "step_factor": 0.5}
    assert [lr_scale(base, r, 4) for r in (1, 4)] == [1.0, 1.0]
    cosine = [lr_scale({**base, "kind": "cosine"}, r, 4) for r in (1, 2, 3, 4)]
    assert cosine == pytest.approx([1.0, 0.5 * (1 + 2**-0.5), 0.5, 0.5 * (1 - 2**-0.5)])
    assert [lr_scale({**base, "kind": "linear", "final": 0.2}, r, 4) for r in (1, 3)] == pytest.approx(
        [1.0, 0.6]
    )
    assert [lr_scale({**base, "kind": "step"}, r, 6) for r in range(1, 7)] == [1, 1, 0.5, 0.5, 0.25, 0.25]
    assert [lr_scale({**base, "warmup": 3}, r, 9) for r in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]


def test_overwrite_replaces_a_run_only_once_the_new_one_is_there(tmp_path: Path) -> None:
    old = run(tiny("rounds=1"), tmp_path).summary
    with pytest.raises(ValueError, match="nothing yet"), Run.fresh(tiny(), tmp_path, overwrite=True):
        raise ValueError("nothing yet")
    assert Run.open(tmp_path / "tiny").summary() == old
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"]
    with Run.fresh(tiny("rounds=2"), tmp_path, overwrite=True) as made:
        new = run_experiment(tiny("rounds=2"), made).summary
    assert Run.open(tmp_path / "tiny").summary() == new
    assert new["rounds"] == 2
    assert not (tmp_path / "tiny" / ".replaced").exists()


def test_overwrite_never_deletes_what_is_no_run(tmp_path: Path) -> None:
    precious = tmp_path / "tiny" / "precious.txt"
    precious.parent.mkdir()
    precious.write_text("x")
    with pytest.raises(UserError, match="is no run folder"), Run.fresh(tiny(), tmp_path, overwrite=True):
        pass
    assert precious.exists()
    for name in (".", "..", ".hidden", "-x", "a/b", ""):
        with pytest.raises(UserError, match="must begin with a letter or digit"):
            tiny(f"name={json.dumps(name)}")


def test_a_run_that_fails_before_its_first_round_leaves_nothing(tmp_path: Path) -> None:
    experiment = tiny("partition.shots=5000")
    with pytest.raises(UserError, match="shots"), Run.fresh(experiment, tmp_path) as made:
        run_experiment(experiment, made)
    assert not list(tmp_path.iterdir())


def test_resuming_a_run_in_use_leaves_it_alone(tmp_path: Path) -> None:
    made = Run.create(tiny(), tmp_path)
    with made.lock(), pytest.raises(UserError, match="in use"):
        resume(made.folder)
    assert (made.folder / "experiment.toml").exists()


def test_a_run_is_resumed_from_anywhere_with_the_users_own_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "my_resumed_strategy.py").write_text(
        "from fedsim.averaging import WeightedAverage\nclass Mine(WeightedAverage):\n    'Mine.'\n"
    )
    (home / "mine.toml").write_text(
        'name = "mine"\nrounds = 2\n[model]\nname = "mlp"\n[strategy]\nname = "my_resumed_strategy:Mine"\n'
    )
    with pytest.raises(KeyboardInterrupt):
        run(config.load(home / "mine.toml"), tmp_path / "runs", StopAt(1))
    monkeypatch.delitem(sys.modules, "my_resumed_strategy")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(home)])
    monkeypatch.chdir(tmp_path)
    assert resume(tmp_path / "runs" / "mine").summary["rounds"] == 2


def test_baselines_do_not_inherit_the_size_of_the_federation(tmp_path: Path) -> None:
    experiment = tiny(
        "rounds=1",
        "strategy.min_clients=3",
        "strategy.min_replies=3",
        baselines=["centralised", "local-only"],
    )
    summary = run(experiment, tmp_path).summary
    assert {"accuracy_centralised", "accuracy_local_only"} <= set(summary)


def test_a_diverging_run_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(NotEnoughReplies, match=r"training diverges: lower client\.lr or set client\.clip"):
        run(tiny("client.lr=1e30", "rounds=5"), tmp_path)


def test_a_strategy_that_asks_nobody_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="asks no client to train"):
        run(tiny(strategy={"name": "flwr-fedavg", "fraction_train": 0.0}), tmp_path)


def save_points(path: Path, *, classes: int) -> None:
    x = np.random.default_rng(0).random((80, 4), np.float32)
    np.savez(path, x=x, y=np.arange(80) % classes)


def test_data_that_changed_are_noticed(tmp_path: Path) -> None:
    """A resume on other data is refused; a second run in the same process reads them anew."""
    path = tmp_path / "d.npz"
    experiment = tiny(data={"name": f"npz:{path}"}, partition={"name": "iid", "clients": 2})
    save_points(path, classes=2)
    with pytest.raises(KeyboardInterrupt):
        run(experiment, tmp_path, StopAt(1))
    first = run(experiment, tmp_path / "a").summary["digest"]
    save_points(path, classes=4)
    assert run(experiment, tmp_path / "b").summary["digest"] != first
    with pytest.raises(UserError, match="the data changed since"):
        resume(tmp_path / "tiny")


@pytest.mark.parametrize("strategy", ["fedavg", "flwr-fedavg"])
def test_clients_that_cannot_evaluate_are_named(strategy: str, tmp_path: Path) -> None:
    experiment = tiny(
        "evaluation.where=clients",
        strategy={"name": strategy},
        client={"name": "tests.noop_client:make"},  # it answers `train` alone
    )
    notices = Notices()
    with pytest.raises(NotEnoughReplies):
        run(experiment, tmp_path, notices)
    if strategy == "flwr-fedavg":
        assert "No evaluate function registered" in notices.texts[0]


def test_personal_states_have_a_digest_of_their_own(tmp_path: Path) -> None:
    one = run(tiny(strategy={"name": "local-only"}), tmp_path / "a").summary
    same = run(tiny(strategy={"name": "local-only"}), tmp_path / "b").summary
    other = run(tiny("client.lr=0.01", strategy={"name": "local-only"}), tmp_path / "c").summary
    assert one["digest"] == other["digest"]  # nothing is shared
    assert one["digest_personal"] == same["digest_personal"] != other["digest_personal"]


def test_odd_client_metrics_break_nothing(tmp_path: Path) -> None:
    result = run(tiny("rounds=1", client={"name": "tests.noop_client:odd"}), tmp_path)
    rows = strict_rows(tmp_path / "tiny" / "clients.jsonl") + strict_rows(tmp_path / "tiny" / "metrics.jsonl")
    assert [row["loss"] for row in rows[:4]] == ["NaN"] * 4  # a word: JSON has no such number
    assert {row["round"] for row in rows[:4]} == {1}
    assert np.isnan(result.history["train_loss"][1])
    assert result.history["train_loss_unmeasured"][1] == 4
    assert result.summary["not_finite"] == 1
    assert "train_lengths" not in result.history.columns


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(UserError, match="cannot make a run folder in"):
        Run.create(tiny(), tmp_path / "runs")


def test_a_run_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    made = Run.create(tiny(), tmp_path)
    (made.folder / ".lock").mkdir()  # what root, too, cannot open for writing
    with pytest.raises(UserError, match=r"tiny cannot be written \(Is a directory\); make it writable"):
        resume(made.folder)


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint of round 2 cannot be written: one line says so, and the run goes on from round 1."""

    class Fills(Hook):
        def round(self, result: Round) -> None:
            if result.number == 2:
                monkeypatch.setattr("os.fsync", full)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    whole = run(tiny(), tmp_path / "whole")
    with pytest.raises(UserError, match=r"disk is full .*fedsim resume .*tiny"):
        run(tiny(), tmp_path / "cut", Fills())
    monkeypatch.undo()
    again = resume(tmp_path / "cut" / "tiny")
    assert again.summary["digest"] == whole.summary["digest"]
    assert list(again.history.index) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("overrides", "fix"),
    [
        (["client.lr=1e4"], "lower client.lr = 10000.0"),
        (
            ["strategy.name=fedavgm", "strategy.server_learning_rate=1e4"],
            "lower client.lr = 0.1 or strategy.server_learning_rate = 10000.0",
        ),
    ],
)
def test_a_run_that_diverges_says_so_once_with_the_fix(
    overrides: list[str], fix: str, tmp_path: Path
) -> None:
    notices = Notices()
    result = run(tiny(*overrides, "rounds=4"), tmp_path, notices)
    assert result.summary["loss"] > 100
    (text,) = [text for text in notices.texts if "diverges" in text]
    assert text.endswith(f"before training): training diverges; {fix}")


def test_a_run_that_learns_is_not_said_to_diverge(tmp_path: Path) -> None:
    notices = Notices()
    run(tiny("evaluation.every=2"), tmp_path, notices)
    assert notices.texts == []
