"""Task = model + federated data + loss + additive metrics; `fedsim/building.py` makes it from an Experiment.

The model is *resident*: one copy per process, overwritten in place for every client. `reset` puts every
changing entry back, so nothing of one client is left for the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from flwr.app import ArrayRecord
from numpy.typing import NDArray
from torch import Tensor

from fedsim import augmentation, features, messages, payload
from fedsim.compute import Compute
from fedsim.config import Experiment
from fedsim.data.attributes import positions
from fedsim.data.federated import FederatedData
from fedsim.errors import UserError
from fedsim.models.base import Classifier, at_rest, set_train_mode
from fedsim.resident import Resident
from fedsim.scores import Scores, scores_of

if TYPE_CHECKING:
    from fedsim.local_learning.federated import Local

#: inputs [n, ...] -> logits [n, classes]
Network = Callable[[Tensor], Tensor]


@dataclass
class Task:
    """What a client trains and a server evaluates.

    Attributes:
        experiment: where it came from.
        model: the resident model on `compute.device`.
        data: all clients' data (memory-mapped; a client touches its own rows only).
        selection: names that travel and names that stay.
        frozen_digest: digest of everything that does neither (of computed entries: of their ingredients).
        loss: (network, inputs, labels) -> mean loss of a batch, a scalar tensor with a graph.
        cut: how many of the backbone's first units nothing changes in and are computed once
            (`fedsim/features.py`); 0: the whole model runs for every batch.
        network: what maps a batch's inputs to logits: the model, or what is above the cut.
        local: how clients train where `[local]` is not back-propagation; what is shared of their auxiliary
            networks belongs to `selection.shared`.
        compute: device and precision.
        scaler: of the losses of the client that trains; the training loop makes a fresh one for each.
        anchors: while a client trains with a proximal term: what it was sent.
        constrain: called after every step of an optimiser: puts parameters back to where they must be.
    """

    experiment: Experiment
    model: Classifier
    data: FederatedData
    selection: payload.Selection
    frozen_digest: str
    loss: Callable[[Network, Tensor, Tensor], Tensor]
    compute: Compute = field(default_factory=Compute)

    def __post_init__(self) -> None:
        self._resident = Resident(self.model, [entry.name for entry in self.selection.changing])
        self.cut = features.cut(self.experiment, self.model, self.data, self.selection.changing, self.compute)
        self.network = features.above(self.model, self.cut)
        self.local = self._local()
        self.scaler = self.compute.scaler()
        self.anchors: list[Tensor] = []
        self.constrain: Callable[[], None] | None = None

    def _local(self) -> Local | None:
        """How clients train, if not by back-propagation; shared entries are taken into the selection."""
        section = self.experiment["local"]
        if section.name == "bp" and "blocks" not in section.common:
            if section.common.get("budgets"):
                raise UserError('[local] budgets need a method that saves memory, such as name = "man++"')
            return None
        from fedsim.local_learning.federated import Local

        sample = features.example(self.model, self.compute, self.cut, self.data.arrays.train_x)
        local = Local(self.experiment, self.model, sample, self.cut, self.loss)
        store = {messages.OPTIONAL + name: value for name, value in local.store.items()}
        entries = payload.entries_of(store)
        self.selection = replace(self.selection, shared=(*self.selection.shared, *entries))
        self._resident.add(store)
        return local

    @property
    def own_weights(self) -> bool:
        """Whether some shared entries, or rows of them, are averaged with weights of their own."""
        return bool(self.model.class_rows) or bool(self.local is not None and self.local.store)

    @cached_property
    def train_inputs(self) -> features.Features | NDArray[Any]:
        """What `network` takes, by rows of the training data."""
        if not self.cut:
            return self.data.arrays.train_x
        return features.train_features(self.experiment, self.model, self.data, self.compute, self.cut)

    @cached_property
    def _views(self) -> list[features.Features | augmentation.View]:
        """What `network` takes of each fixed augmented view, by rows of the training data."""
        views = range(self.experiment.settings["augmentation"]["views"])
        if not self.cut:
            images = self.data.arrays.train_x
            return [augmentation.View.of(self.experiment, images, view) for view in views]
        return [
            features.view_features(self.experiment, self.model, self.data, self.compute, self.cut, view)
            for view in views
        ]

    @cached_property
    def test_inputs(self) -> features.Features | NDArray[Any]:
        """What `network` takes, by rows of the test data."""
        if not self.cut:
            return self.data.arrays.test_x
        return features.test_features(self.experiment, self.model, self.data, self.compute, self.cut)

    @property
    def device(self) -> torch.device:
        """Where model and batches live."""
        return self.compute.device

    @property
    def half(self) -> frozenset[str]:
        """Names of bfloat16 entries (two bytes a value on a packed wire)."""
        return frozenset(entry.name for entry in self.selection.changing if entry.dtype == "bfloat16")

    def reset(self) -> None:
        """Put every entry that training may change back to its initial value.

        Raises:
            UserError: the model changed in a way that cannot be undone (`fedsim/resident.py`).
        """
        self._resident.reset()

    def untouched(self) -> AbstractContextManager[None]:
        """Whatever runs inside leaves no trace in the model's state."""
        return self._resident.untouched()

    def load(self, shared: ArrayRecord, personal: ArrayRecord | None = None) -> None:
        """Reset the model, then overwrite the shared part and, if there is one, the personal part.

        Raises:
            ValueError: names, shapes or dtypes do not fit.
        """
        self.reset()
        for record, entries in ((shared, self.selection.shared), (personal, self.selection.personal)):
            if record is not None:
                payload.load_record(record, entries, self._resident.first)

    def shared(self) -> ArrayRecord:
        """A copy of the shared part of the resident model.

        Raises:
            UserError: the model changed in a way that no other client would learn of (`fedsim/resident.py`).
        """
        self._resident.check()
        return payload.to_record(self._tensors(self.selection.shared), self.selection.shared)

    def personal(self) -> ArrayRecord:
        """A copy of the personal part of the resident model."""
        return payload.to_record(self._tensors(self.selection.personal), self.selection.personal)

    def initial_payload(self) -> ArrayRecord:
        """The shared part before any training."""
        return payload.to_record(self._resident.initial, self.selection.shared)

    def _tensors(self, entries: Sequence[payload.Entry]) -> dict[str, Tensor]:
        """Entries of the resident model as they are now, no copies."""
        return self._resident.tensors(entry.name for entry in entries)

    def backward(self, loss: Tensor) -> None:
        """Gradients of a loss, outside autocast and scaled for fp16: what a step calls."""
        with self.compute.autocast(on=False):
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def row_counts(self, rows: NDArray[np.int64]) -> dict[str, list[int]]:
        """Samples of each class among some training rows, for every shared entry whose rows are classes."""
        shared = {entry.name for entry in self.selection.shared}
        counts = np.bincount(self.data.arrays.train_y[rows], minlength=len(self.data.arrays.classes))
        return {name: counts.tolist() for name in self.model.class_rows if name in shared}

    def train_batch(self, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Rows of the training data on the device, augmented where the experiment says so.

        Returns:
            Inputs of `network` [b, ...], labels int64 [b].
        """
        labels = self.data.arrays.train_y
        if not augmentation.augments(self.experiment):
            return self._batch(self.train_inputs, labels, rows)
        if self._views:
            chosen = torch.randint(len(self._views), (len(rows),)).tolist()
            picked = [self._views[view][rows[i : i + 1]] for i, view in enumerate(chosen)]
            return self._on_device(np.concatenate(picked), labels[rows])
        images, own = self._batch(self.data.arrays.train_x, labels, rows)
        draws = torch.rand(len(rows), augmentation.DRAWS).to(self.device)
        return augmentation.augmented(images, draws, self.experiment.settings["augmentation"]), own

    @property
    def attributes(self) -> Sequence[str]:
        """Names of the attributes that are to be unlearned."""
        names: Sequence[str] = self.experiment["detacher"].common.get("attributes", ())
        return names

    def inputs_of(self, part: str, rows: NDArray[np.int64]) -> Tensor:
        """Inputs of `network` for rows of the `train` or `test` part, on the device."""
        inputs = self.train_inputs if part == "train" else self.test_inputs
        return torch.from_numpy(inputs[rows]).to(self.device)

    def attributes_of(self, part: str, rows: NDArray[np.int64]) -> Tensor:
        """Values of `attributes` for rows of the `train` or `test` part, float32 [b, a], on the device."""
        arrays = self.data.arrays
        columns = positions(self.attributes, arrays.attributes)
        z: Any = arrays.train_z if part == "train" else arrays.test_z
        return torch.from_numpy(z[rows][:, columns]).to(self.device)

    def _batch(
        self, x: features.Features | NDArray[Any], y: NDArray[np.int64], rows: NDArray[np.int64]
    ) -> tuple[Tensor, Tensor]:
        return self._on_device(x[rows], y[rows])

    def _on_device(self, x: NDArray[Any], y: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(x).to(self.device), torch.from_numpy(y).to(self.device)

    @torch.no_grad()
    def _scores(
        self, x: features.Features | NDArray[Any], y: NDArray[np.int64], rows: NDArray[np.int64]
    ) -> Scores:
        """Scores of the resident model for some rows."""
        size = self.experiment.settings["evaluation"]["batch_size"]
        set_train_mode(self.model, training=False)
        network = at_rest(self.network)
        found = []
        for start in range(0, len(rows), size):
            inputs, labels = self._batch(x, y, rows[start : start + size])
            with self.compute.autocast():
                logits = network(inputs).float()
            found.append(scores_of(logits, labels, self.data.base_classes))
        return Scores.joined(found)

    def test_scores(self) -> Scores:
        """Scores of the resident model for the whole test set."""
        labels = self.data.arrays.test_y
        return self._scores(self.test_inputs, labels, np.arange(len(labels)))

    def measure(self, scores: Scores) -> dict[str, float]:
        """What scores of the whole test set say: accuracy and loss; with new classes, base and new apart."""
        found = scores.means()
        if self.data.new_classes:
            new = np.asarray(self.data.arrays.test_y) >= self.data.base_classes
            for name, rows in (("base", ~new), ("new", new)):
                if not rows.any():  # a node's own test set may lack one kind
                    continue
                found[f"{name}_accuracy"] = scores.at(np.flatnonzero(rows)).means(among_own=True)["accuracy"]
        return found

    def evaluate_local(self, scores: Scores, client: int) -> dict[str, float]:
        """What scores of the whole test set say of a client's local test part."""
        return scores.at(self.data.local_test(client)).means(among_own=True)

    def evaluate_training(self, rows: NDArray[np.int64]) -> dict[str, float]:
        """Evaluate on some rows of the training data."""
        return self._scores(self.train_inputs, self.data.arrays.train_y, rows).means(among_own=True)

    def evaluate_test(self, rows: NDArray[np.int64]) -> dict[str, float]:
        """Evaluate on some rows of the test data."""
        return self._scores(self.test_inputs, self.data.arrays.test_y, rows).means(among_own=True)

    def evaluate_split(self, split: str, client: int | None = None) -> dict[str, float]:
        """Evaluate the resident model.

        Args:
            split: `test`, `validation`, a client's `local` test part, or `both`: `test`, and `local` under
                names that begin with `local_`.
            client: for `local` and `both`.
        """
        if split == "validation":
            return self.evaluate_training(self.data.validation)
        if split not in ("test", "local", "both"):
            raise ValueError(f"unknown split '{split}': test, validation, local or both")
        if split == "test":
            return self.measure(self.test_scores())
        if client is None:
            raise ValueError(f"split '{split}' belongs to a client")
        if split == "local":
            return self.evaluate_test(self.data.local_test(client))
        scores = self.test_scores()
        local = self.evaluate_local(scores, client)
        return {**self.measure(scores), **{f"local_{key}": value for key, value in local.items()}}
