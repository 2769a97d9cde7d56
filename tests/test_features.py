"""Features computed once: the same result, the backbone untouched, many times faster."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsim import features
from fedsim.task import build
from tests.helpers import run, tiny

HEAD = {"model": {"name": "tiny-clip"}, "tuning": {"name": "head"}, "client": {"lr": 0.1, "batch_size": 16}}


def experiment(cache: bool, **changes: Any) -> Any:
    return tiny(f"features.cache={str(cache).lower()}", **{**HEAD, **changes})


def test_the_same_result_with_and_without(tmp_path: Path) -> None:
    cached = run(experiment(True), tmp_path / "a")
    plain = run(experiment(False), tmp_path / "b")
    assert cached.summary["accuracy"] == plain.summary["accuracy"]
    assert cached.summary["loss"] == pytest.approx(plain.summary["loss"], rel=1e-5)
    for name, value in plain.state().items():
        np.testing.assert_allclose(cached.state()[name], value, atol=1e-5)
    again = run(experiment(True), tmp_path / "c")
    assert again.summary["digest"] == cached.summary["digest"]


def test_features_are_the_backbones_outputs_row_by_row() -> None:
    task = build(experiment(True))
    assert task.network is task.model.head
    rows = task.data.client(2)[::-1].copy()
    with torch.no_grad():
        expected = task.model.backbone(torch.from_numpy(task.data.arrays.train_x[rows]))
    inputs, labels = task.train_batch(rows)
    torch.testing.assert_close(inputs, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(labels, task.data.arrays.train_y[rows])
    unused = np.setdiff1d(np.arange(len(task.data.arrays.train_y)), task.data.partition.indices)
    with pytest.raises(IndexError, match="no client and no split uses"):
        task.train_batch(unused[:1])


def test_the_backbone_is_not_touched_once_the_cache_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    warm = build(experiment(True))
    warm.evaluate_split("test")
    warm.train_batch(warm.data.client(0))
    task = build(experiment(True))
    monkeypatch.setattr(features, "_computed", lambda *a: pytest.fail("computed again"))
    monkeypatch.setattr(task.model.backbone, "forward", lambda *a: pytest.fail("backbone used"))
    assert task.evaluate_split("test") == warm.evaluate_split("test")
    task.train_batch(task.data.client(0))


def test_only_when_nothing_of_the_backbone_changes() -> None:
    assert build(experiment(True, tuning={"name": "bias"})).network is not None
    for tuning in ("bias", "full", "norm"):
        task = build(experiment(True, tuning={"name": tuning}))
        assert task.network is task.model
    assert build(experiment(False)).network is not build(experiment(False)).model.head


def test_another_model_or_other_data_never_share_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path))
    for change in (
        {},
        {"data": {"name": "digits", "noise": 0.1}},
        {"model": {"name": "cnn"}},
        {"model": {"name": "cnn"}, "seed": 1},
    ):
        build(experiment(True, **change)).evaluate_split("test")
    assert len(list((tmp_path / "features").iterdir())) == 4
    (file, *_) = sorted((tmp_path / "features").iterdir())
    before = np.load(file)
    file.write_bytes(file.read_bytes()[:200])
    for change in ({}, {"data": {"name": "digits", "noise": 0.1}}, {"model": {"name": "cnn"}}):
        build(experiment(True, **change)).evaluate_split("test")
    build(experiment(True, model={"name": "cnn"}, seed=1)).evaluate_split("test")
    np.testing.assert_array_equal(np.load(file), before)


def test_faster(tmp_path: Path) -> None:
    """Training of one client in one process; tiny-clip is tiny: real backbones gain far more."""
    from clients.training import back_propagation

    def seconds(cache: bool) -> float:
        task = build(experiment(cache))
        rows = task.data.client(0)
        task.train_batch(rows)
        began = time.perf_counter()
        for _ in range(20):
            back_propagation(task, *task.train_batch(rows))
        return time.perf_counter() - began

    ratios = [seconds(False) / seconds(True) for _ in range(3)]
    assert sorted(ratios)[1] > 5
