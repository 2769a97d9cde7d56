"""Features of a frozen backbone, computed once and shared by all clients, rounds and processes.

When only the head changes, the backbone is a fixed function of the data: its outputs for the rows that
somebody uses are computed once per machine, kept on disk and memory-mapped. Training and evaluation then
run the head alone.

    <cache>/features/<key>.npy     float32 [rows, d]; key = backbone weights, model section, code, data, rows
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim import payload, registry
from fedsim.data.store import cache_folder, cache_key, code_stamp
from fedsim.files import write_atomic
from fedsim.models.base import set_train_mode
from fedsim.version import code_digest

if TYPE_CHECKING:
    from fedsim.compute import Compute
    from fedsim.config import Experiment
    from fedsim.data.federated import FederatedData
    from fedsim.models.base import Classifier

#: rows in one pass through the backbone; fixed, because the last bits of a result depend on it
BATCH = 128


@dataclass(frozen=True)
class Features:
    """Features of some rows of an array, addressed like the array itself.

    Attributes:
        values: float32 [kept, d], memory-mapped.
        position: int64 [n], where a row's features are (-1: not kept).
    """

    values: NDArray[Any]
    position: NDArray[np.int64]

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Features [len(rows), d] of rows that are kept."""
        places = self.position[rows]
        if (places < 0).any():
            raise IndexError("features of a row that no client and no split uses were asked for")
        found: NDArray[Any] = self.values[places]
        return found


def cacheable(model: Classifier, changing: tuple[payload.Entry, ...]) -> bool:
    """True when nothing of the backbone changes and it has something worth computing once."""
    frozen = all(entry.name.startswith("head.") for entry in changing)
    return frozen and any(True for _ in model.backbone.parameters())


def train_features(
    experiment: Experiment, model: Classifier, data: FederatedData, compute: Compute
) -> Features:
    """Features of all training rows that a client has or the server holds back."""
    used = np.union1d(data.partition.indices, data.validation)
    return _features(experiment, model, data, compute, "train", data.arrays.train_x, used)


def test_features(
    experiment: Experiment, model: Classifier, data: FederatedData, compute: Compute
) -> Features:
    """Features of the whole test set."""
    x = data.arrays.test_x
    return _features(experiment, model, data, compute, "test", x, np.arange(len(x)))


def _features(
    experiment: Experiment,
    model: Classifier,
    data: FederatedData,
    compute: Compute,
    part: str,
    x: NDArray[Any],
    rows: NDArray[np.int64],
) -> Features:
    key = cache_key(
        payload.frozen_digest(model.backbone, ()),
        json.dumps(experiment["model"].table(), sort_keys=True),
        code_stamp(registry.resolve("models", experiment["model"].name).target),
        [code_digest(), torch.__version__, torch.get_num_threads(), BATCH],
        [compute.device.type, compute.precision],
        [data.arrays.digest, part],
        rows.astype(np.int64).tobytes(),
    )
    file = cache_folder("features") / f"{key}.npy"
    values = _opened(file, len(rows))
    if values is None:
        buffer = io.BytesIO()
        np.save(buffer, _computed(model, compute, x, rows))
        write_atomic(file, buffer.getvalue())
        values = np.load(file, mmap_mode="r")
    position = np.full(len(x), -1, np.int64)
    position[rows] = np.arange(len(rows))
    return Features(values, position)


def _opened(file: Any, rows: int) -> NDArray[Any] | None:
    """The memory-mapped file; None when it is not there or damaged."""
    try:
        values: NDArray[Any] = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return values if len(values) == rows else None


@torch.no_grad()
def _computed(model: Classifier, compute: Compute, x: NDArray[Any], rows: NDArray[np.int64]) -> NDArray[Any]:
    set_train_mode(model, training=False)
    parts = []
    with compute.autocast():
        for start in range(0, len(rows), BATCH):
            batch = torch.from_numpy(x[rows[start : start + BATCH]]).to(compute.device)
            parts.append(model.backbone(batch).float().cpu().numpy())
    return np.concatenate(parts)
