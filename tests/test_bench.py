"""The benchmark's own rules: who takes part, what is counted, what its modules need."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parents[1] / "experiments" / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_run", BENCH / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_run", module)
    spec.loader.exec_module(module)
    return module


def test_a_ratio_has_both_its_contenders_and_pfl_is_in_two_rows(bench):
    """With and without pfl, whose rows then lack every trace of it and nothing else."""
    for row in bench.ROWS:
        rest = row.without("pfl")
        for r in (row, rest):
            assert {name for a, b, _ in r.ratios for name in (a, b)} <= set(r.contenders)
        assert set(row.contenders) - set(rest.contenders) == {"pfl"} & set(row.contenders)
        assert [r for r in row.ratios if r not in rest.ratios] == [r for r in row.ratios if "pfl" in r]
    assert [row.workload for row in bench.ROWS if "pfl" in row.contenders] == ["lenet", "cnn"]


def test_pfl_runs_in_the_named_interpreter(bench, monkeypatch, tmp_path):
    """It gets script, workload and rounds; the first round is warm-up."""
    python, asked = tmp_path / "python", tmp_path / "asked"
    python.write_text(f"""#!/bin/sh
printf '%s\\n' "$@" > {asked}
echo '{json.dumps({"rounds": [9.0, 1.0, 3.0, 2.0], "peak": 7.0})}'
""")
    python.chmod(0o755)
    monkeypatch.setenv("FEDSIM_PFL_PYTHON", str(python))
    found = bench.measured(bench.Row("lenet", ("pfl",), 4), 2)
    assert asked.read_text().split() == [str(BENCH / "contender_pfl.py"), "lenet", "4"]
    assert found["seconds"]["pfl"] == {"median": 2.0, "min": 2.0, "max": 2.0, "runs": [{"peak": 7.0}] * 2}


def test_an_interpreter_that_is_none_is_an_error_before_anything_runs(bench, monkeypatch, tmp_path, capsys):
    """The message names variable and value."""
    monkeypatch.setenv("FEDSIM_PFL_PYTHON", "no/such/python")
    assert bench.main(["lenet"], 1, tmp_path) == 2
    assert "FEDSIM_PFL_PYTHON is 'no/such/python'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_workloads_need_no_framework():
    """pfl's environment has neither Flower nor fedsim."""
    blocked = "import sys; sys.modules.update(flwr=None, fedsim=None, ray=None); import workloads"
    subprocess.run([sys.executable, "-c", blocked], cwd=BENCH, check=True)
