"""`fedsim forget`: one command, ordinary runs, nothing touched, nothing run twice, mistakes named."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from fedsim import messages
from fedsim.building import load_data
from fedsim.cli import app
from fedsim.config import Experiment
from fedsim.finish import run_experiment
from fedsim.forgetting import experiments, request, sitting
from fedsim.forgetting.evidence import Examiner
from fedsim.forgetting.methods import METHODS
from fedsim.forgetting.report import markdown, verdicts
from fedsim.forgetting.speedups import speedup, speedups, times, titled
from fedsim.forgetting.verdict import judged, sentence
from fedsim.runs import Run
from tests.helpers import StopAt, tiny

Forget = Callable[..., Result]
TABLES: dict[str, Any] = {
    "model": {"name": "cnn", "width": 8},
    "client": {"lr": 0.1, "batch_size": 16, "epochs": 2.0},
    "partition": {"name": "iid", "clients": 3, "shots": 8},
    "evaluation": {"validation": 0.1},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    experiment = tiny("rounds=4", "checkpoints.record_updates=true", "checkpoints.keep=9", **TABLES)
    run_experiment(experiment, Run.create(experiment, folder))
    return folder


@pytest.fixture
def forget(runs: Path, monkeypatch: pytest.MonkeyPatch) -> Forget:
    monkeypatch.setenv("FEDSIM_RUNS", str(runs))
    monkeypatch.setenv("COLUMNS", "80")
    return lambda *arguments: CliRunner().invoke(app, ["forget", *map(str, arguments)])


def _files(folder: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def test_forget_a_class_beside_retraining(forget: Forget, runs: Path) -> None:
    before = _files(runs / "tiny")
    result = forget("tiny", "--class", "nine", "--relearn", 1, "--set", "edit.ratio=0.2", "--json")
    assert result.exit_code == 0, result.output
    assert _files(runs / "tiny") == before
    folder = runs / "tiny-forget-class-9"
    report = json.loads(result.stdout.splitlines()[-1])
    assert report == json.loads((folder / "report.json").read_text())
    assert list(report["models"]) == ["original", "prune", "retrain", "retrain-2"]
    assert report["words"] == ["nine"]
    figures = report["models"]["retrain"]["figures"]
    assert figures["forget_train"] == figures["forget_test"] == 0
    assert report["models"]["original"]["figures"]["forget_train"] > 0.5
    assert report["models"]["retrain"]["tow"] == 1
    lineage = json.loads((folder / "prune" / "lineage.json").read_text())
    assert lineage["origin"] == str((runs / "tiny").resolve())
    assert lineage["requests"] == [{"kind": "class", "ids": [9], "words": ["nine"]}]
    experiment = Run.open(folder / "prune").experiment()
    assert experiment["strategy"].options["edit"] == {"name": "prune", "ratio": 0.2}
    assert experiment.rounds == 1 + 2  # scoring, and a quarter of four rounds but no fewer than two
    assert all((folder / name).stat().st_size for name in ("report.md", "curves.png", "speedup.png"))
    size = report["models"]["prune"]["size"]
    assert size["parameters_compact"] < size["parameters"]
    # what is finished is not run again; another method takes its place beside the first
    done = _files(folder / "prune"), _files(folder / "retrain")
    more = forget("tiny", "--class", 9, "--method", "not", "--relearn", 1)
    assert more.exit_code == 0, more.output
    assert {"original", "prune", "not", "retrain", "retrain-2"} == set(
        json.loads((folder / "report.json").read_text())["models"]
    )
    assert ({**done[0]}, {**done[1]}) == (_files(folder / "prune"), _files(folder / "retrain"))
    assert "prune: " in more.stdout
    other = forget("tiny", "--class", 9, "--set", "edit.ratio=0.3", "--relearn", 1)
    assert other.exit_code == 2
    assert "holds another run (different: strategy.edit.ratio)" in other.stderr


def test_both_retrainings_have_the_same_data(runs: Path) -> None:
    origin = request.opened(Run.open(runs / "tiny"))
    wanted = request.request_of(origin, "client", ["1"])
    plan = sitting.plan_of(origin, wanted, [], runs / "x")
    made = [experiments.experiment_of(plan, name, ["client.lr=9", "engine.threads=2"]) for name in _BOTH]
    assert [one.seed for one in made] == [0, 1]
    assert [one["partition"].common["seed"] for one in made] == [0, 0]
    assert all(one.settings["forget"]["clients"] == [1] for one in made)
    assert all(one["client"].options["lr"] == 0.1 for one in made)  # the recipe is the run's
    assert all(one["engine"].options["threads"] == 2 for one in made)


_BOTH = ("retrain", "retrain-2")


def test_every_method_of_a_client_request(forget: Forget, runs: Path) -> None:
    result = forget(
        "tiny", "--client", 1, "--method", "all", "--no-retrain", "--relearn", 0, "--set", "recover.rounds=1"
    )
    assert result.exit_code == 0, result.output
    report = json.loads((runs / "tiny-forget-client-1" / "report.json").read_text())
    assert list(report["models"]) == ["original", *METHODS["client"]]
    assert report["models"]["federaser"]["cost"]["storage"] > 0
    assert report["models"]["pga"]["cost"]["storage"] == 0
    # the client was there from the first round: going back is beginning anew
    back = Run.open(runs / "tiny-forget-client-1" / "roll-back")
    assert back.experiment()["strategy"].options["first_round"] == 0
    assert back.experiment().rounds == 4
    page = (runs / "tiny-forget-client-1" / "report.md").read_text()
    assert markdown(report) == page
    assert "unknown without retraining" in result.stdout
    assert "forgotten" not in page + result.stdout


def test_forgetting_on_top_of_forgetting_is_recorded(forget: Forget, runs: Path) -> None:
    less = ("--no-retrain", "--relearn", 0, "--set", "recover.rounds=1", "--set", "edit.ratio=0.2")
    first = forget("tiny", "--class", 3, *less)
    assert first.exit_code == 0, first.output
    second = forget(runs / "tiny-forget-class-3" / "prune", "--class", 5, *less)
    assert second.exit_code == 0, second.output
    folder = runs / "tiny-forget-class-3" / "prune-forget-class-5"
    run = Run.open(folder / "prune")
    assert [one["ids"] for one in json.loads((run.folder / "lineage.json").read_text())["requests"]] == [
        [3],
        [5],
    ]
    assert run.experiment().settings["forget"]["classes"] == [3, 5]
    report = json.loads((folder / "report.json").read_text())
    assert report["before"]["classes"] == [3]
    origin = request.opened(Run.open(runs / "tiny-forget-class-3" / "prune"))
    examiner = Examiner(sitting.plan_of(origin, request.Request("class", (5,)), [], folder))
    tests = np.asarray(examiner.task.data.arrays.test_y)
    assert set(tests[examiner.forgotten_tests]) == {5}
    assert not {3, 5} & set(tests[examiner.retained_tests])
    assert set(np.asarray(examiner.task.data.arrays.train_y)[examiner.forgotten]) == {5}
    assert "Left out before: classes 3." in (folder / "report.md").read_text()
    from safetensors.numpy import load_file

    state = load_file(runs / "tiny-forget-class-3" / "prune" / "state.safetensors")
    examiner.task.load(messages.arrays_of(state))
    fives = examiner.task.evaluate_test(np.flatnonzero(tests == 5))["accuracy"]
    figures = report["models"]["original"]["figures"]
    assert figures["forget_test"] == pytest.approx(fives)  # of class 5 alone
    old = load_file(runs / "tiny-forget-class-3" / "prune" / "masks.safetensors")
    new = load_file(run.folder / "masks.safetensors")
    for name, mask in old.items():
        assert (new[name] >= mask).all()  # what was pruned stays pruned
    assert sum(mask.sum() for mask in new.values()) > sum(mask.sum() for mask in old.values())
    again = forget(run.folder, "--class", 3)
    assert again.exit_code == 2
    assert "class 3 is left out of" in again.stderr


def test_folders_that_are_numbers_go_by_their_names(forget: Forget, tmp_path: Path) -> None:
    """0, 1, 10, 11, 2 in this order: class 2 is the last of them, not the one at position 2."""
    rng = np.random.default_rng(0)
    for name in ("0", "1", "2", "10", "11"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(10):
            noise = rng.integers(0, 90, (8, 8, 3)) + 15 * int(name)
            Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(
                tmp_path / "data" / name / f"{number}.png"
            )
    data = {"name": f"imagefolder:{tmp_path / 'data'}", "size": 8}
    experiment = tiny("rounds=1", "partition.clients=2", "partition.shots=2", data=data)
    run_experiment(experiment, Run.create(experiment, tmp_path))
    less = ("--method", "none", "--no-retrain", "--relearn", 0, "--set", "recover.rounds=1", "--json")
    first = forget(tmp_path / "tiny", "--class", "2", *less)
    assert first.exit_code == 0, first.output
    again = forget(tmp_path / "tiny", "--class", "index:4", *less)
    assert json.loads(again.stdout.splitlines()[-1])["words"] == ["2"]
    folder = tmp_path / "tiny-forget-class-2"
    assert sorted(path.name for path in tmp_path.glob("tiny-forget-*")) == [folder.name]
    run = Run.open(folder / "none")
    assert run.experiment().settings["forget"]["classes"] == ["2"]
    assert run.summary()["forgotten_classes"] == ["2"]
    assert json.loads((run.folder / "lineage.json").read_text())["requests"] == [
        {"kind": "class", "ids": [4], "words": ["2"]}
    ]
    second = forget(run.folder, "--class", "10,0", *less)
    assert second.exit_code == 0, second.output
    below = folder / "none-forget-class-0-10"
    assert Run.open(below / "none").summary()["forgotten_classes"] == ["0", "10", "2"]
    assert "Left out before: classes 2." in (below / "report.md").read_text()
    assert "class 2 is left out of" in forget(run.folder, "--class", "2", *less).stderr
    unclear = forget(tmp_path / "tiny", "--class", "3", *less)
    assert unclear.exit_code == 2
    assert "write a name" in unclear.stderr
    assert "index:3 for the class at that position, '11'" in unclear.stderr
    (tmp_path / "data" / "2").rename(tmp_path / "data" / "100")
    changed = forget(tmp_path / "tiny", "--class", "1", *less)
    assert changed.exit_code == 2
    assert "the data changed since this run" in changed.stderr


def test_a_name_with_commas_is_one_class(runs: Path) -> None:
    origin = replace(request.opened(Run.open(runs / "tiny")), classes=("crane, bird", "crane", "bird"))
    assert request.words_of(origin, "class", "crane, bird") == ["crane, bird"]
    assert request.words_of(origin, "class", "bird,crane") == ["bird", "crane"]
    assert request.words_of(origin, "client", "1, 2,") == ["1", "2"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "say what to forget: --class 9, --client 3, or --attribute gender"),
        (["--class", "1", "--client", "1"], "--class 1 and --client 1: one request forgets one kind"),
        (["--class", "ten"], "there is no such class; by number 0 to 9, or by name: "),
        (["--class", "²"], "there is no such class"),
        (["--class", ","], "--class is empty"),
        (["--class", "1", "--set", "data.name=mnist-5k"], "are those of the run that forgets"),
        (["--class", "1", "--set", "nonsense.key=3"], "are those of the run that forgets"),
        (["--client", "1", "--method", "federaser", "--set", "recover.bogus=2"], "'rounds'"),
        (["--client", "1", "--method", "not", "--set", "edit.ratio=0.2"], "not takes no keys of edit"),
        (["--class", "nin"], "did you mean 'nine'?"),
        (["--client", "3"], "clients are 0 to 2"),
        (["--class", "0,1,2,3,4,5,6,7,8,9"], "nothing would be left"),
        (
            ["--client", "1", "--method", "prune"],
            "method 'prune' forgets classes, not clients; for a client: not",
        ),
        (["--class", "1", "--method", "federaser"], "method 'federaser' forgets clients, not classes"),
        (["--class", "1", "--method", "prunn"], "did you mean 'prune'?"),
        (["--class", "1", "--method", "prune, nott"], "unknown method 'nott': did you mean 'not'?"),
        (["--class", "1", "--set", "edit.ration=1"], "did you mean 'ratio'?"),
        (["--class", "1", "--set", "recover.round=1"], "did you mean 'rounds'?"),
        (["--class", "1", "--set", "recover.rounds=0"], "1 or more"),
        (["--class", "1", "--set", "edit.ratio=1.0"], "[strategy.edit] ratio: Input should be less than 1"),
        (["--class", "1", "--set", "client.lrr=1"], "lrr"),
    ],
)
def test_mistakes_are_one_line(forget: Forget, runs: Path, arguments: list[str], said: str) -> None:
    result = forget("tiny", *arguments, "--name", "bad")
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (runs / "bad").exists()


def test_runs_that_cannot_forget(forget: Forget, runs: Path, tmp_path: Path) -> None:
    assert "is no run folder" in forget(tmp_path, "--class", 1).stderr
    bare = tiny("rounds=2", "name=bare", "strategy.fraction=0.34", **TABLES)
    unfinished = Run.create(bare, tmp_path)
    assert "is not finished" in forget(unfinished.folder, "--class", 1).stderr
    run_experiment(bare, unfinished)
    said = forget(unfinished.folder, "--client", 1, "--method", "federaser").stderr
    assert "recorded no updates" in said
    assert "checkpoints.record_updates=true" in said
    (unfinished.folder / "state.safetensors").unlink()
    assert "has no final state" in forget(unfinished.folder, "--class", 1).stderr


def test_a_value_that_failed_at_once_can_be_corrected(forget: Forget, runs: Path) -> None:
    common = ("--class", 1, "--no-retrain", "--relearn", 0, "--set", "recover.rounds=1", "--name", "again")
    failed = forget("tiny", *common, "--set", "edit.min_count=1000")
    assert failed.exit_code == 2
    assert (
        "fewer than edit.min_count = 1000, so nothing can be said about its channels: lower it"
        in failed.stderr
    )
    assert forget("tiny", *common, "--set", "edit.ratio=0.2").exit_code == 0
    other = forget("tiny", *common, "--set", "edit.ratio=0.3")
    assert "holds another run (different: strategy.edit.ratio)" in other.stderr


def test_a_client_after_a_class_is_what_is_watched(forget: Forget, runs: Path) -> None:
    less = ("--no-retrain", "--set", "recover.rounds=1")
    first = forget("tiny", "--class", 4, "--method", "not", "--relearn", 0, *less)
    assert first.exit_code == 0, first.output
    origin = runs / "tiny-forget-class-4" / "not"
    second = forget(origin, "--client", 1, "--method", "none", "--relearn", 1, *less)
    assert second.exit_code == 0, second.output
    folder = runs / "tiny-forget-class-4" / "not-forget-client-1"
    report = json.loads((folder / "report.json").read_text())["models"]["none"]
    # its own training samples, which the model of these few rounds mostly knows; class 4 would be near 0
    assert report["curve"][-1]["forget_accuracy"] == pytest.approx(report["figures"]["forget_train"])
    left_out = forget(origin, "--client", 1, "--method", "federaser", *less)
    assert "trained on classes which are forgotten since" in left_out.stderr
    again = forget(folder / "relearn-1-none", "--class", 3)
    assert "learnt again what was forgotten" in again.stderr


def test_heads_that_cannot_be_begun_anew_are_refused_before_anything_runs(
    forget: Forget, tmp_path: Path
) -> None:
    clip = tiny("rounds=1", "name=clip", model={"name": "tiny-clip"})
    run_experiment(clip, Run.create(clip, tmp_path))
    said = forget(tmp_path / "clip", "--class", 1, "--method", "none", "--no-retrain")
    assert said.exit_code == 2
    assert "leave that out with --relearn 0" in said.stderr
    assert not (tmp_path / "clip-forget-class-1").exists()


def test_an_interrupted_sitting_goes_on(runs: Path, tmp_path: Path) -> None:
    origin = request.opened(Run.open(runs / "tiny"))
    wanted = request.request_of(origin, "class", ["2"])
    wish = sitting.Wish(["prune"], ["edit.ratio=0.2"], retrain=False, relearn=1)
    plans = [sitting.plan_of(origin, wanted, [], tmp_path / name) for name in ("whole", "cut")]
    whole = sitting.sit(plans[0], wish, lambda _: nullcontext(()))
    for stop in (0, 1, 2):
        with pytest.raises(KeyboardInterrupt):
            sitting.sit(plans[1], wish, lambda _, stop=stop: nullcontext([StopAt(stop)]))
    report = sitting.sit(plans[1], wish, lambda _: nullcontext(()))
    assert report["models"]["prune"]["figures"] == whole["models"]["prune"]["figures"]
    finals = [Run.open(plan.folder / "prune").summary()["digest"] for plan in plans]
    assert finals[0] == finals[1]


def test_a_class_that_nobody_has(forget: Forget, tmp_path: Path) -> None:
    split = {"partition": {"name": "pathological", "clients": 2, "classes_per_client": 2}}
    few = tiny("rounds=1", **split)
    run_experiment(few, Run.create(few, tmp_path))
    held = few_classes(few)
    word = next(c for c in range(10) if c not in held)
    assert "no client has samples of it" in forget(tmp_path / "tiny", "--class", word).stderr


def few_classes(experiment: Experiment) -> set[int]:
    return set(load_data(experiment).class_counts().sum(0).nonzero()[0].tolist())


# ---------------------------------------------------------------------------------- the judgement


def _model(**figures: float) -> dict[str, Any]:
    full = {"forget_train": 0.0, "retain_train": 1.0, "retain_test": 0.9, "probe": 0.5, **figures}
    return {"figures": full, "attacks": {}, "cost": {}}


def _judged(**methods: dict[str, Any]) -> dict[str, Any]:
    models = {"original": _model(forget_train=1.0), "retrain": _model(), "retrain-2": _model(probe=0.52)}
    models |= methods
    outputs = {name: np.array([[0.5, 0.5]]) for name in models}
    outputs["retrain-2"] = np.array([[0.6, 0.4]])
    return judged({"models": models}, outputs, lambda figure: 0.01)


def test_forgotten_is_said_inside_the_noise_floor_alone() -> None:
    models = _judged(good=_model(probe=0.55), hidden=_model(probe=0.9), dear=_model(retain_test=0.5))[
        "models"
    ]
    assert models["good"]["outside"] == []
    assert "forgotten" in sentence("good", models["good"])
    assert models["hidden"]["outside"] == ["probe"]
    assert "forgotten" not in sentence("hidden", models["hidden"])
    assert models["dear"]["forgotten"]
    assert "the price: retain_test outside" in sentence("dear", models["dear"])


def test_nothing_is_said_where_the_original_model_would_pass(tmp_path: Path) -> None:
    report = _judged(original=_model(), good=_model(), hidden=_model(probe=0.9))
    assert not report["telling"]
    assert not any(report["models"][name]["forgotten"] for name in ("original", "good", "hidden"))
    said = verdicts(report)
    assert len(said) == 1
    assert said[0].startswith("cannot be told: the original model itself")
    telling = _judged(good=_model(), hidden=_model(probe=0.9))
    assert "rounds to relearn were not measured" in verdicts(telling)[0]
    assert titled(telling, "hidden") == "hidden (forgetting not shown)"
    assert titled(telling, "good") == "good"


def test_speed_up_is_a_curve_over_retained_accuracy() -> None:
    def curve(*points: tuple[float, float]) -> list[dict[str, float]]:
        return [{"samples": s, "retain_accuracy": a, "forget_accuracy": 0.0} for s, a in points]

    models = {
        "retrain": {"curve": curve((0, 0.1), (100, 0.6), (200, 0.9))},
        "prune": {"curve": curve((0, 0.95), (10, 0.55), (50, 0.9))},  # the start is not the method's own
        "head-mask": {"curve": curve((0, 0.95), (0, 0.7))},
    }
    report = {"models": models}
    found = dict(speedups(report)["prune"])
    assert found[0.55] == 10
    assert found[0.6] == 2
    assert found[0.9] == 4
    assert max(found) == 0.9
    assert "head-mask" not in speedups(report)
    by_head_mask = (times(speedup(report, "head-mask", level, "samples")) for level in (0.7, 0.9))
    assert list(by_head_mask) == ["costs nothing", "never"]


def test_a_trigger_of_the_client_is_measured(tmp_path: Path) -> None:
    """Taught by one client of three, unknown to a model that never met it."""
    tables = {"model": {"name": "mlp", "hidden": 32}, "partition": {"name": "iid", "clients": 3}}
    poisoned = tiny("rounds=8", "client.lr=0.2", "client.epochs=2", "backdoor.client=1", **tables)
    run = Run.create(poisoned, tmp_path)
    run_experiment(poisoned, run)
    origin = request.opened(run)
    plan = sitting.plan_of(origin, request.request_of(origin, "client", ["1"]), [], tmp_path / "without")
    wish = sitting.Wish(["retrain"], retrain=False, relearn=0)
    figures = {
        name: model["figures"]["backdoor"]
        for name, model in sitting.sit(plan, wish, lambda _: nullcontext(()))["models"].items()
    }
    assert figures["original"] > 0.8
    assert figures["retrain"] < 0.15
