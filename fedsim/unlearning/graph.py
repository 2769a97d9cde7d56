"""Which layers have channels that can be pruned, and what else hangs on those channels.

The model runs once on zeros while every torch function is watched, so no model needs code of its own:

    conv ─> norm ─> relu ─> pool ─> conv         its channels reach one consumer: they can be removed
                      └───> + <──── shortcut     a sum mixes them with others: they can only be zeroed

Prunable are convolutions that an activation or a sum follows, and the hidden units of perceptrons (a linear
layer right below its activation; an extension of arXiv 2110.11794, which prunes convolutions). Left out are
grouped convolutions and 1x1 convolutions that only carry a shortcut to a sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fedsim.models.base import Classifier

_ACTIVATIONS = {"relu", "relu_", "gelu", "silu", "hardtanh", "relu6"}  #: with f(0) = 0
_POOLS = {
    "max_pool2d",
    "_max_pool2d",
    "avg_pool2d",
    "adaptive_avg_pool2d",
    "dropout",
    "contiguous",
    "float",
    "to",
}
_NORMS = {"batch_norm", "group_norm"}
_SUMS = {"add", "add_", "iadd", "__add__", "__iadd__", "__radd__"}
_LAYERS = {"conv2d", "linear"}


@dataclass(frozen=True)
class Layer:
    """A layer whose output channels can be pruned.

    Attributes:
        name: of the module, dotted, as in the model's state.
        channels: how many.
        norm: the normalisation right behind it, or None.
        consumers: layer -> input features per channel, of the layers that these channels alone feed.
        removable: nothing but `norm` and `consumers` sees the channels, so they can be taken out.
    """

    name: str
    channels: int
    norm: str | None
    consumers: dict[str, int]
    removable: bool


@dataclass
class _Seen:
    """What is found out about one layer on the way."""

    channels: int
    kind: str
    norm: str | None = None
    consumers: dict[str, int] = field(default_factory=dict)
    activated: bool = False
    summed: bool = False
    mixed: bool = False
    pooled: bool = False  #: something lies between the layer and what follows


class _Watch(TorchFunctionMode):
    """Follows the output of every layer until a layer takes it in or something mixes it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.modules = dict(model.named_modules())
        self.owner = {
            id(parameter): name
            for name, module in self.modules.items()
            for parameter in module.parameters(recurse=False)
        }
        self.seen: dict[str, _Seen] = {}
        self._from: dict[int, tuple[str, int]] = {}  #: tensor -> layer, features per channel
        self._alive: list[Any] = []  # a freed tensor's id would be given to another one

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if isinstance(out, Tensor):
            self._alive.append(out)
            inputs = [t for t in _tensors([*args, *kwargs.values()]) if id(t) in self._from]
            self._step(func.__name__, inputs, args, kwargs, out)
        return out

    def _step(self, name: str, inputs: list[Tensor], args: Any, kwargs: Any, out: Tensor) -> None:
        tags = [self._from[id(tensor)] for tensor in inputs]
        if name in _LAYERS:
            self._layer(name, args[1] if len(args) > 1 else kwargs["weight"], tags, out)
            return
        if len(tags) == 1:
            layer, spread = tags[0]
            seen = self.seen[layer]
            if name in _ACTIVATIONS:
                seen.activated |= seen.kind == "conv2d" or not seen.pooled
                self._from[id(out)] = tags[0]
                return
            if name in _NORMS and not seen.pooled and seen.norm is None:
                seen.norm = self._norm_of(args, kwargs)
                seen.mixed |= name == "group_norm"  # its statistics run over several channels
                self._from[id(out)] = tags[0]
                return
            if name in _POOLS or (name == "mean" and inputs[0].dim() == 4 and out.dim() == 2):
                seen.pooled = True
                self._from[id(out)] = tags[0]
                return
            if name == "flatten" and inputs[0].dim() == 4 and out.dim() == 2:
                seen.pooled = True
                self._from[id(out)] = (layer, spread * math.prod(inputs[0].shape[2:]))
                return
        for layer, _ in tags:
            self.seen[layer].mixed = True
            self.seen[layer].summed |= name in _SUMS

    def _layer(self, kind: str, weight: Tensor, tags: list[tuple[str, int]], out: Tensor) -> None:
        name = self.owner.get(id(weight), "")
        groups = getattr(self.modules.get(name), "groups", 1)
        for source, spread in tags:
            self.seen[source].consumers[name] = spread
            self.seen[source].mixed |= groups > 1 or not name
        if not name or not isinstance(self.modules[name], nn.Conv2d | nn.Linear):
            return
        if name in self.seen:  # used twice
            self.seen[name].mixed = True
            return
        self.seen[name] = _Seen(weight.shape[0], kind, mixed=groups > 1)
        self._from[id(out)] = (name, 1)

    def _norm_of(self, args: Any, kwargs: Any) -> str | None:
        owners = [self.owner.get(id(tensor)) for tensor in _tensors([*args, *kwargs.values()])]
        return next((name for name in owners if name is not None), None)


def _tensors(values: list[Any]) -> list[Tensor]:
    flat: list[Any] = []
    for value in values:
        flat += list(value) if isinstance(value, list | tuple) else [value]
    return [value for value in flat if isinstance(value, Tensor)]


def prunable(model: Classifier, sample: Tensor) -> dict[str, Layer]:
    """The layers that can be pruned, in the order in which they run.

    Args:
        model: on the sample's device; it is in eval mode afterwards.
        sample: inputs as stored [1, ...]; only their shape matters.

    Returns:
        Name -> layer; empty when there is none.
    """
    model.eval()
    watch = _Watch(model)
    with torch.no_grad(), watch:
        model(sample)
    return {
        name: Layer(name, seen.channels, seen.norm, seen.consumers, not seen.mixed and bool(seen.consumers))
        for name, seen in watch.seen.items()
        if _is_prunable(seen, watch.modules[name])
    }


def first_layer(model: Classifier, sample: Tensor) -> str | None:
    """The first convolution or linear layer that inputs pass (None: there is none)."""
    model.eval()
    watch = _Watch(model)
    with torch.no_grad(), watch:
        model(sample)
    return next(iter(watch.seen), None)


def _is_prunable(seen: _Seen, module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        carries_shortcut = module.kernel_size == (1, 1) and seen.summed and not seen.activated
        return module.groups == 1 and (seen.activated or seen.summed) and not carries_shortcut
    return seen.activated
