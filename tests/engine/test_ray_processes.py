"""What a run on RayGrid leaves behind when its process ends early: no process, and a run that can go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

import pytest

from fedsim.finish import run_experiment
from fedsim.runs import Run
from tests.helpers import HEARS_CTRL_C, tiny

CLIENT = {"lr": 0.1, "epochs": 60}  # rounds long enough that a test that is held up does not miss the run
PARTITION = {"name": "iid", "clients": 6, "shots": 4}
ROUNDS = 30
#: Ray's own, by title or command
AGENTS = ("ray::Dashboard", "ray::RuntimeEnv", "dashboard/agent.py", "runtime_env/agent/main.py")


def newest(folder: Path) -> int:
    """Round of the newest checkpoint (-1: there is none)."""
    return max((int(p.stem[6:]) for p in (folder / "checkpoints").glob("round-*.safetensors")), default=-1)


class Driver:
    """`fedsim run` or `fedsim resume` in a session of its own."""

    def __init__(self, *arguments: str) -> None:
        program = f"import sys; from fedsim.cli import main; sys.argv = {['fedsim', *arguments]!r}; main()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", HEARS_CTRL_C + program],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def others(self) -> list[str]:
        """Names and commands of the other processes of its session: Ray's titles are not always there."""
        found = []
        for folder in Path("/proc").iterdir():
            try:
                stat = (folder / "stat").read_text()
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            name, _, rest = stat.partition("(")[2].rpartition(")")
            fields = rest.split()
            if int(fields[3]) == self.process.pid != int(folder.name) and fields[0] != "Z":
                found.append(f"{name} {command.strip()}")
        return found

    def wait_for_round(self, folder: Path, number: int) -> None:
        """Until a checkpoint of that round or a later one is there."""
        deadline = time.monotonic() + 250
        while newest(folder) < number:
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def gone_within(self, seconds: float, *but: str) -> bool:
        """True when all processes of the session but some have ended by then."""
        deadline = time.monotonic() + seconds
        while any(not any(part in name for part in but) for name in self.others()):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True


@pytest.mark.timeout(900)
def test_a_run_that_is_interrupted_then_killed_ends_with_the_digest_of_a_quiet_one(tmp_path: Path) -> None:
    engine = {"name": "ray", "workers": 2}
    experiment = tiny(f"rounds={ROUNDS}", engine=engine, partition=PARTITION, client=CLIENT)
    quiet = run_experiment(
        tiny(f"rounds={ROUNDS}", partition=PARTITION, client=CLIENT),
        Run.create(experiment, tmp_path / "serial"),
    )
    run = Run.create(experiment, tmp_path)

    with Driver("resume", str(run.folder)) as first:
        first.wait_for_round(run.folder, 2)
        os.killpg(first.process.pid, signal.SIGINT)  # what a terminal does on Ctrl-C
        output = first.process.communicate(timeout=60)[0]
    assert first.process.returncode == 130, output
    assert f"interrupted; go on with: fedsim resume {run.folder}" in output
    assert "ray" not in output.lower()
    assert first.gone_within(10)

    with Driver("resume", str(run.folder)) as second:
        second.wait_for_round(run.folder, newest(run.folder) + 2)
        names = second.others()
        assert any("ray::Worker" in name or "default_worker.py" in name for name in names), names
    # Ray's own agents notice after half a minute or more; everything that costs anything is gone at once
    assert second.gone_within(10, *AGENTS), second.others()

    with Driver("resume", str(run.folder)) as third:
        output = third.process.communicate(timeout=250)[0]
    assert third.process.returncode == 0, output
    assert third.gone_within(10)
    assert run.summary()["digest"] == quiet.summary["digest"]


@pytest.mark.timeout(900)
def test_two_runs_at_once_do_not_meet(tmp_path: Path) -> None:
    """Each has a Ray of its own, and both end with the digest of a quiet run."""
    experiment = tiny(engine={"name": "ray", "workers": 1}, partition=PARTITION)
    file = tmp_path / "tiny.toml"
    file.write_text(experiment.toml())
    quiet = run_experiment(
        tiny(partition=PARTITION), Run.create(tiny(partition=PARTITION), tmp_path / "quiet")
    )
    words = ("run", str(file), "--folder", str(tmp_path / "runs"), "--name")
    with Driver(*words, "one") as one, Driver(*words, "two") as two:
        for driver in (one, two):
            said, _ = driver.process.communicate(timeout=300)
            assert driver.process.returncode == 0, said
    digests = {Run(tmp_path / "runs" / name).summary()["digest"] for name in ("one", "two")}
    assert digests == {quiet.summary["digest"]}
