"""experiments/gpu without a GPU: every script runs in its smallest size and writes what it promises."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedsim.errors import UserError

GPU = Path(__file__).parents[1] / "experiments" / "gpu"
NAMES = ("common", "nets", "throughput", "memory", "clip_vit", "forget", "suite", "run")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script as it finds its neighbours: by a plain name, in its own folder."""
    monkeypatch.syspath_prepend(str(GPU))
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module
    for name in NAMES:
        sys.modules.pop(name, None)


def rehearsed(module: ModuleType, out: Path, *more: str) -> list[dict[str, Any]]:
    """Rows of a rehearsal; the file names the machine."""
    module.main(["--device", "cpu", "--tiny", "--out", str(out), *more])
    whole = json.loads(out.read_text("utf-8"))
    assert whole["tiny"] is True
    assert whole["machine"]["card"] == "none: cpu"
    assert {"torch", "driver", "date", "commit", "code", "python"} <= whole["machine"].keys()
    rows: list[dict[str, Any]] = whole["rows"]
    return rows


def test_clients_per_second(script, tmp_path):
    """Loop and engine on a workload with images and on one with computed features."""
    names = ["lenet", "tiny-clip prompt"]
    rows = rehearsed(script("throughput"), tmp_path / "t.json", "--workloads", ",".join(names))
    assert [(row["workload"], row["contender"]) for row in rows] == [
        (name, contender) for name in names for contender in ("loop", "serial", "serial-free")
    ]
    for row in rows:
        assert len(row["rounds"]) == 2
        assert row["clients_per_second"] == pytest.approx(2 / (sum(row["rounds"]) / 2), rel=0.05)


def test_memory_of_a_step(script, tmp_path, monkeypatch):
    """Measured on the CPU and foreseen on `meta` are the same number; blocks take less than everything."""
    memory = script("memory")
    monkeypatch.setattr(memory, "METHODS", ("dgl",))
    rows = rehearsed(memory, tmp_path / "m.json")
    memory.main(["--device", "meta", "--tiny", "--out", str(tmp_path / "f.json")])
    assert [row["method"] for row in rows] == ["bp", "dgl"]
    assert rows == json.loads((tmp_path / "f.json").read_text("utf-8"))["rows"]
    assert rows[0]["ratio"] == 1 > rows[1]["ratio"] + 0.1


def test_images_per_second_of_a_clip(script, tmp_path):
    """Biases and prompts in three precisions; nobody takes random weights for trained ones."""
    rows = rehearsed(script("clip_vit"), tmp_path / "c.json")
    assert {row["precision"] for row in rows} == {"fp32", "bf16", "fp16"}
    trained = {row["setting"]: row["trained"] for row in rows}
    assert trained["prompt"] == trained["prompt, cached features"] < trained["bias"]
    assert all(row["weights"] == "random" and row["images_per_second"] > 0 for row in rows)


def test_train_and_forget(script, tmp_path, monkeypatch):
    """The same phases with the runs in this process; the judge finds them all."""
    forget = script("forget")

    def here(names, folder, limit):
        for name in names:
            forget.one(name, folder)
        return dict.fromkeys(names, 0.0)

    monkeypatch.setattr(forget, "together", here)
    small = ["--set", "partition.clients=2", "--set", "strategy.fraction=1.0", "--set", "client.epochs=1"]
    rows = rehearsed(forget, tmp_path / "f.json", "--methods", "head-mask", *small)
    assert [row["phase"] for row in rows[:2]] == ["train", "forget"]
    assert rows[1]["ends"].keys() == {"head-mask", "retrain", "retrain-2"}
    assert rows[1]["ends"]["head-mask"]["forget_accuracy"] == 0
    judged = {row["method"]: row for row in rows[2:]}
    assert judged.keys() == {"original", "head-mask", "retrain", "retrain-2"}
    assert judged["head-mask"]["figures"]["forget_test"] == 0


def test_a_run_that_fails_or_takes_too_long_is_named(script, tmp_path):
    """One has no run to open, the other no time."""
    forget = script("forget")
    assert (
        f"FileNotFoundError: [Errno 2] No such file or directory: '{tmp_path}/run/"
        in forget.together(["run"], tmp_path, 60)["run"]
    )
    assert forget.together(["run"], tmp_path, 0)["run"] == "ended with -9"


def test_the_queue_passes_its_arguments_on_and_counts_failures(script, tmp_path, monkeypatch, capsys):
    """One file for each script; one failure does not stop the next one."""
    queue = script("run")
    asked: list[list[str]] = []

    def started(command, **options):
        asked.append(command)
        return queue.subprocess.CompletedProcess(command, 3 if "memory.py" in command[1] else 0)

    monkeypatch.setattr(queue.subprocess, "run", started)
    assert queue.main(["--device", "cpu", "--tiny", "--out", str(tmp_path)]) == 1
    assert [Path(command[1]).stem for command in asked] == list(queue.SCRIPTS)
    assert all((GPU / Path(command[1]).name).is_file() for command in asked)
    assert {"cpu", "--tiny"} <= set(asked[0])
    assert {command[3] for command in asked} == {str(tmp_path / f"gpu_{name}.json") for name in queue.SCRIPTS}
    assert "memory: 3," in capsys.readouterr().out
    with pytest.raises(SystemExit):
        queue.main(["speed"])
    assert "no script 'speed'; there are suite," in capsys.readouterr().err


def test_without_a_gpu_a_measurement_is_refused(script, tmp_path, monkeypatch):
    """The fix is a rehearsal; nothing is written."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="--device cpu --tiny"):
        script("throughput").main(["--out", str(tmp_path / "t.json")])
    assert not list(tmp_path.iterdir())


def test_what_was_measured_names_its_card() -> None:
    """Every committed file of the queue, except what is foreseen without a card."""
    files = sorted((GPU.parent / "results").glob("gpu_*.json"))
    assert len(files) == 6
    for file in files:
        whole = json.loads(file.read_text("utf-8"))
        assert whole["rows"]
        assert whole["tiny"] is False
        foreseen = file.name == "gpu_memory_foreseen.json"
        assert whole["machine"]["card"] == ("none: meta" if foreseen else "NVIDIA H200")
