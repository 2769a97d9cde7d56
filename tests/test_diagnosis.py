"""What training says of itself: losses that are no number beside finite weights, steps that fp16 left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedsim.config import Experiment
from fedsim.diagnosis import of_losses, of_skipped_steps
from fedsim.finish import Result
from fedsim.hooks import Hook
from tests.helpers import run, tiny

APART = {"name": "pathological", "clients": 5, "classes_per_client": 2, "overlap": False}


class Notices(Hook):
    def __init__(self) -> None:
        self.said: list[str] = []

    def notice(self, text: str) -> None:
        self.said.append(text)


def overflowing(*overrides: str, below: int = 10, strategy: str = "fedavg") -> Experiment:
    client = {"name": "tests.overflowing_client:make", "below": below}
    tables = {"client": client, "partition": APART, "strategy": {"name": strategy}}
    return tiny("rounds=2", "compute.precision=fp16", *overrides, **tables)


def trained(experiment: Experiment, folder: Path) -> tuple[Result, list[str]]:
    notices = Notices()
    return run(experiment, folder, notices), notices.said


@pytest.mark.parametrize("strategy", ["fedavg", "flwr-fedavg"])
def test_clients_whose_steps_overflow_are_named_once_and_counted(strategy: str, tmp_path: Path) -> None:
    """Folded replies, and whole ones."""
    result, said = trained(overflowing(below=1, strategy=strategy), tmp_path)
    rows = [row for row in result.run.client_rows() if row["phase"] == "train"]
    odd = {row["client"] for row in rows if row["steps_skipped"] == 1}
    assert len(odd) == 1
    assert all(row["steps_skipped"] == 0 for row in rows if row["client"] not in odd)
    [line] = [text for text in said if "loss is NaN" in text]
    assert f"at client {next(iter(odd))}," in line
    assert "round 1" in line
    assert 'compute.precision = "bf16"' in line
    assert [row.get("odd_losses") for row in result.run.history()] == [None, 1, 1]
    assert all(np.isfinite(values).all() for values in result.state().values())


def test_a_run_whose_every_step_was_left_out_says_that_nothing_was_trained(tmp_path: Path) -> None:
    result, said = trained(overflowing("rounds=1"), tmp_path)
    assert [text for text in said if text.startswith("nothing was trained: fp16")] == said[-1:]
    assert result.run.history()[1]["train_steps_skipped"] == 1
    assert result.summary["accuracy"] == result.summary["accuracy_start"]


def test_a_loss_that_is_no_number_without_fp16_is_named_too(tmp_path: Path) -> None:
    _, said = trained(tiny("rounds=1", client={"name": "tests.noop_client:odd"}), tmp_path)
    [line] = [text for text in said if "loss is NaN" in text]
    assert "at clients 0, 1, 2, 3," in line
    assert "client.clip" in line


def test_ordinary_runs_are_told_nothing(tmp_path: Path) -> None:
    result, said = trained(tiny("rounds=1"), tmp_path)
    assert said == []
    assert all("steps_skipped" not in row for row in result.run.client_rows())
    half, said = trained(tiny("rounds=1", "compute.precision=fp16"), tmp_path / "half")
    assert said == []
    assert half.run.history()[1]["train_steps_skipped"] == 0


def test_many_clients_are_counted_not_listed() -> None:
    assert "clients 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, and 5 more, but" in of_losses(
        3, range(15), {client: {} for client in range(15)}
    )


def test_one_step_taken_is_no_run_without_training() -> None:
    rows = [{"round": 0}, {"train_steps_skipped": 1.0}, {"train_steps_skipped": 0.75}]
    assert of_skipped_steps(rows) is None
    assert of_skipped_steps(rows[:1]) is None
    assert of_skipped_steps(rows[:2]) is not None
