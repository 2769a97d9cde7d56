"""What the documentation says is what the code does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

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
