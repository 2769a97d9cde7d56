"""What the released representations of a task's model still say of its attributes, measured by the server.

The attackers are as strong as the simulation allows: fresh probes, trained on the representations of *all*
clients' training samples and judged on the test set. What clients can measure without giving anything away is
the federated audit (`strategies/attribute_unlearning.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedsim.models.base import set_train_mode
from fedsim.unlearning.cut import Detachable
from fedsim.unlearning.fairness import odds_gap, parity_gap
from fedsim.unlearning.probes import KINDS, attack

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fedsim.task import Task

ATTACKED = 5000  #: training samples of the attackers, evenly from all clients


def leakage(task: Task) -> dict[str, float]:
    """Figures of the model in the task, which must have attributes.

    Returns:
        For every attribute NAME: `attack_linear_NAME` and `attack_mlp_NAME` (balanced accuracy on the test
        set), their `..._error` (standard errors), `chance_NAME`, `information_NAME` (nats, the better probe's
        bound), and for a categorical one `parity_gap_NAME` and `odds_gap_NAME` of the predictions. Where the
        cut is not the backbone's end, `attack_KIND_NAME@k` for what each later unit k puts out, too.
    """
    model = task.model
    assert isinstance(model, Detachable)
    rows = np.sort(task.data.partition.indices)
    rows = rows[:: max(1, -(-len(rows) // ATTACKED))]
    train_h, _ = read(task, "train", rows)
    tested = np.arange(len(task.data.arrays.test_y))
    test_h, guessed = read(task, "test", tested)
    places = ["", *(f"@{number}" for number in range(model.cut + 1, model.cut + len(test_h)))]
    train_z, test_z = task.attributes_of("train", rows), task.attributes_of("test", tested)
    labels = np.asarray(task.data.arrays.test_y)
    found: dict[str, float] = {}
    for column, attribute in enumerate(model.attributes):
        name, z = attribute.name, (train_z[:, column], test_z[:, column])
        for place, train_at, test_at in zip(places, train_h, test_h, strict=True):
            reached = {k: attack(k, train_at, z[0], test_at, z[1], attribute.groups) for k in KINDS}
            for kind, one in reached.items():
                found[f"attack_{kind}_{name}{place}"] = one.accuracy
                found[f"attack_{kind}_{name}{place}_error"] = one.error
            if not place:
                found[f"chance_{name}"] = reached["mlp"].chance
                found[f"information_{name}"] = max(one.information for one in reached.values())
        if attribute.groups:
            groups = test_z[:, column].long().cpu().numpy()
            found[f"parity_gap_{name}"] = parity_gap(guessed, groups)
            found[f"odds_gap_{name}"] = odds_gap(guessed, labels, groups)
    return found


@torch.no_grad()
def read(task: Task, part: str, rows: NDArray[np.int64]) -> tuple[list[Tensor], NDArray[np.int64]]:
    """Released representations and what each later unit makes of them, and predicted classes int64 [n].

    Args:
        task: its model is put into eval mode.
        part: `train` or `test`.
        rows: of that part of the data.

    Returns:
        The representations are float32 [n, d] on the task's device.
    """
    model = task.model
    assert isinstance(model, Detachable)
    set_train_mode(model, training=False)
    size = task.experiment.settings["evaluation"]["batch_size"]
    kept: list[list[Tensor]] = []
    guessed = []
    for start in range(0, len(rows), size):
        inputs = task.inputs_of(part, rows[start : start + size])
        with task.compute.autocast():
            h = model.below(inputs)
            guessed.append(model.above(h).argmax(1))
            kept.append(model.later(h))
    whole = [torch.cat(parts) for parts in zip(*kept, strict=True)]
    return whole, torch.cat(guessed).cpu().numpy()
