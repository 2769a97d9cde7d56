"""Global test, clients' local tests, base and new classes: the numbers the field reports."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.nn import functional

from clients.training import back_propagation
from fedsim.building import build
from fedsim.errors import UserError
from fedsim.evaluation import over_clients
from fedsim.models.base import Classifier, DataInfo
from fedsim.models.cnn import cnn
from fedsim.scores import Scores, scores_of
from fedsim.terminal import baselines_of, closing_table
from tests.helpers import run, tiny
from tests.test_rounds import Notices

CLIP: dict[str, Any] = {"model": {"name": "tiny-clip"}, "data": {"name": "digits", "rotate": 25.0}}
SKEWED = {"partition": {"name": "dirichlet", "clients": 4, "alpha": 0.3}}
KINDS = ("accuracy", "loss")


def test_scores_among_all_classes_and_among_those_of_the_labels_kind() -> None:
    logits, labels = torch.randn(40, 5), torch.arange(40) % 5
    found = scores_of(logits, labels, base=3)
    torch.testing.assert_close(found.loss, functional.cross_entropy(logits, labels, reduction="none"))
    assert torch.equal(found.hit, logits.argmax(1) == labels)
    for rows, columns in ((labels < 3, slice(0, 3)), (labels >= 3, slice(3, 5))):
        kept, own = logits[rows][:, columns], labels[rows] - columns.start
        torch.testing.assert_close(
            found.own_loss[rows], functional.cross_entropy(kept, own, reduction="none")
        )
        assert torch.equal(found.own_hit[rows], kept.argmax(1) == own)
    whole = scores_of(logits, labels, base=5)
    assert torch.equal(whole.own_loss, whole.loss)
    assert torch.equal(whole.own_hit, whole.hit)


def test_parts_of_scores() -> None:
    logits, labels = torch.randn(30, 4), torch.arange(30) % 4
    parts = [scores_of(logits[i : i + 7], labels[i : i + 7], 4) for i in range(0, 30, 7)]
    whole = Scores.joined(parts)
    rows = np.array([3, 29, 11])
    assert whole.means()["num-examples"] == 30
    assert whole.means()["accuracy"] == (logits.argmax(1) == labels).double().mean().item()
    expected = functional.cross_entropy(logits[rows], labels[rows]).item()
    assert whole.at(rows).means()["loss"] == pytest.approx(expected)
    nothing = Scores.joined([]).means()
    assert nothing["num-examples"] == 0
    assert np.isnan([nothing["loss"], nothing["accuracy"]]).all()  # nothing measured is not 0 %


def test_over_clients() -> None:
    rows = [{"accuracy": a, "loss": 1 - a, "local_accuracy": 1.0, "seconds": 9} for a in (0.2, 0.4, 0.9)]
    found = over_clients(rows)
    assert found["accuracy"] == pytest.approx(0.5)
    assert found["accuracy_spread"] == pytest.approx(np.std([0.2, 0.4, 0.9]))
    assert (found["accuracy_worst"], found["loss_worst"]) == (0.2, 0.8)
    assert (found["local_accuracy"], found["local_accuracy_spread"]) == (1.0, 0.0)
    assert not any("seconds" in key for key in found)


def test_the_server_and_the_clients_measure_the_same(tmp_path: Path) -> None:
    """Nothing is personal, so every client has the server's model."""
    given = tiny("evaluation.split=both", **CLIP, **SKEWED)
    server = run(given, tmp_path / "server").history.iloc[-1]
    clients = run(given.replace("evaluation.where=clients"), tmp_path / "clients").history.iloc[-1]
    keys = [f"local_{kind}{what}" for kind in KINDS for what in ("", "_spread", "_worst")]
    assert server[keys].to_dict() == pytest.approx(clients[keys].to_dict(), rel=1e-6)
    assert server["local_accuracy_spread"] > 0
    assert server["local_accuracy_worst"] < server["local_accuracy"]
    assert server["accuracy"] == clients["accuracy"] == clients["accuracy_worst"]
    only = run(given.replace("evaluation.split=local"), tmp_path / "only").history.iloc[-1]
    assert only["accuracy"] == server["local_accuracy"]


def test_local_tests_are_rows_of_the_test_set_with_the_clients_class_mix() -> None:
    task = build(tiny(**CLIP, **SKEWED))
    scores = task.test_scores()
    arrays = task.data.arrays
    rows = task.data.local_test(2)
    with torch.no_grad():
        hit = task.model(torch.from_numpy(arrays.test_x[rows])).argmax(1).numpy() == arrays.test_y[rows]
    assert task.evaluate_local(scores, 2)["accuracy"] == pytest.approx(hit.mean())
    assert task.evaluate_split("local", 2) == task.evaluate_local(scores, 2)
    both = task.evaluate_split("both", 2)
    assert both["accuracy"] == task.evaluate_split("test")["accuracy"]
    assert both["local_accuracy"] == task.evaluate_split("local", 2)["accuracy"]


@pytest.fixture(scope="module")
def untested(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Three clients, each with one of three easy classes; the test set lacks the class of client 1."""
    path = tmp_path_factory.mktemp("data") / "points.npz"
    y = np.arange(90) % 3
    x = np.eye(3, 8, dtype=np.float32)[y]
    np.savez(path, x_train=x, y_train=y, groups=y, x_test=x[y != 1], y_test=y[y != 1])
    return {"data": {"name": f"npz:{path}"}, "partition": {"name": "natural", "clients": 3}}


@pytest.mark.parametrize("where", ["server", "clients"])
@pytest.mark.parametrize("split", ["local", "both"])
def test_a_client_without_tests_is_left_out_counted_and_named_once(
    where: str, split: str, untested: dict[str, Any], tmp_path: Path
) -> None:
    notices = Notices()
    given = tiny(
        f"evaluation.where={where}", f"evaluation.split={split}", "client.lr=0.5", "rounds=6", **untested
    )
    summary = run(given, tmp_path, notices).summary
    key = "accuracy" if split == "local" else "local_accuracy"
    assert (summary[key], summary[f"{key}_worst"], summary[f"{key}_spread"]) == (1.0, 1.0, 0.0)
    assert summary[f"{key}_unmeasured"] == summary[f"{key.replace('accuracy', 'loss')}_unmeasured"] == 1
    assert notices.texts == ["round 0: client 1 left out of the mean: no local test samples"]
    console = Console(file=io.StringIO(), width=100)
    console.print(closing_table(summary, []))
    assert "1 client not measured" in console.file.getvalue()  # type: ignore[attr-defined]


def test_what_is_derived_from_local_tests_leaves_the_client_out_too(
    untested: dict[str, Any], tmp_path: Path
) -> None:
    """Fine-tuned models, and the baseline of every client alone."""
    given = tiny("evaluation.fine_tune=3", "evaluation.split=local", "rounds=1", **untested)
    tuned = run(given, tmp_path / "tuned").summary
    assert (tuned["accuracy"], tuned["accuracy_worst"], tuned["accuracy_unmeasured"]) == (1.0, 1.0, 1)
    local = tiny("evaluation.split=local", "rounds=1", baselines=["local-only"], **untested)
    summary = run(local, tmp_path / "local").summary
    assert summary["accuracy_local_only"] == 1.0
    assert summary["accuracy_local_only_unmeasured"] == 1
    assert baselines_of(summary) == {"local-only": 1.0}


def test_where_nobody_can_be_measured_the_figure_is_nan(tmp_path: Path) -> None:
    """The test set has a class that no client has."""
    y = np.arange(20) % 2
    points = np.eye(3, 8, dtype=np.float32)
    np.savez(tmp_path / "d.npz", x_train=points[y], y_train=y, groups=y, x_test=points[[2, 2]], y_test=[2, 2])
    own = {"data": {"name": f"npz:{tmp_path / 'd.npz'}"}, "partition": {"name": "natural", "clients": 2}}
    notices = Notices()
    summary = run(tiny("evaluation.split=both", "rounds=1", **own), tmp_path, notices).summary
    assert np.isnan(summary["local_accuracy"])
    assert summary["local_accuracy_unmeasured"] == 2
    assert np.isfinite(summary["accuracy"])  # of the whole test set, which is there
    assert notices.texts == ["round 0: clients 0, 1 left out of the mean: no local test samples"]


def test_the_summary_has_the_start_beside_every_accuracy(tmp_path: Path) -> None:
    given = tiny("evaluation.split=both", "partition.new_classes=4", "client.lr=0.5", **CLIP)
    result = run(given.replace("tuning.name=prompt", "tuning.tokens=4"), tmp_path)
    first, last = result.history.iloc[0], result.history.iloc[-1]
    for key in ("local_accuracy", "base_accuracy", "new_accuracy"):
        assert result.summary[key] == last[key]
        assert result.summary[f"{key}_start"] == first[key]
    console = Console(file=io.StringIO(), width=80)
    console.print(closing_table(result.summary, []))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for name in ("local", "base", "new"):
        start, end = result.summary[f"{name}_accuracy_start"], result.summary[f"{name}_accuracy"]
        assert f"{name} test" in shown
        assert f"{start:.3f} → {end:.3f}" in shown
    assert f"worst client {result.summary['local_accuracy_worst']:.3f}" in shown
    base, new = result.summary["base_accuracy"], result.summary["new_accuracy"]
    assert result.summary["harmonic_accuracy"] == pytest.approx(2 / (1 / base + 1 / new))


def schooled(data: DataInfo, /) -> Classifier:
    """A model whose start would mislead."""
    model = cnn(data, width=4)
    model.schooling = "ImageNet-supervised transfer"
    return model


def test_a_start_that_would_mislead_is_explained(tmp_path: Path) -> None:
    result = run(tiny("rounds=1", model={"name": f"{__name__}:schooled"}), tmp_path)
    assert result.summary["start_note"] == "ImageNet-supervised transfer, no digits label used"
    plain = run(tiny("rounds=1", "name=plain"), tmp_path)
    assert "start_note" not in plain.summary


# ------------------------------------------------------------------------------------- base to new


def test_nobody_trains_on_new_classes() -> None:
    task = build(tiny("partition.new_classes=4", "evaluation.validation=0.2", **CLIP))
    labels = np.asarray(task.data.arrays.train_y)
    assert set(labels[task.data.partition.indices]) == set(range(6))
    assert set(labels[task.data.validation]) == set(range(6))
    assert set(np.asarray(task.data.arrays.test_y)) == set(range(10))


def test_new_classes_are_no_rivals_in_training() -> None:
    """Their rows of a head get no gradient; the loss is that of a classifier without them."""
    task = build(tiny("partition.new_classes=4", tuning={"name": "head"}, **CLIP))
    inputs, labels = task.train_batch(task.data.client(0))
    expected = functional.cross_entropy(task.network(inputs)[:, :6], labels)
    assert back_propagation(task, inputs, labels).item() == pytest.approx(expected.item())
    gradient = task.model.head.weight.grad
    assert isinstance(gradient, torch.Tensor)
    assert (gradient[:6].abs().sum(1) > 0).all()
    assert (gradient[6:] == 0).all()


def test_base_and_new_accuracy_are_those_of_two_separate_tasks() -> None:
    task = build(tiny("partition.new_classes=4", **CLIP))
    arrays = task.data.arrays
    found = task.evaluate_split("test")
    with torch.no_grad():
        logits = task.model(torch.from_numpy(np.array(arrays.test_x))).numpy()
    y = np.asarray(arrays.test_y)
    assert found["base_accuracy"] == pytest.approx((logits[y < 6, :6].argmax(1) == y[y < 6]).mean())
    assert found["new_accuracy"] == pytest.approx((logits[y >= 6, 6:].argmax(1) + 6 == y[y >= 6]).mean())
    assert found["accuracy"] == pytest.approx((logits.argmax(1) == y).mean())
    assert "base_accuracy" not in build(tiny(**CLIP)).evaluate_split("test")


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"new_classes = 9, but the data have 10 classes.* at most 8"):
        build(tiny("partition.new_classes=9"))
    file = tmp_path / "base.npz"
    x, y = np.zeros((60, 4), np.float32), np.arange(60) % 3
    np.savez(file, x_train=x, y_train=y, x_test=x[y < 2], y_test=y[y < 2], classes=np.array(["a", "b", "c"]))
    with pytest.raises(UserError, match="the test set has samples of base classes alone"):
        build(tiny("partition.new_classes=1", data={"name": f"npz:{file}"}))
    with pytest.raises(UserError, match=r'fine_tune is done by clients: set evaluation\.where = "clients"'):
        run(tiny("evaluation.fine_tune=2", "evaluation.where=server"), tmp_path)


# ------------------------------------------------------------------------------------- fine-tuning


def test_fine_tuning_before_measuring_is_local_training_and_leaves_nothing(tmp_path: Path) -> None:
    whole = (
        "rounds=1",
        "tuning.name=bias",
        "client.batch_size=1000",
        "client.steps=3",
        "client.lr=0.01",
        "evaluation.split=both",
    )
    plain = run(tiny(*whole, **CLIP), tmp_path / "plain")
    tuned = run(tiny(*whole, "evaluation.fine_tune=3", **CLIP), tmp_path / "tuned")
    alone = run(tiny(*whole, strategy={"name": "local-only"}, **CLIP), tmp_path / "alone")
    assert tuned.summary["digest"] == plain.summary["digest"]
    assert "digest_personal" not in tuned.summary
    for key in ("accuracy", "local_accuracy", "loss", "local_accuracy_worst"):
        assert tuned.history[key][0] == pytest.approx(alone.history[key][1], rel=1e-4)
    assert tuned.history["local_loss"][1] < plain.history["local_loss"][1]
