"""LEACE on a finished run: an experiment of its own, which starts from the run's state."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from fedsim import config
from fedsim.cli import app
from fedsim.config import Experiment
from fedsim.errors import UserError
from fedsim.forgetting.attribute import erasing
from fedsim.runs import Run
from tests.helpers import run, tiny


def trained(folder: Path, *overrides: str) -> Run:
    """A finished run of plain averaging, that has never heard of attributes."""
    tables = {
        "data": {"name": "tinted-digits"},
        "partition": {"name": "iid", "clients": 3},
        "model": {"name": "cnn", "width": 8},
        "client": {"optimizer": "adamw", "lr": 0.003},
    }
    return run(tiny("rounds=2", *overrides, **tables), folder).run


def erased(run_: Run, **keys: int) -> Experiment:
    return config.from_tables(erasing(run_, ["tint"], **keys), source="erasing")


def test_a_run_loses_what_is_linear_and_nothing_else_moves(tmp_path: Path) -> None:
    old = trained(tmp_path)
    result = run(erased(old, head_rounds=0), tmp_path)
    assert result.run.folder.name == "tiny-without-tint"
    assert result.run.history()[0]["attack_linear_tint"] > 0.6
    assert abs(result.summary["attack_linear_tint"] - 0.5) < 3 * result.summary["attack_linear_tint_error"]
    assert result.summary["accuracy_start"] == old.summary()["accuracy"]
    state = result.state()
    assert np.abs(state["eraser.left"]).max() > 0
    from safetensors.numpy import load_file

    for name, values in load_file(old.folder / "state.safetensors").items():
        assert state[name].tobytes() == values.tobytes()


def test_what_is_erased_already_is_said(tmp_path: Path) -> None:
    result = run(erased(trained(tmp_path)), tmp_path)
    with pytest.raises(UserError, match="'tint' is what this run has unlearned already"):
        erasing(result.run, ["tint"])


def test_another_state_is_not_taken_for_the_runs(tmp_path: Path) -> None:
    old = trained(tmp_path)
    experiment = erased(old)
    save_file({"w": np.zeros(3, np.float32)}, old.folder / "state.safetensors")
    with pytest.raises(UserError, match="is not the state that this run is to begin with"):
        run(experiment, tmp_path)
    with pytest.raises(UserError, match=r"does not fit the model: .*missing"):
        run(experiment.replace('strategy.digest=""'), tmp_path)
    (old.folder / "state.safetensors").unlink()
    with pytest.raises(UserError, match="cannot read"):
        run(experiment, tmp_path)


def test_pooled_data_have_nobody_to_ask(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no federation to ask"):
        erasing(trained(tmp_path, "strategy.name=centralised"), ["tint"])


def test_the_command_erases_beside_the_run_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    old = trained(tmp_path)
    arguments = [
        "forget",
        str(old.folder),
        "--attribute",
        "tint",
        "--set",
        "strategy.audit_rounds=1",
        "--json",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    made = Run.open(tmp_path / "tiny-without-tint")
    summary = json.loads(result.stdout.splitlines()[-1])
    assert summary == made.summary()
    assert summary["rounds"] == 4  # moments, head, moments of what is released, audit
    assert abs(summary["attack_linear_tint"] - 0.5) < 3 * summary["attack_linear_tint_error"]
    assert "attack linear tint" in result.output
    again = CliRunner().invoke(app, arguments)
    assert json.loads(again.stdout.splitlines()[-1]) == summary
    other = CliRunner().invoke(app, [*arguments, "--set", "client.lr=0.5"])
    assert other.exit_code == 2
    assert "is another run; give this one its own --name" in other.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--attribute", "colour"], "the data have no attribute 'colour'"),
        (
            ["--attribute", "tint", "--class", "9"],
            "--class 9 and --attribute tint: one request forgets one kind; choose one",
        ),
        (["--attribute", "tint", "--method", "prune"], "attributes are erased by LEACE"),
        (["--attribute", "tint", "--relearn", "2"], "--relearn is for classes and clients"),
        (
            ["--attribute", "tint", "--set", "detacher.cut=8"],
            "cut = 8, but the backbone of model 'cnn' has 3",
        ),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["forget", str(trained(tmp_path).folder), *arguments])
    assert result.exit_code == 2
    assert message in result.output
    assert [place.name for place in tmp_path.iterdir()] == ["tiny"]
