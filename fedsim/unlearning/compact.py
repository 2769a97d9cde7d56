"""Taking pruned channels out of a model, where its graph allows it.

A masked channel puts out 0, so the layers that it feeds lose nothing without it: outputs stay the same up to
rounding. Channels that a sum mixes with others (the last convolution of a residual block, the stem) stay, as
zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fedsim.models.base import Classifier
from fedsim.unlearning.graph import Layer
from fedsim.unlearning.masks import Masks


@dataclass(frozen=True)
class Size:
    """What a model costs: parameters, and floating-point operations of one sample's forward pass."""

    parameters: int
    flops: int


def size_of(model: nn.Module, sample: Tensor) -> Size:
    """Measure a model (left in eval mode) with one sample as stored, [1, ...]."""
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(sample)
    return Size(sum(p.numel() for p in model.parameters()), counter.get_total_flops())


@torch.no_grad()
def compact(model: Classifier, layers: Mapping[str, Layer], masks: Masks) -> Classifier:
    """A smaller copy without the pruned channels.

    Args:
        model: with the masks enforced.
        layers: from `graph.prunable`.
        masks: layer -> bool [channels].

    Returns:
        Maps the same inputs to the same logits (float32 rounding apart).
    """
    small = deepcopy(model)
    for name, mask in masks.items():
        layer = layers[name]
        if not layer.removable:
            continue
        keep = ~mask
        _keep_outputs(small.get_submodule(name), keep)
        if layer.norm is not None:
            _keep_norm(small.get_submodule(layer.norm), keep)
        for consumer, spread in layer.consumers.items():
            _keep_inputs(small.get_submodule(consumer), keep.repeat_interleave(spread))
    return small


def _keep_outputs(module: nn.Module, keep: Tensor) -> None:
    _shorten(module, ("weight", "bias"), keep)
    setattr(module, "out_channels" if isinstance(module, nn.Conv2d) else "out_features", int(keep.sum()))


def _keep_norm(module: nn.Module, keep: Tensor) -> None:
    _shorten(module, ("weight", "bias", "running_mean", "running_var"), keep)
    module.num_features = int(keep.sum())  # type: ignore[assignment]


def _keep_inputs(module: nn.Module, keep: Tensor) -> None:
    _shorten(module, ("weight",), keep, dim=1)
    setattr(module, "in_channels" if isinstance(module, nn.Conv2d) else "in_features", int(keep.sum()))


def _shorten(module: nn.Module, names: tuple[str, ...], keep: Tensor, dim: int = 0) -> None:
    index = keep.nonzero()[:, 0]
    for name in names:
        old = getattr(module, name, None)
        if old is None:
            continue
        new = old.detach().index_select(dim, index.to(old.device))
        if isinstance(old, nn.Parameter):
            setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad))
        else:
            module.register_buffer(name, new)
