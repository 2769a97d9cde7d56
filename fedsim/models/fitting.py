"""Which tuning modes fit a model: found by trying them all on a twin that has no values."""

from __future__ import annotations

import copy

import torch
from torch import nn

from fedsim import registry
from fedsim.models.base import Classifier


def fitting_modes(model: Classifier) -> list[str]:
    """Names of `[tuning]` that work on a model with their default keys.

    Args:
        model: untuned; it stays as it is.
    """
    found = []
    for name, target in registry.table("tuning").items():
        try:
            registry.load(target)(_twin(model))
        except Exception:  # whatever a mode, maybe a user's, says: it does not fit
            continue
        found.append(name)
    return found


def _twin(model: Classifier) -> Classifier:
    """A copy whose tensors are on `meta`: it takes no memory."""
    tensors: dict[int, object] = {}
    for module in [model, *([] if model.text is None else [model.text.clip])]:
        tensors |= {
            id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
            for p in module.parameters()
        }
        tensors |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in module.buffers()}
    return copy.deepcopy(model, tensors)
