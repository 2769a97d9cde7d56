"""Somebody else's Flower app directory, unchanged, on our engine."""

from __future__ import annotations

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
from types import SimpleNamespace
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

@app.train()
def train(message, context):
    arrays = message.content["arrays"].to_numpy_ndarrays()
    arrays[0] += context.node_config["partition-id"]
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
    assert not foreign.is_app(tmp_path)
    for words, said in (
        (["run", str(tmp_path), "--clients", "2"], "holds no Flower app"),
        (["run", str(app)], "--clients 10"),
        (["run", "quickstart", "--clients", "2"], "partition.clients=N"),
    ):
        done = _fedsim(*words)
        assert done.returncode == 2
        assert said in done.stdout + done.stderr
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
