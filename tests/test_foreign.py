"""Somebody else's Flower app directory, unchanged, on our engine."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedsim import foreign
from fedsim.errors import UserError

_PYPROJECT = """
[project]
name = "theirs"
version = "1"
[tool.flwr.app]
publisher = "them"
[tool.flwr.app.components]
serverapp = "clients.server:app"
clientapp = "clients.worker:parts.app"
[tool.flwr.app.config]
num-server-rounds = 3
[tool.flwr.app.config.model]
size = 4
"""

_SERVER = """
import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()

@app.main()
def main(grid, context):
    start = ArrayRecord([np.zeros(context.run_config["model.size"], np.float64)])
    strategy = FedAvg(fraction_evaluate=0.0)
    rounds = context.run_config["num-server-rounds"]
    result = strategy.start(grid=grid, initial_arrays=start, num_rounds=rounds)
    print("final", result.arrays.to_numpy_ndarrays()[0].tolist())
"""

_CLIENT = """
import argparse
from types import SimpleNamespace
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()
parser = argparse.ArgumentParser()
parser.add_argument("--step", type=int, default=1)
STEP = parser.parse_args().step

@app.train()
def train(message, context):
    print("i am", context.node_config["partition-id"])
    arrays = message.content["arrays"].to_numpy_ndarrays()
    arrays[0] += STEP * context.node_config["partition-id"]
    content = {"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": 1})}
    return Message(RecordDict(content), reply_to=message)

parts = SimpleNamespace(app=app)
"""


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """An app whose package has the name of one of ours."""
    folder = tmp_path / "theirs"
    (folder / "clients").mkdir(parents=True)
    (folder / "pyproject.toml").write_text(_PYPROJECT)
    (folder / "clients" / "__init__.py").touch()
    (folder / "clients" / "server.py").write_text(_SERVER)
    (folder / "clients" / "worker.py").write_text(_CLIENT)
    return folder


def _fedsim(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from fedsim.cli import main; main()", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("engine", ["serial", "ray"])
def test_an_app_runs_unchanged(app: Path, engine: str) -> None:
    """Clients 0 to 4 add their number in each of two rounds: a mean of 2 a round."""
    done = _fedsim(
        "run", str(app), "--clients", "5", "--set", "num-server-rounds=2", "--set", f"engine.name={engine}"
    )
    assert done.returncode == 0, done.stderr
    assert "final [4.0, 4.0, 4.0, 4.0]" in done.stdout
    mark = "client 3: " if engine == "ray" else ""
    assert done.stdout.splitlines().count(f"{mark}i am 3") == 2
    assert "[ROUND 2/2]" in done.stderr


def test_a_failing_app_ends_with_1(app: Path) -> None:
    (app / "clients" / "server.py").write_text("raise RuntimeError('theirs is broken')")
    done = _fedsim("run", str(app), "--clients", "2")
    assert done.returncode == 1
    assert "theirs is broken" in done.stderr


@pytest.mark.parametrize(
    ("overrides", "said"),
    [(["num-rounds=1"], "num-server-rounds"), (["rounds=1"], "has no key 'rounds'")],
)
def test_an_unknown_key_is_named(app: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        foreign.described(app, 2, overrides)


def test_what_the_process_is_told(app: Path) -> None:
    found = foreign.described(app, 7, ["model.size=9", "engine.name=ray", "engine.workers=2", "seed=3"])
    assert found["config"] == {"num-server-rounds": 3, "model.size": 9}
    assert found["engine"] == {"name": "ray", "workers": 2}
    assert (found["clients"], found["seed"]) == (7, 3)


def test_mistakes_on_the_command_line(app: Path, tmp_path: Path) -> None:
    for words, said in (
        (["run", str(tmp_path), "--clients", "2"], "holds no Flower app"),
        (["run", str(app)], "--clients 10"),
        (["run", str(app), "--clients", "2", "--json"], "--json is for experiments"),
        (["run", str(app), "--clients", "2", "--name", "x"], "--name is for experiments"),
        (["run", str(app), "--clients", "2", "--node-config", "partition-id=3"], "take --clients N"),
        (["run", "theirs.1-0-0.fab", "--clients", "2"], "python -m zipfile -e theirs.1-0-0.fab app"),
        (["run", "quickstart", "-c", "rounds=2"], "here say --set KEY=VALUE"),
        (["run", "quickstart", "--clients", "2"], "partition.clients=N"),
    ):
        done = _fedsim(*words)
        assert done.returncode == 2
        assert said in done.stdout + done.stderr
    named = _fedsim("run", str(app / "pyproject.toml"), "--clients", "2", "--set", "seed=one")
    assert "error: --set seed=one: a seed is a whole number" in named.stderr
    (app / "pyproject.toml").write_text('[tool.flwr.app]\npublisher = "them"\n')
    with pytest.raises(UserError, match=r"needs serverapp"):
        foreign.described(app, 2, [])


@pytest.mark.parametrize(
    ("who", "status", "said"),
    [
        (
            ">= 0",
            2,
            "error: no client did its work: all 6 messages failed; the first says: client 0: OSError",
        ),
        (
            "== 1",
            0,
            "the run has ended, but 3 of 6 messages failed; the first says: client 1: OSError: no disk",
        ),
    ],
)
def test_failed_clients_are_counted_in_the_end(app: Path, who: str, status: int, said: str) -> None:
    """Flower goes on to the end without any reply, with status 0."""
    worker = app / "clients" / "worker.py"
    failing = f'    if context.node_config["partition-id"] {who}: raise OSError("no disk")\n'
    start = "def train(message, context):\n"
    worker.write_text(_CLIENT.replace(start, start + failing))
    server = app / "clients" / "server.py"
    server.write_text(_SERVER.replace('    print("final"', '    result.arrays and print("final"'))
    done = _fedsim("run", str(app), "--clients", "2")
    assert done.returncode == status
    assert [line for line in done.stderr.splitlines() if line.startswith(said)]


# ------------------------------------------------------------------- what users of `flwr run` are used to


def test_keys_as_flwr_run_takes_them(app: Path, tmp_path: Path) -> None:
    file = tmp_path / "fewer.toml"
    file.write_text("num-server-rounds = 1\n[model]\nsize = 2\n")
    assert foreign.described(app, 2, [], [str(file)])["config"] == {"num-server-rounds": 1, "model.size": 2}
    found = foreign.described(app, 2, [], ["num-server-rounds=7  model.size='two words'"])["config"]
    assert foreign.described(app, 2, [], ["num-server-rounds=7", "model.size='two words'"])["config"] == found
    assert found == {"num-server-rounds": 7, "model.size": "two words"}
    assert foreign.described(app, 2, [], ['model.size="3"'])["config"]["model.size"] == "3"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("num-rounds=1", "did you mean 'num-server-rounds'"),
        ("num-server-rounds", "'num-server-rounds' is no KEY=VALUE"),
        ("model.size=1 model.size=2", "model.size=1 and --run-config model.size=2 set one key twice"),
        ("num-server-rounds=1 and more", "'and more' is no KEY=VALUE"),
        ("model.size=[1,2]", "numbers, true, false or text, not list"),
        ("", "is no KEY=VALUE"),
        ("nowhere.toml", "there is no such file"),
    ],
)
def test_mistakes_in_a_run_config(app: Path, text: str, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        foreign.described(app, 2, [], [text])


def test_a_key_that_both_options_set_is_refused(app: Path) -> None:
    with pytest.raises(
        UserError, match=r"--run-config model.size=2 and --set model.size=3 set one key twice"
    ):
        foreign.described(app, 2, ["model.size=3"], ["model.size=2"])


@pytest.mark.parametrize("override", ["num-server-rounds", "model.size", "seed", "engine.workers", "=3"])
def test_an_override_without_a_value_is_refused(app: Path, override: str) -> None:
    with pytest.raises(UserError, match=f"--set {override}: expected KEY=VALUE"):
        foreign.described(app, 2, [override])


def _add(app: Path, text: str) -> None:
    with (app / "pyproject.toml").open("a") as file:
        file.write(text)


def test_a_seed_of_the_apps_own_does_not_hide_ours(app: Path) -> None:
    _add(app, "[tool.flwr.app.config.engine]\nname = 'diesel'\n")
    file = app / "pyproject.toml"
    file.write_text(file.read_text().replace("num-server-rounds = 3", "num-server-rounds = 3\nseed = 1"))
    found = foreign.described(app, 2, ["seed=5"])
    assert (found["seed"], found["config"]["seed"]) == (5, 5)
    assert "sets the app's own key 'seed' and the seed of our engine" in found["notes"][0]
    assert foreign.described(app, 2, ["engine.seed=7"])["seed"] == 7
    found = foreign.described(app, 2, ["engine.name=ray"], ["seed=6 engine.name=petrol"])
    assert (found["seed"], found["config"]["seed"]) == (0, 6)
    assert (found["engine"]["name"], found["config"]["engine.name"]) == ("ray", "petrol")


def test_nodes_and_resources_of_its_pyproject(app: Path) -> None:
    _add(
        app,
        "[tool.flwr.federations]\ndefault = 'here'\n[tool.flwr.federations.there]\naddress = 'x:1'\n"
        "[tool.flwr.federations.here]\noptions.num-supernodes = 12\n"
        "options.backend.client_resources.num_cpus = 2\noptions.backend.client_resources.num_gpus = 0.5\n",
    )
    found = foreign.described(app, None, ["engine.name=ray"])
    assert found["clients"] == 12
    assert found["engine"] == {"name": "ray", "threads": 2, "gpu_fraction": 0.5}
    assert "12 nodes, as" in found["notes"][0]
    assert "engine.threads=2, engine.gpu_fraction=0.5" in found["notes"][1]
    mine = foreign.described(app, 3, ["engine.name=ray", "engine.threads=1", "engine.gpu_fraction=0"])
    assert mine["clients"] == 3
    assert mine["engine"] == {"name": "ray", "threads": 1, "gpu_fraction": 0}
    assert mine["notes"] == []
    [said] = foreign.described(app, 3, [])["notes"]
    assert "--set engine.name=ray" in said


def test_resources_that_no_worker_can_have_are_named(app: Path) -> None:
    _add(app, "[tool.flwr.federations.only]\noptions.backend.client-resources.num-gpus = 2\n")
    with pytest.raises(UserError, match=r"2 is no engine.gpu_fraction; give one with --set engine.gpu_fr"):
        foreign.described(app, 2, ["engine.name=ray"])
