"""What the server measures of the shared state: test and validation split, and what is to be forgotten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsim import messages
from fedsim.task import Task

if TYPE_CHECKING:
    from fedsim.data.forgotten import Forgotten


def server_metrics(task: Task) -> dict[str, float]:
    """`accuracy` and `loss` of the resident model on the test data, `validation_...` where there is a split.

    With `[evaluation] split = "local"` they are means over the clients' local test parts (with spread and
    worst), with `"both"` those are there, too, as `local_...`. Where something is to be forgotten, also
    `forget_accuracy`, `retain_accuracy` and, for classes, `validation_forget_accuracy`; the validation split
    is then that of the retained classes. Where attributes are to be unlearned, what fresh attackers read of
    them (`fedsim/unlearning/measure.py`).
    """
    scores = task.test_scores()
    found = task.measure(scores)
    count = found.pop(messages.EXAMPLES)
    if task.data.forgotten is not None:
        found |= _forgotten_metrics(task, task.data.forgotten, found["accuracy"], count)
    split = task.experiment.settings["evaluation"]["split"]
    if split != "test":
        local = over_clients([task.evaluate_local(scores, who) for who in range(task.experiment.clients)])
        prefix = "local_" if split == "both" else ""
        found |= {f"{prefix}{key}": value for key, value in local.items()}
    if len(task.data.validation):
        held = task.evaluate_split("validation")
        found |= {"validation_loss": held["loss"], "validation_accuracy": held["accuracy"]}
    if task.attributes:
        from fedsim.unlearning.measure import leakage

        found |= leakage(task)
    return found


def over_clients(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean, spread (standard deviation) and worst over clients of every accuracy and loss they report.

    Every client counts once, as the field reports it.
    """
    found: dict[str, float] = {}
    for key in dict.fromkeys(key for row in rows for key in row if key.endswith(("accuracy", "loss"))):
        values = np.array([float(row[key]) for row in rows if key in row])
        found[key] = float(values.mean())
        found[f"{key}_spread"] = float(values.std())
        found[f"{key}_worst"] = float(values.max() if key.endswith("loss") else values.min())
    return found


def _forgotten_metrics(task: Task, forgotten: Forgotten, accuracy: float, count: float) -> dict[str, float]:
    """Forgotten classes are measured on their test samples (and on their part of the validation split),
    forgotten clients on their own training samples: nothing else tells them from the others.
    """
    watch = task.experiment.settings["forget"].get("watch")
    if watch == "clients" or not forgotten.classes:
        rows = np.concatenate([forgotten.training.client(client) for client in forgotten.clients])
        labels = np.asarray(task.data.arrays.train_y)[rows]
        measured = task.evaluate_training(np.sort(rows[~forgotten.of_classes(labels)]))
        return {"forget_accuracy": measured["accuracy"], "retain_accuracy": accuracy}
    rows = np.flatnonzero(forgotten.of_classes(np.asarray(task.data.arrays.test_y)))
    measured = task.evaluate_test(rows)
    rest = accuracy * count - measured["accuracy"] * len(rows)
    found = {"forget_accuracy": measured["accuracy"], "retain_accuracy": rest / max(count - len(rows), 1)}
    if len(forgotten.validation):
        held = task.evaluate_training(forgotten.validation)
        found["validation_forget_accuracy"] = held["accuracy"]
    return found
