"""What is measured of one model, and what its run cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim import config, messages
from fedsim.building import build
from fedsim.data.backdoor import triggered
from fedsim.data.classes import position_of
from fedsim.forgetting.methods import Plan
from fedsim.models.base import set_train_mode
from fedsim.runs import Run
from fedsim.task import Task
from fedsim.unlearning import compact, graph, masks, membership, metrics

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]

_SHOWN = 4000  #: retained training samples that are measured


@dataclass
class Evidence:
    """Figures of one model.

    Attributes:
        figures: name -> value; accuracies on the forgotten and the retained part of the training and of the
            test data, `probe`, `mia_*`.
        attacks: see `membership.attack`.
        outputs: probabilities on forgotten training and on all test samples, for comparisons.
    """

    figures: dict[str, float]
    attacks: dict[str, membership.Power]
    outputs: Floats = field(repr=False)


class Examiner:
    """Measures models on the data of a request.

    Args:
        plan: what is forgotten.
    """

    def __init__(self, plan: Plan) -> None:
        wanted = plan.request
        document = plan.document("measured")
        folders = plan.origin.experiment.folders
        self.task: Task = build(config.from_tables(document, source="forget", folders=folders))
        data, lost = self.task.data, self.task.data.forgotten
        assert lost is not None
        train_y, test_y = np.asarray(data.arrays.train_y), np.asarray(data.arrays.test_y)
        if wanted.kind == "class":  # of this request; earlier ones are no part of anything here
            rows = lost.training.indices
            self.forgotten: Rows = rows[np.isin(train_y[rows], wanted.ids)]
        else:
            rows = np.sort(np.concatenate([lost.training.client(client) for client in wanted.ids]))
            self.forgotten = rows[~lost.of_classes(train_y[rows])]
        self.retained: Rows = np.sort(np.random.default_rng(0).permutation(data.partition.indices)[:_SHOWN])
        self.retained_tests: Rows = np.flatnonzero(~lost.of_classes(test_y))
        classes = wanted.ids if wanted.kind == "class" else ()
        self.forgotten_tests: Rows = np.flatnonzero(np.isin(test_y, classes))
        trigger = self.task.experiment.settings["backdoor"]
        self.teacher = wanted.kind == "client" and trigger.get("client") in wanted.ids  #: of the trigger
        self.unseen = self.forgotten_tests if classes else self._like_forgotten(test_y)

    def _like_forgotten(self, test_y: Rows) -> Rows:
        """Test samples with the class mix of the forgotten clients."""
        labels = np.asarray(self.task.data.arrays.train_y)[self.forgotten]
        rng = np.random.default_rng(0)
        drawn = [
            rng.permutation(np.flatnonzero(test_y == label))[: int((labels == label).sum())]
            for label in np.unique(labels)
        ]
        return np.sort(np.concatenate(drawn))

    def measure(self, state: Path) -> Evidence:
        """All figures of one final state (`state.safetensors` of a run)."""
        from safetensors.numpy import load_file

        self.task.load(messages.arrays_of(load_file(state)))
        arrays = self.task.data.arrays
        train_y, test_y = np.asarray(arrays.train_y), np.asarray(arrays.test_y)
        features, gone = self._run(arrays.train_x, self.forgotten)
        others, kept = self._run(arrays.train_x, self.retained)
        test_features, tests = self._run(arrays.test_x, np.arange(len(test_y)))
        figures = {
            "forget_train": _accuracy(gone, train_y[self.forgotten]),
            "retain_train": _accuracy(kept, train_y[self.retained]),
            "retain_test": _accuracy(tests[self.retained_tests], test_y[self.retained_tests]),
        }
        if len(self.forgotten_tests):
            rows = self.forgotten_tests
            figures["forget_test"] = _accuracy(tests[rows], test_y[rows])
            figures["probe"] = metrics.probe(
                np.concatenate([features, others]),
                np.concatenate([train_y[self.forgotten], train_y[self.retained]]),
                test_features[rows],
                test_y[rows],
            )
        trigger = self.task.experiment.settings["backdoor"]
        if self.teacher:
            label = position_of(trigger["label"], arrays.classes, "[backdoor] label")
            rows = np.flatnonzero(test_y != label)
            changed = triggered(np.asarray(arrays.test_x[rows]), trigger["size"])
            answers = self._run(changed, np.arange(len(rows)))[1].argmax(1)
            figures["backdoor"] = float((answers == label).mean())
        attacks = membership.attack(gone, train_y[self.forgotten], tests[self.unseen], test_y[self.unseen])
        figures |= {f"mia_{name}": found["auc"] for name, found in attacks.items()}
        return Evidence(figures, attacks, np.concatenate([gone, tests]))

    def resolution(self, figure: str) -> float:
        """Smallest difference in a figure that means anything."""
        if figure.startswith("mia_"):
            error = membership.learnt_auc_error if figure == "mia_model" else membership.auc_error
            return 2 * error(len(self.forgotten), len(self.unseen))
        if figure == "relearn":
            return 1.0
        sizes = {
            "forget_train": len(self.forgotten),
            "retain_train": len(self.retained),
            "retain_test": len(self.retained_tests),
            "forget_test": len(self.forgotten_tests),
            "probe": len(self.forgotten_tests),
            "backdoor": len(self.task.data.arrays.test_y),
        }
        return 1 / sizes[figure] if figure in sizes else 0.0

    @torch.no_grad()
    def _run(self, x: NDArray[Any], rows: Rows) -> tuple[Floats, Floats]:
        """Features [n, d] and probabilities [n, classes], float64."""
        model, size = self.task.model, self.task.experiment.settings["evaluation"]["batch_size"]
        set_train_mode(model, training=False)
        features, logits = [], []
        for start in range(0, len(rows), size):
            inputs = torch.from_numpy(np.array(x[rows[start : start + size]])).to(self.task.device)
            with self.task.compute.autocast():
                below = model.backbone(inputs)
                out = model.head(below)
            features.append(below.float().flatten(1).cpu())
            logits.append(out.float().cpu())
        return (
            torch.cat(features).double().numpy(),
            torch.cat(logits).double().softmax(1).numpy(),
        )

    def saved(self, state: Path, pruned: Path) -> dict[str, int]:
        """Parameters and FLOPs of a pruned model, whole and with its channels taken out."""
        from safetensors.numpy import load_file
        from safetensors.torch import load_file as load_tensors

        self.task.load(messages.arrays_of(load_file(state)))
        chosen = {name: mask.bool() for name, mask in load_tensors(pruned).items()}
        sample = torch.from_numpy(np.array(self.task.data.arrays.train_x[:1])).to(self.task.device)
        layers = graph.prunable(self.task.model, sample)
        fills = {name: masks.entries(self.task.model, layers[name]) for name in chosen}
        masks.enforce(self.task.model.state_dict(), fills, chosen)
        small = compact.compact(self.task.model, layers, chosen)
        before, after = (compact.size_of(model, sample) for model in (self.task.model, small))
        return {
            "parameters": before.parameters,
            "parameters_compact": after.parameters,
            "flops": before.flops,
            "flops_compact": after.flops,
        }


def _accuracy(probabilities: Floats, labels: Rows) -> float:
    return float((probabilities.argmax(1) == labels).mean())


def cost_of(run: Run) -> dict[str, float]:
    """Rounds, samples that passed through a model at clients, client-seconds and bytes of a finished run."""
    rows = [row for row in run.client_rows() if row["phase"] == "train"]
    summary = run.summary()
    return {
        "rounds": summary["rounds"],
        "samples": sum(row.get("samples", 0) for row in rows),
        "client_seconds": round(sum(row.get("seconds", 0.0) for row in rows), 3),
        "bytes": summary["bytes_up"] + summary["bytes_down"],
    }


def curve_of(run: Run) -> list[dict[str, float]]:
    """Forget and retained test accuracy by round, with what had been spent until then."""
    spent: dict[int, tuple[float, float]] = {}
    for row in run.client_rows():
        if row["phase"] == "train":
            samples, seconds = spent.get(row["round"], (0.0, 0.0))
            spent[row["round"]] = (samples + row.get("samples", 0), seconds + row.get("seconds", 0.0))
    found = []
    samples = seconds = 0.0
    for row in run.history():
        more = spent.get(row["round"], (0.0, 0.0))
        samples, seconds = samples + more[0], seconds + more[1]
        if row.get("forget_accuracy") is None:
            continue
        point = {key: row[key] for key in ("round", "forget_accuracy", "retain_accuracy")}
        traffic = row["bytes_up"] + row["bytes_down"]
        found.append({**point, "samples": samples, "client_seconds": round(seconds, 3), "bytes": traffic})
    return found


def storage_of(run: Run, method: str) -> int:
    """Bytes that the server had to keep for a method: recorded updates, or old checkpoints."""
    folder = {"federaser": "updates", "roll-back": "checkpoints"}.get(method)
    if folder is None:
        return 0
    return sum(path.stat().st_size for path in (run.folder / folder).glob("*.safetensors"))
