"""What the documentation says is what the code does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsim import config
from tests.helpers import run

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """The files of docs/custom_strategy.md, written as the page says: `name`: ... then a block."""
    text = (ROOT / "docs" / "custom_strategy.md").read_text("utf-8")
    found = re.findall(r"^`([\w.]+)`:.*?^```\w+\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in found] == ["robust.py", "median.toml", "test_robust.py"]
    for name, block in found:
        (tmp_path / name).write_text(block)
    return tmp_path


def test_the_custom_strategy_runs_and_is_short(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "robust", raising=False)
    assert len((page / "robust.py").read_text().splitlines()) <= 25
    result = run(config.load(page / "median.toml"), page / "runs")
    assert result.summary["strategy"] == "robust:Median"
    assert result.summary["accuracy"] > result.summary["accuracy_start"] + 0.3


def test_its_own_test_passes(page: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_robust.py"],
        cwd=page, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_the_page_on_own_data_says_what_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its example and the card it shows; keys and shapes of its tables; the table of attributes."""
    from fedsim.data.archives import keys_of
    from fedsim.data.attribute_tables import read
    from fedsim.data.layouts import arranged

    text = (ROOT / "docs" / "own_data.md").read_text("utf-8")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    card, table = re.findall(r"^```text\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out == card
    (tmp_path / "attributes.csv").write_text(table)
    found, z, _ = read(tmp_path, [tmp_path / "cat" / "1.png", tmp_path / "cat" / "2.png"])
    assert [attribute.name for attribute in found] == ["age", "town"]
    assert z is not None
    assert z[1, 0] == -1
    shapes = re.findall(r"^\| `\[n, ([\d, ]+)\]` \| `(\w+)` \|$", text, re.MULTILINE)
    assert len(shapes) == 8
    for sides, layout in shapes:
        x = np.random.default_rng(0).normal(size=(2, *map(int, sides.split(", "))))
        told, said = (arranged({"x": x}, chosen, "")[0]["x"] for chosen in ("auto", layout))
        np.testing.assert_array_equal(told, said)
    names = [
        line for line in text.splitlines() if line.startswith("| ") and ("x_train" in line or "`x`" in line)
    ]
    whole = re.findall(r"`(\w+)`, `(\w+)`", names[1])
    assert len(whole) == 5
    assert all(keys_of(pair, "") == {"train": pair} for pair in whole)


def test_the_page_on_local_learning_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks of Python, top to bottom; a network of one's own takes 20 lines."""
    text = (ROOT / "docs" / "local_learning.md").read_text("utf-8")
    use, net, method = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    space: dict[str, Any] = {}
    exec(use, space)
    assert space["loss"].isfinite()
    exec(net, space)
    assert space["model"].blocks == 3
    own = net[net.index("class Net") : net.index("model =")]
    assert len([line for line in own.splitlines() if line.strip()]) <= 20
    exec(method, space)
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    local = space["LocallySupervised"](space["model"].model, space["two_heads"], 3, weight=0.3)
    assert [window.weight for window in local.windows] == [0.3, 0.3, 1.0]
    assert local.gradients(images, torch.tensor([0, 1])).isfinite()


def test_tables_are_what_their_json_says() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "experiments" / "tables.py"), "--check"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_readme_shows_the_quickstart_file_as_it_is() -> None:
    block = re.search(r"```toml\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert block is not None
    shipped = (ROOT / "experiments" / "quickstart.toml").read_text("utf-8")
    assert block[1] == "".join(line for line in shipped.splitlines(True) if not line.startswith("#"))


def test_the_quickstart_reaches_what_the_readme_says() -> None:
    """Bars: start at most 0.70, end at least 0.10 above it and 0.05 above local-only (mean of 3 seeds)."""
    results = json.loads((ROOT / "experiments" / "results" / "quickstart.json").read_text("utf-8"))
    rows = [result["summary"] for result in results]
    assert len({result["cell"]["seed"] for result in results}) == 3

    def mean(key: str) -> float:
        return sum(float(row[key]) for row in rows) / len(rows)

    assert mean("accuracy_start") <= 0.70
    assert mean("accuracy") >= mean("accuracy_start") + 0.10
    assert mean("accuracy") >= mean("accuracy_local_only") + 0.05


def test_the_quickstart_is_what_the_table_says(tmp_path: Path) -> None:
    """Seed 0 run here: the same start, the same end (other processors round differently)."""
    results = json.loads((ROOT / "experiments" / "results" / "quickstart.json").read_text("utf-8"))
    listed = next(r["summary"] for r in results if r["cell"]["seed"] == 0)
    summary = run(config.load("quickstart", ["baselines=[]"]), tmp_path).summary
    for key in ("rounds", "clients", "bytes_up", "bytes_down"):
        assert summary[key] == listed[key]
    assert abs(summary["accuracy_start"] - listed["accuracy_start"]) < 0.01
    assert abs(summary["accuracy"] - listed["accuracy"]) < 0.03
