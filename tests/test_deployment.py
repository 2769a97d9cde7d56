"""Real nodes: a SuperLink and two SuperNodes on loopback give the digest of SerialGrid.

Everything is started here, on ports of its own, with an own FLWR_HOME, and ended by process id.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedsim import config
from tests.helpers import run

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
OVERRIDES = ["rounds=2", "partition.clients=2", "baselines=[]"]

pytestmark = pytest.mark.deployment


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Federation:
    """Daemons on loopback."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        home = folder / "flwr"
        home.mkdir()
        (home / "config.toml").write_text(
            '[superlink]\ndefault = "test"\n[superlink.test]\n'
            f'address = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )
        self.env = {
            **os.environ,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FEDSIM_RUNS": str(folder / "runs"),
        }
        self.children: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, *arguments: str) -> None:
        log = (self.folder / f"{name}.log").open("wb")
        child = subprocess.Popen(
            [str(BIN / arguments[0]), *arguments[1:]],
            cwd=self.folder, env=self.env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        log.close()
        self.children.append(child)

    def wait_healthy(self, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2) as answer:
                    if answer.status == 200:
                        return
            except OSError:
                time.sleep(0.2)
        raise AssertionError(f"the SuperLink did not come up:\n{self.log('superlink')}")

    def submit(self, run_config: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(ROOT / "docker" / "submit.py"), str(ROOT), "test", run_config],
            cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text("utf-8", "replace")[-4000:]

    def stop(self) -> None:
        """End the daemons and the processes they started (each child leads a session of its own)."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            for child in self.children:
                try:
                    os.killpg(child.pid, number)
                except ProcessLookupError:
                    continue
            deadline = time.monotonic() + 8
            while any(c.poll() is None for c in self.children) and time.monotonic() < deadline:
                time.sleep(0.1)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    made = Federation(tmp_path_factory.mktemp("federation"))
    try:
        made.start(
            "superlink", "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(made.port)
        )
        made.wait_healthy()
        # the first node does not say which partition it is: the server gives it the free one
        for name, node_config in (("node-a", None), ("node-b", "partition-id=0 num-partitions=2")):
            extra = ["--node-config", node_config] if node_config else []
            made.start(
                name, "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{made.port}",
                "--port", str(free_port()), *extra,
            )  # fmt: skip
        yield made
    finally:
        made.stop()


def run_config(overrides: list[str]) -> str:
    return f'experiment="experiments/quickstart.toml" overrides="{" ".join(overrides)}"'


@pytest.mark.timeout(280)
def test_two_real_nodes_give_the_digest_of_the_serial_engine(federation: Federation, tmp_path: Path) -> None:
    serial = run(config.load("quickstart", OVERRIDES), tmp_path)
    done = federation.submit(run_config(OVERRIDES))
    shown = done.stdout + done.stderr + federation.log("node-a")
    assert done.returncode == 0, shown
    assert "finished:completed" in done.stdout
    folder = federation.folder / "runs" / "quickstart"
    summary = json.loads((folder / "summary.json").read_text())
    for key in ("digest", "accuracy", "loss", "bytes_up", "bytes_down", "clients", "rounds"):
        assert summary[key] == serial.summary[key], key
    rows = [json.loads(line) for line in (folder / "clients.jsonl").read_text().splitlines()]
    assert sorted((r["round"], r["client"]) for r in rows) == [(1, 0), (1, 1), (2, 0), (2, 1)]


@pytest.mark.timeout(120)
def test_a_wrong_number_of_nodes_is_refused_with_the_line_to_type(federation: Federation) -> None:
    federation.env["FEDSIM_NODE_WAIT"] = "1"
    done = federation.submit(run_config(["rounds=1", "partition.clients=1", "baselines=[]"]))
    assert done.returncode == 1
    assert "finished:failed" in done.stdout
    assert "2 nodes are connected but the experiment has partition.clients = 1" in done.stdout + done.stderr
    assert "num-supernodes=1" in done.stdout + done.stderr


def test_the_fab_carries_text_only_and_no_code(federation: Federation, tmp_path: Path) -> None:
    """A FAB with our packages would shadow the installed ones and lack their weights."""
    import zipfile

    done = subprocess.run(
        [str(BIN / "flwr"), "build", "--app", str(ROOT)],
        cwd=tmp_path, env=federation.env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    fabs = list(tmp_path.glob("*.fab"))
    assert len(fabs) == 1, done.stdout + done.stderr
    names = zipfile.ZipFile(fabs[0]).namelist()
    assert "pyproject.toml" in names
    assert "experiments/quickstart.toml" in names
    assert not [n for n in names if not n.endswith((".toml", ".md", "LICENSE", ".info/CONTENT"))]


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return loaded


def test_compose_commands_are_ones_that_flower_accepts() -> None:
    """Each command line goes through Flower's real argument parser."""
    from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink
    from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode

    parsers = {"flower-superlink": _parse_args_run_superlink, "flower-supernode": _parse_args_run_supernode}
    services = compose()["services"]
    assert {"superlink", "supernode-0", "supernode-1", "run"} <= set(services)
    partitions = set()
    for name, service in services.items():
        program, *arguments = shlex.split(service["command"])
        if program not in parsers:
            continue
        known = parsers[program]().parse_args(arguments)
        if name.startswith("supernode"):
            assert known.superlink == "superlink:8000"
            partitions.add(known.node_config)
            assert service["depends_on"]["superlink"]["condition"] == "service_healthy"
    assert len(partitions) == 2
    assert "/health" in " ".join(services["superlink"]["healthcheck"]["test"])


def test_compose_run_submits_to_the_superlink_of_the_image() -> None:
    import tomllib

    service = compose()["services"]["run"]
    known = tomllib.loads((ROOT / "docker" / "flwr-config.toml").read_text())["superlink"]
    assert "docker/submit.py /app compose" in service["command"]
    assert known["compose"]["address"] == "superlink:8000"
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text()
    for switch in (
        "TELEMETRY_ENABLED=0",
        "DISABLE_UPDATE_CHECK=1",
        "DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1",
    ):
        assert switch in dockerfile
