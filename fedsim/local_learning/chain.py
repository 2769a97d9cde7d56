"""What windows run over: the units of a backbone that a cut may follow, and the tail that makes logits.

    inputs ─ unit 0 ─ unit 1 ─ ... ─ unit n-1 ─ tail: last unit of the backbone (pooling), head ─> logits

See `fedsim.models.base.Unit`. The backbone's last unit puts out the features and is no block, so it goes
with the head.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedsim.errors import UserError
from fedsim.models.base import Classifier, Unit, run_units, units_of

HOW_TO_DIVIDE = (
    "give its backbone a method `units()` that returns a list of fedsim.models.base.Unit, first to last "
    "(docs/local_learning.md shows one in 20 lines)"
)


class Tail(nn.Module):
    """What follows the last unit: activations [n, ...] -> logits [n, classes].

    Args:
        top: the backbone's last unit; None where the only unit makes the features already.
        head: of the model.
    """

    def __init__(self, top: Unit | None, head: nn.Module) -> None:
        super().__init__()
        self.top = top
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.head(x if self.top is None else self.top.run(x))
        return logits


class Chain:
    """The units of a model and what they put out.

    Args:
        model: any classifier of fedsim.
        sample: inputs as a batch has them, [n ≥ 1, ...], on the model's device; only their shape matters.
        below: so many units are computed once for all (see `fedsim/features.py`) and are left out.

    Attributes:
        units: those that a cut may follow.
        names: what each is called in error messages and in `[local] cuts`: its last part that is a module.
        first: number of `units[0]` in the backbone.
        tail: what follows them.
        inputs: shape of one sample, as `units[0]` takes it.
        outputs: shape of what each unit puts out for one sample: maps (c, h, w), tokens (t, d) or (d,).
        norms: BatchNorm layers of every unit, and at the end those of the tail.
        classes: number of logits.
    """

    def __init__(self, model: Classifier, sample: Tensor, below: int = 0) -> None:
        units = units_of(model.backbone)[below:]
        if not units:
            raise UserError(
                'nothing of this backbone trains, so there is nothing to divide: set [local] name = "bp", or '
                "another [tuning]"
            )
        self.model = model
        self.first = below
        self.units = units[:-1] or units
        self.tail = Tail(units[-1] if len(units) > 1 else None, model.head)
        parts = [_modules(model.backbone, unit) for unit in units]
        self.names = [next(reversed(found), "the whole") for found in parts[: len(self.units)]]
        self.norms = [_norms(found.values()) for found in parts[: len(self.units)]]
        top = parts[-1].values() if len(units) > 1 else ()
        self.norms.append(_norms([*top, model.head]))
        self.inputs = tuple(sample.shape[1:])
        self.outputs, self.classes = self._shapes(sample[:1])

    def __len__(self) -> int:
        return len(self.units)

    @torch.no_grad()
    def _shapes(self, sample: Tensor) -> tuple[list[tuple[int, ...]], int]:
        shapes = []
        with _at_rest(self.model):
            x = sample
            for unit in self.units:
                x = unit.run(x)
                shapes.append(tuple(x.shape[1:]))
            return shapes, int(self.tail(x).shape[-1])

    def stages(self) -> tuple[int, ...]:
        """Blocks of each resolution behind the stem: (5, 5, 5) of a ResNet-32."""
        return tuple(len(list(group)) for _, group in groupby(self.outputs[1:]))

    def block(self, number: int) -> nn.Module:
        """The module that unit `number` consists of.

        Raises:
            UserError: it is more than a module, so it cannot be copied.
        """
        run = self.units[number].run
        if not isinstance(run, nn.Module):
            raise UserError(
                f"unit {number} ({self.names[number]}) of this backbone is not a module by itself (it may "
                'need a mask) and cannot be copied: use a method without copies ("dgl", "greedy", "hpff")'
            )
        return run

    def run(self, start: int, stop: int, x: Tensor) -> Tensor:
        """The units from `start` up to `stop`."""
        return run_units(self.units[start:stop], x)


def _modules(backbone: nn.Module, unit: Unit) -> dict[str, nn.Module]:
    """A unit's parts that are modules; the others are parameters and buffers."""
    known = dict(backbone.named_modules())
    return {part: known[part] for part in unit.parts if part in known}


def _norms(modules: Iterable[nn.Module]) -> list[_BatchNorm]:
    return [m for module in modules for m in module.modules() if isinstance(m, _BatchNorm)]


@contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def still(norms: Iterable[_BatchNorm]) -> Iterator[None]:
    """BatchNorm layers normalise as they do, and their running statistics do not move."""
    moving = [m for m in norms if m.training and m.track_running_stats]
    before = [(m, m.momentum, m.num_batches_tracked) for m in moving]
    for module in moving:  # the buffers stay, because what checkpointing saves must be the same tensors again
        module.momentum, module.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for module, momentum, count in before:
            module.momentum, module.num_batches_tracked = momentum, count
