"""What lies below the first trainable parameter, computed once and shared by clients, rounds and processes.

    inputs ─ unit 0 ─ ... ─ unit k-1 ──┬── unit k ─ ... ─ features ─ head ─> logits
    a fixed function of the inputs:    │   `Task.network`
    <cache>/features/<key>.npy, float32 [rows, ...], memory-mapped

The cut k is as high as nothing below it changes: no parameter, no buffer, no module in train mode (dropout,
BatchNorm statistics). All units are below it when only the head changes; k = 0 keeps nothing and runs the
whole model for every batch. That is so where

* nothing below the first change has parameters, or only the first unit (stem, embedding) is below it: there
  is no work to save;
* the activations of all rows in use would take more than `[features] limit` on disk (training rows of
  clients and of the validation split, and the test set);
* modules were added to the backbone that none of its units names (prompts, adapters): they may act anywhere;
* images are augmented anew for every batch (`[augmentation] views = 0`);
* something outside backbone and head changes, or somebody hooked the model or its backbone as a whole.

The key holds the digest of the weights below the cut, the cut, the model section, the code, the data, the
rows and the view of an augmentation; tables may be deleted at any time. Tuning modes of fedsim share tables:
what they add has a name in the weights. With and without the cache a run computes the same up to the last
bits, which depend on how many rows go through a layer at once; with the cache it gives the same digest every
time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsim import payload, registry
from fedsim.augmentation import View, augments
from fedsim.data.store import cache_folder, cache_key, code_stamp
from fedsim.errors import UserError
from fedsim.files import replacing
from fedsim.models.base import hooked, run_units, set_train_mode, units_of
from fedsim.version import code_digest

if TYPE_CHECKING:
    from fedsim.compute import Compute
    from fedsim.config import Experiment
    from fedsim.data.federated import FederatedData
    from fedsim.models.base import Classifier

#: rows in one pass through the frozen units; fixed, because the last bits of a result depend on it, and
#: small, because a CPU loses more time to the page faults of large activations than it gains
BATCH = 32
_BACKBONE = "backbone."
_FLOAT = 4  #: bytes

#: an array, or a view of one: rows int64 [b] -> [b, ...]
Inputs = NDArray[Any] | View


@dataclass(frozen=True)
class Features:
    """Activations for some rows of an array, addressed like the array itself.

    Attributes:
        values: float32 [kept, ...], memory-mapped.
        position: int64 [n], where a row's activations are (-1: not kept).
    """

    values: NDArray[Any]
    position: NDArray[np.int64]

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Activations [len(rows), ...] of rows that are kept."""
        places = self.position[rows]
        if (places < 0).any():
            raise IndexError("features of a row that no client and no split uses were asked for")
        found: NDArray[Any] = self.values[places]
        return found


class Above(nn.Module):
    """The units of a model from a cut on, and its head: activations below the cut [n, ...] -> logits.

    Args:
        model: a submodule of this one; it keeps its parameters.
        cut: how many units are left out.
    """

    def __init__(self, model: Classifier, cut: int) -> None:
        super().__init__()
        self.model = model
        self.cut = cut

    def forward(self, activations: Tensor) -> Tensor:
        """Logits [n, classes]."""
        logits: Tensor = self.model.head(run_units(units_of(self.model.backbone)[self.cut :], activations))
        return logits


def above(model: Classifier, cut: int) -> nn.Module:
    """What is left to run: the model (cut 0), its head (all units are below the cut), or a part."""
    if cut == 0:
        return model
    return model.head if cut == len(units_of(model.backbone)) else Above(model, cut)


def cut(
    experiment: Experiment,
    model: Classifier,
    data: FederatedData,
    changing: tuple[payload.Entry, ...],
    compute: Compute,
) -> int:
    """How many of the backbone's first units are computed once; 0 where it cannot be or does not pay."""
    keys = experiment.settings["features"]
    anew = augments(experiment) and not experiment.settings["augmentation"]["views"]
    frozen = frozen_units(model, changing) if keys["cache"] and not anew else 0
    whole = frozen == len(units_of(model.backbone))
    if not _state(model, frozen) or (frozen < 2 and not whole):
        return 0
    views = experiment.settings["augmentation"]["views"]
    rows = len(plain_rows(experiment, data)) + views * len(trained_rows(experiment, data))
    rows += len(data.arrays.test_x)
    size = rows * math.prod(_shape(model, compute, frozen, data.arrays.train_x)) * _FLOAT
    return frozen if size <= keys["limit"] * 1e9 else 0


def frozen_units(model: Classifier, changing: tuple[payload.Entry, ...]) -> int:
    """How many of the backbone's first units put out the same for the same input as long as a run lasts."""
    if hooked(model) or any(not entry.name.startswith((_BACKBONE, "head.")) for entry in changing):
        return 0
    units = units_of(model.backbone)
    state = model.state_dict(keep_vars=True)
    moving = {id(state[entry.name]) for entry in changing}  # by identity: tied weights have several names
    inside = {name.removeprefix(_BACKBONE) for name in state if name.startswith(_BACKBONE)}
    trained = {name for name in inside if id(state[_BACKBONE + name]) in moving}
    trained |= set(_in_train_mode(model))
    if not trained:
        return len(units)
    if hooked(model.backbone) or not all(any(unit.owns(name) for unit in units) for name in inside | trained):
        return 0
    return next(number for number, unit in enumerate(units) if any(map(unit.owns, trained)))


def _in_train_mode(model: Classifier) -> list[str]:
    """The innermost modules of the backbone that are in train mode while clients train."""
    with _mode(model, training=True):
        return [name for name, m in model.backbone.named_modules() if m.training and not any(m.children())]


def train_features(
    experiment: Experiment, model: Classifier, data: FederatedData, compute: Compute, cut: int
) -> Features:
    """Activations for the training rows that are looked at as they are."""
    rows = plain_rows(experiment, data)
    return _features(
        experiment, model, data.arrays.train_x, compute, cut, [data.arrays.digest, "train"], rows
    )


def view_features(
    experiment: Experiment, model: Classifier, data: FederatedData, compute: Compute, cut: int, view: int
) -> Features:
    """Activations for one augmented view of the training rows that clients train on."""
    augmented = View.of(experiment, data.arrays.train_x, view)
    rows = trained_rows(experiment, data)
    seen = [data.arrays.digest, "train", augmented.key]
    return _features(experiment, model, augmented, compute, cut, seen, rows)


def test_features(
    experiment: Experiment, model: Classifier, data: FederatedData, compute: Compute, cut: int
) -> Features:
    """Activations for the whole test set."""
    rows = np.arange(len(data.arrays.test_x))
    return _features(experiment, model, data.arrays.test_x, compute, cut, [data.arrays.digest, "test"], rows)


def plain_rows(experiment: Experiment, data: FederatedData) -> NDArray[np.int64]:
    """Training rows that are looked at as they are: all but those that are only seen augmented."""
    rows: NDArray[np.int64] = data.validation
    if not augments(experiment):
        rows = np.union1d(trained_rows(experiment, data), rows)
    if data.forgotten is not None:  # measured, and scored before it is forgotten
        rows = np.union1d(rows, np.union1d(data.forgotten.training.indices, data.forgotten.validation))
    return rows


def trained_rows(experiment: Experiment, data: FederatedData) -> NDArray[np.int64]:
    """Training rows of clients, or all there are (`[features] rows = "all"`)."""
    if experiment.settings["features"]["rows"] == "all":
        return np.setdiff1d(np.arange(len(data.arrays.train_y)), data.validation)
    return np.sort(data.partition.indices)


def _state(model: Classifier, cut: int) -> dict[str, Tensor]:
    """Parameters and buffers below the cut; nothing where there are no parameters."""
    units = units_of(model.backbone)
    backbone = model.backbone.state_dict()
    if cut < len(units):
        backbone = {k: v for k, v in backbone.items() if any(unit.owns(k) for unit in units[:cut])}
    parameters = dict(model.backbone.named_parameters())
    return backbone if parameters.keys() & backbone.keys() else {}


def _features(
    experiment: Experiment,
    model: Classifier,
    x: Inputs,
    compute: Compute,
    cut: int,
    seen: list[Any],
    rows: NDArray[np.int64],
) -> Features:
    """Activations for some rows of `x`; `seen` says what x is."""
    key = cache_key(
        [payload.digest_of(_state(model, cut)), cut],
        _made_by(experiment, model),
        [code_digest(), torch.__version__, torch.get_num_threads(), BATCH],
        [compute.device.type, compute.precision],
        seen,
        rows.astype(np.int64).tobytes(),
    )
    file = cache_folder("features") / f"{key}.npy"
    values = _opened(file, len(rows))
    if values is None:
        _write(file, model, compute, cut, x, rows)
        values = np.load(file, mmap_mode="r")
    position = np.full(len(x), -1, np.int64)
    position[rows] = np.arange(len(rows))
    return Features(values, position)


def _made_by(experiment: Experiment, model: Classifier) -> list[Any]:
    """Sections and code that the units below the cut come from.

    A tuning mode of fedsim changes nothing there that has no name in the state; somebody else's, or one that
    hooks a module, may.
    """
    kinds = {"model": "models", "tuning": "tuning"}
    targets = {name: registry.resolve(kind, experiment[name].name).target for name, kind in kinds.items()}
    ours = targets["tuning"].__module__.startswith("fedsim.")
    if ours and not any(map(hooked, model.backbone.modules())):
        targets.pop("tuning")
    sections = json.dumps([experiment[name].table() for name in targets], sort_keys=True)
    return [sections, *map(code_stamp, targets.values())]


def _opened(file: Path, rows: int) -> NDArray[Any] | None:
    """The memory-mapped file; None when it is not there or damaged."""
    try:
        values: NDArray[Any] = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return values if len(values) == rows else None


def _write(
    file: Path, model: Classifier, compute: Compute, cut: int, x: Inputs, rows: NDArray[np.int64]
) -> None:
    """Compute batch by batch straight into the file: it may be larger than the memory.

    Written, not mapped: a full disk is then an error instead of the end of the process.
    """
    shape = (len(rows), *_shape(model, compute, cut, x))
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    try:
        with replacing(file) as temporary, temporary.open("wb") as out:
            np.lib.format.write_array_header_1_0(out, header)
            for start in range(0, len(rows), BATCH):
                batch = _computed(model, compute, cut, x[rows[start : start + BATCH]])
                out.write(batch.contiguous().cpu().numpy().astype("<f4", copy=False).data)
    except OSError as error:
        raise UserError(
            f"cannot write '{file}' ({error.strerror}); free some space, set FEDSIM_CACHE to another folder, "
            "or set [features] cache = false"
        ) from error


def _shape(model: Classifier, compute: Compute, cut: int, x: Inputs) -> tuple[int, ...]:
    """Of one row's activations below the cut."""
    return tuple(_computed(model, compute, cut, np.zeros_like(x[np.arange(1)])).shape[1:])


def example(model: Classifier, compute: Compute, cut: int, x: NDArray[Any]) -> Tensor:
    """One input as what is above the cut takes it, [1, ...], on the model's device."""
    one = np.array(x[:1])
    return _computed(model, compute, cut, one) if cut else torch.from_numpy(one).to(compute.device)


@torch.no_grad()
def _computed(model: Classifier, compute: Compute, cut: int, x: NDArray[Any]) -> Tensor:
    """Activations below the cut for some inputs, float32, on the model's device."""
    inputs = torch.from_numpy(x).to(compute.device)
    units = units_of(model.backbone)
    with _mode(model, training=False), compute.autocast():
        # the backbone as a whole is called as such: a mode may have hooked it
        return (model.backbone(inputs) if cut == len(units) else run_units(units[:cut], inputs)).float()


@contextmanager
def _mode(model: Classifier, *, training: bool) -> Iterator[None]:
    """Eval or train mode inside; every module is as it was afterwards: a client may be in the middle."""
    before = {module: module.training for module in model.modules()}
    set_train_mode(model, training)
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode
