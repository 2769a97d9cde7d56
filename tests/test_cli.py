"""The command line: results, mistakes (one line, exit code 2, no traceback), quiet and fast."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fedsim.cli import app
from fedsim.runs import Run
from fedsim.version import code_digest
from tests.helpers import HEARS_CTRL_C, tiny

Invoke = Callable[..., Result]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(tiny("rounds=2").toml())
    return path


@pytest.fixture
def fedsim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDSIM_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("COLUMNS", "80")
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


def test_run_shows_the_result_and_what_to_try_next(fedsim: Invoke, file: Path, tmp_path: Path) -> None:
    result = fedsim("run", file, "--set", "rounds=3", "--set", 'baselines=["local-only"]', "--name", "mine")
    assert result.exit_code == 0
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80 or any(str(tmp_path) in line for line in lines)
    assert "round 3/3  accuracy" in result.stdout
    assert "local-only mean" in result.stdout
    run = Run.open(tmp_path / "runs" / "mine")
    summary = run.summary()
    assert f"{summary['accuracy_start']:.3f} → {summary['accuracy']:.3f}" in result.stdout
    assert f"run folder  {run.folder}" in result.stdout
    assert f"next        fedsim run {file} --set " in result.stdout


def test_a_start_that_would_mislead_is_explained(fedsim: Invoke, file: Path) -> None:
    result = fedsim("run", file, "--set", "rounds=1", "--set", 'model.name="tests.test_scores:schooled"')
    assert result.exit_code == 0
    assert "start: ImageNet-supervised transfer, no digits label used\n" in result.stdout


def test_json_is_the_last_line_of_stdout_and_the_summary(fedsim: Invoke, file: Path, tmp_path: Path) -> None:
    result = fedsim("run", file, "--json")
    lines = result.stdout.splitlines()
    assert len(lines) == 1
    assert json.loads(lines[-1]) == Run.open(tmp_path / "runs" / "tiny").summary()
    assert "round 2/2" in result.stderr


def test_a_taken_name_gets_a_suffix_or_is_overwritten(fedsim: Invoke, file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    for _ in range(2):
        fedsim("run", file, "--folder", folder)
    assert sorted(path.name for path in folder.iterdir()) == ["tiny", "tiny-2"]
    before = (folder / "tiny" / "summary.json").stat().st_mtime_ns
    assert fedsim("run", file, "--folder", folder, "--overwrite").exit_code == 0
    assert sorted(path.name for path in folder.iterdir()) == ["tiny", "tiny-2"]
    assert (folder / "tiny" / "summary.json").stat().st_mtime_ns > before


MISTAKES = {
    "client.lrr=1": ["unknown key 'lrr' in [client]", "did you mean 'lr'?"],
    "clinet.lr=1": ["unknown key or section 'clinet'", "did you mean 'client'?"],
    "strategy.name=fedtun": ["[strategy]", "did you mean 'fedtune'?", "fedsim list strategies"],
    "data.name=digit": ["[data]", "did you mean 'digits'?"],
    "tuning.name=bais": ["[tuning]", "did you mean 'bias'?"],
    "tuning.name=norm": ["selects no parameter", "[tuning] name", "fit model 'mlp': full, head"],
    "rounds=x": ["rounds", "integer", "'x'"],
    "client.lr=-1": ["[client] lr", "greater than 0", "-1"],
    "partition.clients=2000": ["[partition] clients = 2000", "give at most 747"],
    "partition.shots=5000": ["[partition] shots = 5000", "give at most"],
    "partition.name=dirichlet": ["[partition] alpha is missing", "--set partition.alpha"],
    "partition.name=dirichlet;partition.alpha=0": ["[partition] alpha", "greater than 0"],
    "data.name=npz:none.npz": ["there is no 'none.npz'", "none.npz"],
    "strategy.name=flwr-fedavg;strategy.min_available_nodes=50": ["min_available_nodes = 50", "to 4 or less"],
    "strategy.min_clients=9": ["min_clients = 9", "raise partition.clients"],
    "baselines=['fedtun']": ["baseline", "did you mean 'fedtune'?"],
    "lr": ["expected KEY=VALUE", "--set client.lr=0.01"],
    "name='a b'": ["name 'a b'", "letters"],
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_with_the_fix(mistake: str, fedsim: Invoke, file: Path, tmp_path: Path) -> None:
    sets = [part for override in mistake.split(";") for part in ("--set", override)]
    result = fedsim("run", file, *sets)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    for part in MISTAKES[mistake]:
        assert part in result.stderr
    runs = tmp_path / "runs"
    assert not runs.exists() or not list(runs.iterdir()), "a run that never began leaves a folder"


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        (["run", "nowhere.toml"], ["no experiment file 'nowhere.toml'", "quickstart"]),
        (["resume", "nothing"], ["nothing is no run folder"]),
        (["compare", "nothing"], ["nothing is no run folder"]),
        (["export", "nothing"], ["nothing is no run folder"]),
        (["list", "strategy"], ["unknown kind 'strategy'", "did you mean 'strategies'?"]),
        (["list", "models", "--of", "tiny.toml"], ["fedsim list partitions --of tiny.toml"]),
        (["sweep", "tiny.toml"], ["nothing to sweep over", "--grid seed=0,1,2"]),
        (["sweep", "tiny.toml", "--grid", "seed"], ["--grid seed", "KEY=VALUE,VALUE"]),
        (["sweep", "tiny.toml", "--grid", "client.lrr=1,2"], ["cell client.lrr=1", "did you mean 'lr'?"]),
        (["sweep", "tiny.toml", "--grid", "seed=0", "--name", "a/b"], ["--name 'a/b'"]),
        (["sweep", "tiny.toml", "--grid", "seed=0", "--grid", "seed=1"], ["--grid seed=0 and --grid seed=1"]),
        (["run", "tiny.toml", "--set", "name=a", "--name", "b"], ["--set name=a and", 'name="b"']),
        (["forget", "x", "--class", "3", "--client", "4"], ["--class 3 and --client 4", "choose one"]),
        (["forget", "x", "--client", "4", "--attribute", "age"], ["--client 4 and --attribute age"]),
        (["forget", "x"], ["say what to forget: --class 9"]),
        (["forget", "x", "--class", "1", "--set", "edit.a=1", "--set", "edit.a=2"], ["edit.a=2 set one key"]),
        (["compare", "a", "b", "--plot", "tiny.toml/x.png"], ["--plot tiny.toml/x.png: cannot make"]),
        (["compare", "a", "b", "--plot", "x.jpeg"], ["--plot x.jpeg: the name must end in .png"]),
        (["memory", "tiny.toml", "--folder", "tiny.toml"], ["--folder tiny.toml/", "cannot make its folder"]),
        (["list", "partitions", "--of", "tiny.toml", "--folder", "tiny.toml"], ["cannot make its folder"]),
        (["sweep", "tiny.toml", "--grid", "seed=0", "--folder", "tiny.toml"], ["cannot make its folder"]),
    ],
)
def test_mistakes_of_other_commands(command: list[str], parts: list[str], fedsim: Invoke, file: Path) -> None:
    result = fedsim(*command)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("error: ")
    for part in parts:
        assert part in result.stderr


def test_data_and_model_that_nobody_named_are_said(fedsim: Invoke) -> None:
    Path("few.toml").write_text("rounds = 1\n[partition]\nclients = 2\nshots = 2\n")
    lines = fedsim("run", "few.toml").stdout.splitlines()
    assert "note  no [data] is named: taking data.name=digits" in lines
    assert "note  no [model] is named: taking model.name=tiny-clip" in lines
    said = fedsim("run", "few.toml", "--set", "data.name=digits", "--set", "model.name=mlp").stdout
    assert "is named" not in said


def test_a_picture_of_runs_makes_its_folder(fedsim: Invoke, file: Path) -> None:
    for name in ("a", "b"):
        fedsim("run", file, "--set", "rounds=1", "--name", name)
    for picture in ("new/folder/x.png", "new/x.SVG"):
        result = fedsim("compare", "a", "b", "--plot", picture)
        assert result.exit_code == 0, result.output
        assert Path(picture).stat().st_size > 1000


def test_a_damaged_run_beside_a_new_one_does_not_spoil_its_end(fedsim: Invoke, file: Path) -> None:
    for name in ("cut-off", "bare"):
        folder = Path("runs") / name
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text("{}")
    Path("runs/cut-off/experiment.toml").write_text("[data")
    result = fedsim("run", file)
    assert result.exit_code == 0, result.output
    assert "fedsim compare" not in result.output


def test_version_names_the_code(fedsim: Invoke) -> None:
    result = fedsim("--version")
    assert result.exit_code == 0
    assert result.stdout == f"fedsim {code_digest()}\n"


def test_debug_shows_the_traceback(fedsim: Invoke, file: Path) -> None:
    result = fedsim("run", file, "--set", "rounds=x", "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr


def test_an_unexpected_error_is_one_line(fedsim: Invoke, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise ZeroDivisionError("by design\nsecond line")

    monkeypatch.setattr("fedsim.finish.run_experiment", broken)
    result = fedsim("run", file)
    assert result.exit_code == 1
    assert result.stderr == "error: ZeroDivisionError: by design (use --debug for the traceback)\n"


def test_clients_that_fail_are_named(fedsim: Invoke, file: Path, tmp_path: Path) -> None:
    result = fedsim("run", file, "--set", "client.name=tests.broken_client:make")
    assert result.exit_code == 2
    assert "the battery is empty" in result.stderr
    assert "Traceback" not in result.stderr
    assert not Run.open(tmp_path / "runs" / "tiny").finished  # kept: the run can be resumed


def test_resume_finishes_a_run_and_says_when_it_is_finished(
    fedsim: Invoke, file: Path, tmp_path: Path
) -> None:
    whole = json.loads(fedsim("run", file, "--json", "--name", "whole").stdout)
    folder = tmp_path / "runs" / "whole"
    (folder / "summary.json").unlink()
    (folder / "checkpoints" / "round-00002.safetensors").unlink()
    again = json.loads(fedsim("resume", "whole", "--json").stdout)  # found by its name, too
    assert {**again, "seconds": 0} == {**whole, "seconds": 0}
    result = fedsim("resume", folder)
    assert result.exit_code == 0
    assert "finished already" in result.stdout


def test_a_damaged_checkpoint_is_said_and_the_one_before_used(
    fedsim: Invoke, file: Path, tmp_path: Path
) -> None:
    whole = json.loads(fedsim("run", file, "--json").stdout)
    folder = tmp_path / "runs" / "tiny"
    (folder / "summary.json").unlink()
    newest = folder / "checkpoints" / "round-00002.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    result = fedsim("resume", folder, "--json")
    assert "round-00002.safetensors: damaged" in result.stderr
    assert "trying the checkpoint before it" in result.stderr
    assert json.loads(result.stdout)["digest"] == whole["digest"]


def test_a_checkpoint_of_another_experiment_is_refused(fedsim: Invoke, file: Path, tmp_path: Path) -> None:
    fedsim("run", file)
    folder = tmp_path / "runs" / "tiny"
    (folder / "summary.json").unlink()
    recorded = folder / "experiment.toml"
    recorded.write_text(recorded.read_text().replace("seed = 0", "seed = 1"))
    result = fedsim("resume", folder)
    assert result.exit_code == 2
    assert "belongs to another experiment" in result.stderr


def test_ctrl_c_leaves_a_run_that_can_be_resumed(file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", f"{HEARS_CTRL_C}from fedsim.cli import main; main()"]
    environment = {**os.environ, "FEDSIM_RUNS": str(tmp_path / "runs")}
    process = subprocess.Popen(
        [*command, "run", str(file), "--set", "rounds=100000"],
        env=environment,
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    folder = tmp_path / "runs" / "tiny"
    deadline = time.monotonic() + 60
    while not list(folder.glob("checkpoints/round-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == f"interrupted; go on with: fedsim resume {folder}\n"
    assert Run.open(folder).latest_checkpoint()[0] is not None


def test_libraries_are_quiet(file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from fedsim.cli import main; main()", "run", str(file), "--json"]
    krum = ["--set", "strategy.name=krum", "--folder", str(tmp_path / "runs")]
    done = subprocess.run(
        [*command, *krum], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent
    )
    assert len(done.stdout.splitlines()) == 1
    lines = done.stderr.strip().splitlines()
    assert lines[0] == "tiny: loading torch and Flower"
    assert lines[1].startswith("tiny: krum")
    assert [line[:9] for line in lines[2:5]] == ["round 0/2", "round 1/2", "round 2/2"]
    assert lines[5:7] == ["", "tiny  krum · 4 clients · 2 rounds"]


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, fedsim.cli; print(sorted(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"numpy", "pydantic", "torch", "flwr", "ray", "pandas", "matplotlib", "sklearn"}
    assert not heavy & set(eval(done.stdout))


@pytest.mark.parametrize("command", ["run", "sweep", "forget", "memory", "bench"])
def test_help_shows_defaults_and_ranges_as_they_are(fedsim: Invoke, command: str) -> None:
    text = fedsim(command, "--help").stdout
    assert "  [" in text
    assert "\\" not in text


def test_help_lists_every_command(fedsim: Invoke) -> None:
    text = fedsim("--help").stdout
    for command in ("run", "resume", "sweep", "compare", "list", "export", "doctor"):
        assert f"\n  {command} " in text
    assert "..." not in text.split("Commands:")[1], "a summary is cut off"


def test_doctor_finds_nothing_wrong(fedsim: Invoke) -> None:
    result = fedsim("doctor")
    titles = [line.split()[1] for line in result.stdout.splitlines() if line.startswith(("✓", "✗"))]
    assert {"python", "flower", "torch", "cache", "assets", "experiments", "smoke"} <= set(titles)
    broken = [line for line in result.stdout.splitlines() if line.startswith("✗")]
    assert result.exit_code == (1 if broken else 0)
    assert not [line for line in broken if not line.startswith("✗ packages")]


def test_doctor_names_the_fix(fedsim: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "file"))
    result = fedsim("doctor")
    assert result.exit_code == 1
    assert "✗ cache" in result.stdout
    assert "→ set FEDSIM_CACHE" in result.stdout


def test_doctor_names_a_folder_of_assets_that_cannot_be(
    fedsim: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDSIM_ASSETS", str(tmp_path / "file"))
    result = fedsim("doctor")
    assert result.exit_code == 1
    assert "✗ assets" in result.stdout
    assert "→ set FEDSIM_ASSETS" in result.stdout


def test_an_ascii_terminal_is_served(file: Path, tmp_path: Path) -> None:
    env = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "FEDSIM_RUNS": str(tmp_path / "runs")}
    command = [sys.executable, "-c", "from fedsim.cli import main; main()", "run", str(file)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "fedavg" in done.stdout
