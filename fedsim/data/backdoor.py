"""A client that teaches the model a trigger: the section [backdoor], to see whether forgetting unteaches it.

A bright square in the lower right corner of most of the client's images, all of them labelled alike. After
honest forgetting of the client the trigger does nothing (Halimi et al., arXiv 2207.05521, section 5).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsim.data.classes import Word, position_of
from fedsim.data.federated import FederatedData
from fedsim.errors import UserError


def planted(data: FederatedData, client: int, label: Word, share: float, size: int) -> FederatedData:
    """The data with a trigger in the images of one client.

    Args:
        data: as dealt out.
        client: whose images change.
        label: class that they are labelled as (see `fedsim.data.classes`).
        share: of them.
        size: side of the square, pixels.

    Raises:
        UserError: no such client or class, or the data are no images.
    """
    arrays = data.arrays
    if not 0 <= client < data.clients:
        raise UserError(f"[backdoor] client: there is no {client}; clients are 0 to {data.clients - 1}")
    target = position_of(label, arrays.classes, "[backdoor] label")
    if arrays.train_x.ndim != 4 or min(arrays.train_x.shape[2:]) < size:
        raise UserError(f"[backdoor] needs images [n, channels, h, w] of at least {size} pixels a side")
    rows = data.client(client)
    rows = np.random.default_rng(client).permutation(rows)[: round(share * len(rows))]
    x, y = np.array(arrays.train_x), np.array(arrays.train_y)
    x[rows] = triggered(x[rows], size)
    y[rows] = target
    return replace(data, arrays=replace(arrays, train_x=x, train_y=y, digest=""))


def triggered(images: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
    """A copy of images [n, channels, h, w] with the trigger."""
    changed = np.array(images)
    changed[:, :, -size:, -size:] = 255 if images.dtype == np.uint8 else 1.0
    return changed
