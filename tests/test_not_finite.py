"""NaN and infinity from a client's figure to every ending: files, tables, pictures, displays, resume."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from fedsim.cli import app
from fedsim.compare import comparison, draw_curves
from fedsim.evaluation import over_clients
from fedsim.finish import resume
from fedsim.forgetting.report import markdown, terminal_table
from fedsim.forgetting.verdict import judged, sentence
from fedsim.hooks import Round
from fedsim.progress import LiveHook, round_line
from fedsim.runs import Run
from fedsim.sweep_table import table_of
from fedsim.terminal import closing_table, spread
from fedsim.unlearning import membership, metrics
from tests.helpers import run, tiny
from tests.test_rounds import Notices, strict_rows


def shown(thing: Any) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(thing)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def saying(client: int, key: str, value: float, *overrides: str) -> Any:
    """An experiment whose clients evaluate, one of which says something of its own."""
    own = {"name": "tests.noop_client:says", "client": client, "key": key, "value": value}
    return tiny("rounds=2", "evaluation.where=clients", *overrides, client=own)


@pytest.mark.parametrize("strategy", ["fedavg", "flwr-fedavg"])
@pytest.mark.parametrize(("key", "value"), [("accuracy", math.nan), ("loss", math.inf)])
def test_one_clients_figure_is_left_out_counted_and_named(
    key: str, value: float, strategy: str, tmp_path: Path
) -> None:
    notices = Notices()
    result = run(saying(2, key, value, f"strategy.name={strategy}"), tmp_path, notices)
    means = {"accuracy": np.mean([0.5, 0.6, 0.8]), "loss": np.mean([1.0, 2.0, 4.0])}
    assert result.summary[key] == pytest.approx(means[key])
    assert result.summary[f"{key}_unmeasured"] == 1
    assert result.summary[f"{key}_worst"] == {"accuracy": 0.5, "loss": 4.0}[key]
    assert notices.texts == [f"round 0: client 2 left out of the mean: {key} is {value}"]  # once, not 3 times
    if key == "accuracy":
        assert "1 client not measured" in shown(closing_table(result.summary, []))
    rows = strict_rows(tmp_path / "tiny" / "clients.jsonl")
    assert {row[key] for row in rows if row["client"] == 2 and row["phase"] == "evaluate"} == {
        {"accuracy": "NaN", "loss": "Infinity"}[key]
    }


@pytest.fixture(scope="module")
def diverged(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run that ends with a NaN loss and accuracy: nobody could be measured."""
    folder = tmp_path_factory.mktemp("runs")
    return run(saying(0, "loss", math.nan, "partition.clients=1", "name=diverged"), folder).run


def test_a_run_of_nan_ends_and_can_be_read_again(diverged: Run) -> None:
    summary = diverged.summary()
    assert math.isnan(summary["loss"])
    assert summary["not_finite"] == 9  # mean, spread and worst in three rounds
    assert math.isnan(diverged.history()[-1]["loss"])
    again = resume(diverged.folder).summary
    assert math.isnan(again["loss"])
    assert again["digest"] == summary["digest"]
    strict_rows(diverged.folder / "metrics.jsonl")
    whole = json.loads((diverged.folder / "summary.json").read_text(), parse_constant=lambda word: 1 / 0)
    assert whole["loss"] == "NaN"


def test_commands_on_a_run_of_nan_end_well(
    diverged: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = run(tiny("rounds=1"), tmp_path).run
    monkeypatch.setenv("FEDSIM_RUNS", str(tmp_path))
    resumed = CliRunner().invoke(app, ["resume", str(diverged.folder), "--json"])
    assert resumed.exit_code == 0, resumed.output
    last = resumed.stdout.splitlines()[-1]
    assert json.loads(last, parse_constant=lambda word: 1 / 0)["loss"] == "NaN"
    assert "not finite" in resumed.output
    picture = tmp_path / "a.png"
    compared = CliRunner().invoke(
        app, ["compare", str(good.folder), str(diverged.folder), "--plot", str(picture)]
    )
    assert compared.exit_code == 0, compared.output
    assert "nan" in compared.output
    assert picture.stat().st_size > 1000


def test_curves_with_gaps_are_drawn_and_compared(tmp_path: Path) -> None:
    """NaN in the middle; the scale is that of the finite values."""
    one = run(
        tiny("name=one"),
        tmp_path,
    ).run
    rows = [json.loads(line) for line in (one.folder / "metrics.jsonl").read_text().splitlines()]
    rows[1]["accuracy"], rows[2]["accuracy"] = "NaN", "-Infinity"
    (one.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = shown(comparison([one, one]))
    low, high = sorted([rows[0]["accuracy"], rows[3]["accuracy"]])
    assert f"from {low:.3f} to {high:.3f}" in text
    assert "××" in text
    draw_curves([one], tmp_path / "a.png")


def test_runs_of_earlier_versions_have_null(tmp_path: Path) -> None:
    one = run(tiny("rounds=1"), tmp_path).run
    for name in ("summary.json", "metrics.jsonl"):
        text = (one.folder / name).read_text()
        value = json.loads(text.splitlines()[-1] if name == "metrics.jsonl" else text)["loss"]
        (one.folder / name).write_text(text.replace(f'"loss": {value}', '"loss": null'))
    assert math.isnan(one.summary()["loss"])
    assert math.isnan(one.history()[-1]["loss"])
    assert "nan" in shown(closing_table(one.summary(), one.history()))
    assert "nan" in shown(comparison([one, one]))


def test_tensorboard_has_what_there_was(diverged: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(diverged.folder / "tensorboard"))
    events.Reload()
    assert [math.isnan(event.value) for event in events.Scalars("loss")] == [True] * 3
    assert [event.value for event in events.Scalars("accuracy")] == [0.5] * 3


def test_a_validation_loss_of_nan_is_never_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN rounds count as no progress; the best state is that of the best finite round."""
    losses = iter([2.0, math.nan, 1.0, math.nan, math.nan, 0.5])

    def measured(task: Any) -> dict[str, float]:
        return {"accuracy": 0.5, "loss": 1.0, "validation_loss": next(losses)}

    monkeypatch.setattr("fedsim.rounds.server_metrics", measured)
    result = run(tiny("rounds=9", "evaluation.validation=0.1", "evaluation.patience=2"), tmp_path)
    assert result.summary["rounds"] == 4  # 2.0, nan, 1.0, nan, nan: two in a row
    from fedsim.checkpoints import load

    assert load(result.run.folder / "checkpoints" / "best.safetensors")["round"] == 2


def test_without_any_validation_loss_the_last_state_is_the_result_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = {"accuracy": 0.5, "loss": 1.0, "validation_loss": math.nan}
    monkeypatch.setattr("fedsim.rounds.server_metrics", lambda task: dict(nothing))
    notices = Notices()
    given = tiny("rounds=9", "evaluation.validation=0.1", "evaluation.patience=2")
    result = run(given, tmp_path, notices)
    assert result.summary["rounds"] == 1
    assert [text for text in notices.texts if "no round has a finite validation loss" in text]


def test_displays_show_nan() -> None:
    line = round_line(Round(3, accuracy=math.nan, loss=math.inf, clients=4), 3)
    assert "accuracy nan  loss inf" in line
    console = Console(file=io.StringIO(), width=80)
    live = LiveHook(console, tiny())
    live.start(tiny(), 0)
    for value in (0.1, math.nan, math.inf, 0.3):
        live.round(Round(1, accuracy=value, loss=value))
    text = shown(live.__rich__())
    assert text.count("▁××█") == 2


def test_tables_of_sweeps_leave_nan_out_and_count_it() -> None:
    assert spread([0.5, 0.7]) == "0.600 ± 0.141"
    assert spread([0.5, math.nan, 0.7, math.inf, math.nan]) == "0.600 ± 0.141 (2 nan, 1 inf)"
    assert spread([0.5, math.nan]) == "0.500 (1 nan)"
    assert spread([math.nan]) == "nan"
    assert spread(["NaN", None, "Infinity"]) == "(2 nan, 1 inf)"
    assert spread([]) == ""
    cell = {"accuracy_start": 0.1, "bytes_up": 10, "seconds": 1.0}
    results = [
        {"cell": {"seed": seed}, "summary": {**cell, "accuracy": value, "accuracy_unmeasured": 2}}
        for seed, value in enumerate([0.5, "NaN", 0.7])
    ]
    head, _, row = table_of(results).splitlines()
    columns = dict(zip(head.split(" | "), row.split(" | "), strict=True))
    assert columns["accuracy"] == "0.600 ± 0.141 (1 nan)"
    assert columns["unmeasured"] == "2 ± 0.0"


def test_a_model_of_nan_has_forgotten_nothing() -> None:
    """A broken model is outside every floor; its report is made all the same."""
    nan = np.full((12, 3), np.nan)
    fine = np.random.default_rng(0).dirichlet(np.ones(3), 12)
    labels = np.arange(12) % 3
    for name, found in membership.attack(nan, labels, fine, labels).items():
        assert math.isnan(found["auc"]), name
        assert math.isnan(found["tpr"]), name
    assert math.isnan(metrics.probe(nan, labels, fine, labels))
    assert not metrics.Floor(0.5, 0.6, 0.1).inside(math.nan)
    assert not metrics.Floor(0.5, math.nan, 0.1).inside(0.5)
    figures = {"forget_train": 0.0, "retain_train": 1.0, "retain_test": 0.9}
    kept = {"attacks": {}, "cost": {"rounds": 1, "samples": 1, "client_seconds": 1.0, "bytes": 1}}
    curve = [{"samples": 1, "round": 1, "client_seconds": 1, "bytes": 1, "retain_accuracy": math.nan}]
    curve[0]["forget_accuracy"] = math.nan
    models: dict[str, Any] = {
        name: {"figures": dict(figures), **kept, "curve": curve}
        for name in ("original", "retrain", "retrain-2", "broken")
    }
    models["original"]["figures"]["forget_train"] = 1.0
    outputs = dict.fromkeys(models, fine) | {"broken": nan}
    report = {
        "origin": "x", "words": ["nine"], "before": {}, "request": {"kind": "class"}, "models": models,
    }  # fmt: skip
    report = judged(report, outputs, lambda figure: 0.01)
    assert math.isnan(models["broken"]["figures"]["js"])
    assert "js" in models["broken"]["outside"]
    assert not models["broken"]["forgotten"]
    assert "not shown" in sentence("broken", models["broken"])
    assert "nan" in markdown(report)
    assert "broken" in shown(terminal_table(report))


def test_clients_without_figures_are_left_out_of_every_figure() -> None:
    rows = [
        {"num-examples": 10, "accuracy": 1.0, "loss": 0.2},
        {"num-examples": 0, "accuracy": 0.0, "loss": 0.0},
        {"num-examples": 5, "accuracy": 0.5, "loss": math.inf},
        {"num-examples": 5, "accuracy": [1.0], "loss": 0.4},
    ]
    found = over_clients(rows)
    assert found["accuracy"] == 0.75
    assert (found["accuracy_worst"], found["accuracy_spread"]) == (0.5, 0.25)
    assert found["accuracy_unmeasured"] == 2
    assert found["loss"] == pytest.approx(0.3)
    assert (found["loss_worst"], found["loss_unmeasured"]) == (0.4, 2)
    nobody = over_clients([rows[1], rows[1]])
    assert math.isnan(nobody["accuracy"])
    assert math.isnan(nobody["accuracy_worst"])
    assert nobody["accuracy_unmeasured"] == 2
