"""Pruned channels: zero in the weights, neutral in their norm, and so they stay.

The norm matters: with a zero convolution alone, BatchNorm still lets the constant β - γ μ / σ through.
So γ = 0, β = 0, running mean 0 and running variance 1 as well, and a pruned channel puts out exactly 0.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedsim.unlearning.graph import Layer

#: layer -> bool [channels], True where a channel is pruned
Masks = Mapping[str, Tensor]

_NEUTRAL = {"running_var": 1.0}


def entries(model: nn.Module, layer: Layer) -> dict[str, float]:
    """Names of the state whose first dimension is the layer's channels -> value where they are pruned."""
    found: dict[str, float] = {}
    for module in filter(None, (layer.name, layer.norm)):
        for key, value in model.get_submodule(module).state_dict().items():
            if value.dim() and value.shape[0] == layer.channels:
                found[f"{module}.{key}"] = _NEUTRAL.get(key, 0.0)
    return found


@torch.no_grad()
def enforce(state: Mapping[str, Tensor], fills: Mapping[str, Mapping[str, float]], masks: Masks) -> None:
    """Put pruned channels back to zero, in place.

    Args:
        state: name -> tensor; must have all names of the masked layers.
        fills: layer -> its `entries`.
        masks: on any device.
    """
    for layer, mask in masks.items():
        for name, value in fills[layer].items():
            tensor = state[name]
            where = mask.to(tensor.device).view(-1, *[1] * (tensor.dim() - 1))
            tensor.masked_fill_(where, value)


def union(left: Masks, right: Masks) -> dict[str, Tensor]:
    """What either of them prunes."""
    both = dict(left)
    for name, mask in right.items():
        both[name] = both[name] | mask if name in both else mask
    return both
