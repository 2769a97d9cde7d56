"""What the server measures of the shared state: test and validation split, and what is to be forgotten."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsim import messages
from fedsim.task import Task

if TYPE_CHECKING:
    from fedsim.data.forgotten import Forgotten


#: how names of figures of a client's local test part begin where those of the whole test set are there, too
LOCAL = "local_"
NO_TESTS = "no local test samples"


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
        prefix = LOCAL if split == "both" else ""
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

    Every client that could be measured counts once, as the field reports it. `..._unmeasured` is how many
    could not (where there are any): they have no test samples, or their figure is not finite. Where nobody
    could, mean, spread and worst are NaN.
    """
    found: dict[str, float] = {}
    for key in dict.fromkeys(key for row in rows for key in row if key.endswith(("accuracy", "loss"))):
        all_values = np.array([_figure(row, key) for row in rows])
        values = all_values[np.isfinite(all_values)]
        if len(values):
            worst = values.max() if key.endswith("loss") else values.min()
            mean, spread = values.mean(), values.std()
        else:
            mean = spread = worst = np.float64(np.nan)
        found |= {key: float(mean), f"{key}_spread": float(spread), f"{key}_worst": float(worst)}
        if len(values) < len(rows):
            found[key + messages.UNMEASURED] = len(rows) - len(values)
    return found


def unmeasured(row: Mapping[str, Any]) -> list[str]:
    """Why figures that a client reports cannot be used, in words; nothing where all can."""
    keys = [key for key in row if key.endswith(("accuracy", "loss")) and not np.isfinite(_figure(row, key))]
    reasons = [f"{key} is {row[key]}" if _samples(row, key) else NO_TESTS for key in keys]
    return list(dict.fromkeys(reasons))


def _figure(row: Mapping[str, Any], key: str) -> float:
    """One figure of a client; NaN where it measured nothing, or says no number."""
    value = row.get(key)
    return float(value) if isinstance(value, int | float) and _samples(row, key) else math.nan


def _samples(row: Mapping[str, Any], key: str) -> float:
    """How many samples are behind a figure; 1 where the client does not say."""
    count: float = row.get(LOCAL + messages.EXAMPLES if key.startswith(LOCAL) else messages.EXAMPLES, 1)
    return count


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
    hits = measured["accuracy"] * len(rows) if len(rows) else 0.0
    left = count - len(rows)
    retained = (accuracy * count - hits) / left if left else math.nan
    found = {"forget_accuracy": measured["accuracy"], "retain_accuracy": retained}
    if len(forgotten.validation):
        held = task.evaluate_training(forgotten.validation)
        found["validation_forget_accuracy"] = held["accuracy"]
    return found
