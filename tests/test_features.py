"""Features computed once: the same result, the backbone untouched, many times faster."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedsim import features
from fedsim.building import build
from fedsim.errors import UserError
from fedsim.models import resnet
from fedsim.models.base import Classifier, set_train_mode, train_only
from fedsim.payload import select
from tests.helpers import run, tiny
from tests.models.zoo import bert_folder, inputs, make

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


@pytest.mark.parametrize(
    ("tuning", "cut"),
    [
        ({"name": "head"}, 5),
        ({"name": "clip-adapter"}, 5),
        ({"name": "partial", "blocks": 1}, 3),
        ({"name": "partial", "blocks": 2}, 2),
        ({"name": "partial", "blocks": 3}, 0),  # the patch embedding alone is no work to save
        ({"name": "lora"}, 0),
        ({"name": "bias"}, 0),
        ({"name": "norm"}, 0),
        ({"name": "full"}, 0),
        ({"name": "vpt-deep"}, 0),  # nobody knows where added modules act
        ({"name": "adapter"}, 0),
    ],
)
def test_the_cut_is_as_high_as_nothing_below_it_changes(tuning: dict[str, Any], cut: int) -> None:
    task = build(experiment(True, tuning=tuning))
    assert task.cut == cut
    assert (task.network is task.model) == (cut == 0)
    assert (task.network is task.model.head) == (cut == 5)
    assert build(experiment(False, tuning=tuning)).cut == 0


def frozen_below(model: Classifier, name: str, train_modules: tuple[str, ...] = ()) -> int:
    """The cut when one parameter and the head train."""
    train_only(model, lambda n: n == name or n.startswith("head."), mode="test", train_modules=train_modules)
    return features.frozen_units(model, select(model, model.train_modules).changing)


def test_what_moves_without_gradients_is_above_the_cut(tmp_path: Path) -> None:
    last = "backbone.blocks.8.conv1.weight"
    assert frozen_below(make("cnn", tmp_path), last) == 9
    assert frozen_below(make("cnn", tmp_path), last, ("backbone.blocks.8",)) == 9
    assert frozen_below(make("cnn", tmp_path), last, ("backbone.blocks.4.bn1",)) == 5, "statistics"
    assert frozen_below(make("cnn", tmp_path), last, ("backbone",)) == 0
    last = "backbone.encoder.encoder.layer.1.output.dense.bias"
    assert frozen_below(make("bert", tmp_path), last) == 2
    assert frozen_below(make("bert", tmp_path), last, ("backbone.encoder.embeddings.dropout",)) == 0


def test_weights_shared_by_two_units_are_above_the_cut(tmp_path: Path) -> None:
    model = make("bert", tmp_path)
    layers: Any = model.backbone.encoder.encoder.layer
    layers[1].output.dense.weight = layers[0].output.dense.weight
    assert frozen_below(model, "backbone.encoder.encoder.layer.0.output.dense.weight") == 1


def test_modules_that_no_unit_names_may_act_anywhere(tmp_path: Path) -> None:
    model = make("cnn", tmp_path)
    model.backbone.gate = nn.Linear(2, 2)
    assert frozen_below(model, "backbone.blocks.8.conv1.weight") == 0
    assert frozen_below(model, "head.weight") == 11, "nothing at all changes in the backbone"
    model.gate = nn.Linear(2, 2)
    assert frozen_below(model, "gate.weight") == 0


def test_hooks_on_the_whole_are_not_missed(tmp_path: Path) -> None:
    """A mode of a user's own may register them."""
    last = "backbone.blocks.8.conv1.weight"
    model = make("cnn", tmp_path)
    model.backbone.register_forward_hook(lambda module, given, out: 2 * out)
    assert frozen_below(model, last) == 0
    assert frozen_below(model, "head.weight") == 11, "the table holds what the hook returns"
    model.register_forward_hook(lambda module, given, out: 2 * out)
    assert frozen_below(model, "head.weight") == 0


PARTIAL = {"name": "partial", "blocks": 1}


@pytest.mark.parametrize(
    "model",
    [
        {"name": "tiny-clip"},
        {"name": "resnet20"},  # BatchNorm in train mode above the cut
        {"name": "timm:vit_tiny_patch16_224", "image_size": 16},
        {"name": "timm:tf_efficientnet_lite0", "image_size": 16},
    ],
)
def test_partial_tuning_learns_the_same_with_and_without(model: dict[str, Any], tmp_path: Path) -> None:
    settings = {"model": model, "tuning": PARTIAL, "client": {"lr": 0.01, "batch_size": 16}, "rounds": 2}
    cached = run(experiment(True, **settings), tmp_path / "a")
    plain = run(experiment(False, **settings), tmp_path / "b")
    for name in ("loss", "train_loss"):
        np.testing.assert_allclose(cached.history[name], plain.history[name], atol=1e-6, rtol=1e-6)
    assert abs(plain.history["loss"].iloc[-1] - plain.history["loss"].iloc[0]) > 1e-4, "it learns"
    assert cached.state().keys() == plain.state().keys()
    for name, value in plain.state().items():
        np.testing.assert_allclose(cached.state()[name], value, atol=1e-5)


def test_token_ids_are_cut_above_their_padding(tmp_path: Path) -> None:
    """What is kept of a BERT layer says where the padding is."""
    folder = bert_folder(tmp_path / "bert")
    ids = inputs("bert", 40).numpy()
    ids[::3, 4:] = 0
    labels = np.arange(40) % 2
    file = tmp_path / "tokens.npz"
    np.savez(file, x_train=ids, y_train=labels, x_test=ids[:20], y_test=labels[:20])
    tables = {
        "data": {"name": f"npz:{file}"},
        "model": {"name": f"hf:{folder}", "pretrained": False},
        "tuning": PARTIAL,
    }
    cached, plain = (build(experiment(on, **tables)) for on in (True, False))
    assert (cached.cut, plain.cut) == (2, 0)
    rows = cached.data.client(0)
    for task in (cached, plain):
        set_train_mode(task.model, training=False)
    (x, labels_x), (y, labels_y) = cached.train_batch(rows), plain.train_batch(rows)
    assert x.dtype == torch.float32
    torch.testing.assert_close(cached.network(x), plain.network(y), rtol=1e-5, atol=1e-6)
    assert torch.equal(labels_x, labels_y)
    assert cached.evaluate_split("test")["loss"] == pytest.approx(plain.evaluate_split("test")["loss"], 1e-6)


def test_frozen_units_never_see_a_row_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))
    rows = {"stem": 0, "last": 0}
    stem, pooled = resnet.Stem.forward, resnet.mean_over_pixels

    def counted(self: resnet.Stem, x: torch.Tensor) -> torch.Tensor:
        rows["stem"] += len(x)
        return stem(self, x)

    def counted_last(x: torch.Tensor) -> torch.Tensor:
        rows["last"] += len(x)
        return pooled(x)

    monkeypatch.setattr(resnet.Stem, "forward", counted)
    monkeypatch.setattr(resnet, "mean_over_pixels", counted_last)
    text = experiment(True, model={"name": "resnet20"}, tuning=PARTIAL, rounds=5)
    run(text, tmp_path / "run")
    data = build(text).data
    used, test = len(data.partition.indices), len(data.arrays.test_x)
    probes = rows["stem"] - used - test
    assert 0 < probes <= 4, "single rows that tell the shape"
    assert rows["last"] == 5 * used + 6 * test


def test_what_would_be_too_large_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path))
    task = build(experiment(True, tuning=PARTIAL))
    rows = len(task.data.partition.indices) + len(task.data.arrays.test_x)
    size = rows * 17 * 64 * 4 / 1e9
    width = task.train_batch(task.data.client(0))[0].shape[1:]
    assert width == (17, 64)

    def settings(limit: float) -> Any:
        return tiny(f"features.limit={limit}", **{**HEAD, "tuning": PARTIAL})

    assert build(settings(size * 1.001)).cut == 3
    too_small = build(settings(size * 0.999))
    assert too_small.cut == 0
    assert too_small.network is too_small.model
    before = set((tmp_path / "features").iterdir())
    too_small.evaluate_split("test")
    assert set((tmp_path / "features").iterdir()) == before


def test_a_full_disk_is_an_error_that_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path))
    task = build(experiment(True, tuning=PARTIAL))

    def full(*args: Any, **options: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", full)
    with pytest.raises(UserError, match=r"No space left on device.*\[features\] cache = false"):
        task.evaluate_split("test")
    assert not list((tmp_path / "features").iterdir())


def test_cuts_and_tunings_never_share_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path))
    for number, tuning in enumerate((PARTIAL, {"name": "partial", "blocks": 2}, {"name": "head"}), start=1):
        for _ in range(2):
            build(experiment(True, tuning=tuning)).evaluate_split("test")
            assert len(list((tmp_path / "features").iterdir())) == number


def test_another_transform_never_shares_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the size that images are resized to nor how they are augmented changes a weight."""
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path))
    for size in (16, 24):
        model = {"name": "timm:tf_efficientnet_lite0", "image_size": size}
        build(experiment(True, model=model)).evaluate_split("test")
    assert len(list((tmp_path / "features").iterdir())) == 2
    for number, area in enumerate((1.0, 0.5, 0.25), start=1):
        task = build(experiment(True, augmentation={"area": area, "flip": True, "views": 1}))
        task.train_batch(task.data.client(0))
        assert len(list((tmp_path / "features").iterdir())) == 2 + number


def test_tunings_of_ours_with_the_same_cut_share_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a mode adds has a name in the state; somebody else's mode, or a hooked module, is apart."""
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path))

    def files() -> int:
        return len(list((tmp_path / "features").iterdir()))

    for tuning in ({"name": "head"}, {"name": "clip-adapter"}, {"name": "prompt", "tokens": 2}):
        build(experiment(True, tuning=tuning)).evaluate_split("test")
        assert files() == 1
    build(experiment(True, tuning={"name": "tests.test_features:hooking"})).evaluate_split("test")
    assert files() == 2

    hooked = build(experiment(True))
    hooked.model.backbone.visual.transformer.register_forward_hook(lambda module, given, out: 2 * out)
    hooked.evaluate_split("test")
    assert files() == 3


def hooking(model: Classifier, /) -> Classifier:
    """A mode that changes what a frozen module puts out."""
    model.backbone.visual.transformer.register_forward_hook(lambda module, given, out: 3 * out)
    return train_only(model, lambda name: name.startswith("head."), mode="hooking")


def test_features_of_all_rows_serve_every_seed_and_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path))
    for seed in range(2):
        for shots in (2, 4):
            given = experiment(True, seed=seed, features={"rows": "all"})
            task = build(given.replace(f"partition.shots={shots}", "features.cache=true"))
            rows = task.data.client(1)
            with torch.no_grad():
                expected = task.model.backbone(torch.from_numpy(task.data.arrays.train_x[rows]))
            torch.testing.assert_close(task.train_batch(rows)[0], expected, rtol=1e-5, atol=1e-5)
            assert len(list((tmp_path / "features").iterdir())) == 1


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


def test_a_table_made_in_the_middle_of_a_batch_leaves_the_modules_modes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path))
    task = build(experiment(True, model={"name": "resnet20"}, tuning=PARTIAL))
    set_train_mode(task.model, training=True)
    before = {name: module.training for name, module in task.model.named_modules()}
    assert before["backbone.blocks.8.bn1"]
    task.train_batch(task.data.client(0))
    assert {name: module.training for name, module in task.model.named_modules()} == before
