"""Rounds that are added later: the run becomes one that had as many from the start, or nothing changes."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedsim.averaging import WeightedAverage
from fedsim.checkpoints import load, save
from fedsim.cli import app
from fedsim.config import Experiment
from fedsim.errors import UserError
from fedsim.extending import extend
from fedsim.finish import resume
from fedsim.runs import Run
from fedsim.sweep import Sweep
from tests.helpers import StopAt, run, tiny


def figures(found: Run) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    """Everything that a run folder says of its training, less the clock and its place."""
    rows = [{k: v for k, v in row.items() if "seconds" not in k} for row in found.history()]
    summary = {key: value for key, value in found.summary().items() if key not in ("seconds", "run")}
    return summary, rows, (found.folder / "experiment.toml").read_text()


def continued(short: Experiment, folder: Path, rounds: int, cut: int | None) -> Run:
    """A run of few rounds, finished or interrupted in round `cut`, that goes on to more."""
    if cut is None:
        run(short, folder)
    else:
        with pytest.raises(KeyboardInterrupt):
            run(short, folder, StopAt(cut, during=True))
    found = Run.open(folder / short.name)
    notes = [f"baselines (local-only) run anew, with {rounds} rounds"] if short.baselines else []
    assert extend(found, rounds) == notes
    return resume(found.folder).run


@pytest.mark.parametrize("cut", [None, 2])
@pytest.mark.parametrize(
    "overrides",
    [
        ["baselines=['local-only']"],
        ["strategy.name=fedadam", "strategy.fraction_train=0.5"],
        ["payload.personal=['head.*']", "schedule.kind=step", "schedule.step_every=2", "schedule.warmup=1"],
    ],
)
def test_rounds_that_are_added_are_those_of_a_longer_run(
    overrides: list[str], cut: int | None, tmp_path: Path
) -> None:
    long = run(tiny(*overrides, "rounds=5"), tmp_path / "long").run
    short = continued(tiny(*overrides, "rounds=3"), tmp_path / "short", 5, cut)
    assert figures(short) == figures(long)
    keys = ("round", "client", "phase")
    clients = [[[row[key] for key in keys] for row in one.client_rows()] for one in (short, long)]
    assert clients[0] == clients[1]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("keys", [["schedule.kind=cosine"], ["schedule.kind=linear", "schedule.final=0.5"]])
def test_a_schedule_over_all_rounds_is_refused_and_nothing_changed(keys: list[str], tmp_path: Path) -> None:
    found = run(tiny("rounds=2", *keys), tmp_path).run
    before = contents(found.folder)
    kind = keys[0].partition("=")[2]
    expected = rf'\[schedule\] kind = "{kind}" spreads over all 2 rounds.*start anew: fedsim run .*rounds=4$'
    with pytest.raises(UserError, match=expected):
        extend(found, 4)
    assert contents(found.folder) == before


@pytest.mark.parametrize("key", ["schedule.warmup=2", "schedule.final=1.0"])
def test_a_schedule_whose_rates_are_the_same_is_fine(key: str, tmp_path: Path) -> None:
    """A cosine that is still warming up, and one that never comes down."""
    keys = ["schedule.kind=cosine", key]
    long = run(tiny(*keys, "rounds=5"), tmp_path / "long").run
    assert figures(continued(tiny(*keys, "rounds=3"), tmp_path / "short", 5, 2)) == figures(long)


def test_what_cannot_be_longer_is_refused(tmp_path: Path) -> None:
    whole = run(tiny("rounds=3", "baselines=['local-only']"), tmp_path).run
    before = contents(whole.folder)
    with pytest.raises(UserError, match=r"is a run of 3 rounds: --rounds 2 cannot take some back.*rounds=2$"):
        extend(whole, 2)
    with pytest.raises(UserError, match=r"is a baseline of .*tiny: add the rounds to that run"):
        extend(Run.open(whole.folder / "baselines" / "local-only"), 4)
    assert extend(whole, 3) == []
    assert contents(whole.folder) == before
    nodes = contents(whole.folder)[whole.folder / "origin.json"]
    whole.made_on_nodes()
    before = contents(whole.folder)
    with pytest.raises(
        UserError, match=r"was made on nodes.*fedsim resume --rounds would train on the data of"
    ):
        extend(whole, 4)
    assert contents(whole.folder) == before
    (whole.folder / "origin.json").write_bytes(nodes)
    (whole.folder / "lineage.json").write_text("{}")
    with pytest.raises(UserError, match=r"tiny is the result of forgetting, which is compared by its rounds"):
        extend(whole, 4)
    (whole.folder / "lineage.json").unlink()
    for file in whole.checkpoints():
        tree = load(file)
        del tree["rounds"]
        save(file, tree)
    with pytest.raises(UserError, match="only has a checkpoint of an older fedsim"):
        extend(whole, 4)
    for file in whole.checkpoints():
        file.unlink()
    with pytest.raises(UserError, match="has no checkpoint that can be read"):
        extend(whole, 4)
    assert whole.finished


def test_a_run_that_ended_by_itself_is_refused(tmp_path: Path) -> None:
    keys = ["rounds=9", "evaluation.validation=0.2", "evaluation.patience=1", "client.lr=3.0"]
    found = run(tiny(*keys), tmp_path).run
    done = found.summary()["rounds"]
    assert done < 9
    with pytest.raises(UserError, match=f"ended by itself after round {done} of 9"):
        extend(found, 12)


def test_a_strategy_that_counts_its_rounds_is_refused(tmp_path: Path) -> None:
    found = run(tiny("rounds=2", "strategy.name=tests.test_extending:Counting"), tmp_path).run
    with pytest.raises(UserError, match=r"what strategy .* does in a round depends"):
        extend(found, 3)


class Counting(WeightedAverage):
    """Says that its rounds depend on their number."""

    counts_rounds = True


def test_a_last_round_that_was_measured_out_of_turn_is_said(tmp_path: Path) -> None:
    found = run(tiny("rounds=3", "evaluation.every=2"), tmp_path).run
    (note,) = extend(found, 4)
    assert note.startswith("round 3 was the last and so was measured")
    assert resume(found.folder).summary["rounds"] == 4


def test_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_client.py").write_text("from clients.training import make\n")
    (tmp_path / "tiny.toml").write_text(tiny("rounds=1", "name=mine").toml())

    def fedsim(*arguments: str) -> Any:
        return CliRunner().invoke(app, arguments)

    assert fedsim("run", "tiny.toml", "--set", "client.name=own_client:make").exit_code == 0
    result = fedsim("resume", "mine", "--rounds", "2", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["rounds"] == 2
    assert "going on after round 1" in result.stderr
    assert "next        fedsim run runs/mine/experiment.toml --set seed=1" in result.stderr.splitlines()
    # what is suggested works elsewhere, too: the module is found beside the first experiment's file
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(tmp_path)])
    again = fedsim("run", "../runs/mine/experiment.toml", "--set", "seed=1", "--json")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["rounds"] == 2


def test_a_cell_keeps_the_rounds_of_its_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Sweep.open(tiny("rounds=1"), {"seed": [0]}, parent=tmp_path).run(lambda cell: nullcontext(()))
    result = CliRunner().invoke(app, ["resume", "tiny-sweep/cells/seed-0", "--rounds", "5"])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: tiny-sweep/cells/seed-0 is a cell of a sweep")
    assert Run.open(tmp_path / "tiny-sweep" / "cells" / "seed-0").summary()["rounds"] == 1
