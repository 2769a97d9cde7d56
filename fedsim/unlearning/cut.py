"""A classifier with a cut: the place whose representation is to lose an attribute.

    x ─ unit 0 ─ ... ─ unit k-1 ─> h ─ eraser ─> r(h) ─ unit k ─ ... ─ head ─> logits
                                   │             └ what may be released, what attackers get
                                   └ detacher (a term of the loss, `fedsim.unlearning.detach`)

The eraser is the identity until LEACE sets it; it never trains, but it travels with the shared part (2·d·q
+ 2·d numbers), so that checkpoints, clients and exports have it without further code.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from fedsim.config import Experiment
from fedsim.data.attributes import Attribute, positions
from fedsim.errors import UserError
from fedsim.models.base import Classifier, DataInfo, run_units, set_train_mode, units_of
from fedsim.unlearning.detach import Space
from fedsim.unlearning.statistics import GroupStatistics

DETACHER = "detacher"  #: name of the auxiliary part in the model's state


class Eraser(nn.Module):
    """h ↦ h - ((h - mean) left) right, or mean where `keep` is 0; exactly the identity at first.

    In float64: what is left of a feature may be small beside it.

    Args:
        width: d.
        columns: q.
    """

    mean: Tensor
    left: Tensor
    right: Tensor
    keep: Tensor

    def __init__(self, width: int, columns: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("left", torch.zeros(width, columns))
        self.register_buffer("right", torch.zeros(columns, width))
        self.register_buffer("keep", torch.ones(width))

    def forward(self, h: Tensor) -> Tensor:
        """[n, ...] -> [n, ...] of the same dtype."""
        flat = h.flatten(1).double()  # autocast leaves float64 alone
        mean = self.mean.double()
        erased = flat - (flat - mean) @ self.left.double() @ self.right.double()
        return torch.where(self.keep > 0, erased, mean).to(h.dtype).reshape(h.shape)


class Detachable(Classifier):
    """A classifier that says what is at its cut.

    Args:
        model: a tuned classifier, taken over.
        cut: how many units are below the cut.
        attributes: what is to be unlearned there.
        width: numbers of one representation.
        detacher: the term of the loss; its networks, if it has some, are part of the state.
        group_statistics: whether the groups' means travel along (see `GroupStatistics`).
        boundary: logits from h, pooled, where what is below the cut learns by itself.
    """

    def __init__(
        self,
        model: Classifier,
        cut: int,
        attributes: tuple[Attribute, ...],
        width: int,
        detacher: nn.Module,
        *,
        group_statistics: bool = False,
        boundary: nn.Module | None = None,
    ) -> None:
        super().__init__(model.backbone, model.head, head_is_prior=model.head_is_prior, derived=model.derived)
        self.class_rows, self.text = model.class_rows, model.text
        self.cut, self.attributes, self.width = cut, attributes, width
        self.eraser = Eraser(width, sum(attribute.columns for attribute in attributes))
        self.add_module(DETACHER, detacher)
        self.statistics = GroupStatistics(attributes, width) if group_statistics else None
        self.boundary = boundary
        buffers = ["eraser", *(["statistics"] if group_statistics else [])]
        self.train_modules = (*model.train_modules, *buffers)  # so that their buffers belong to the payload

    def below(self, inputs: Tensor) -> Tensor:
        """h [n, ...] for raw inputs, before the eraser."""
        units = units_of(self.backbone)
        h: Tensor = self.backbone(inputs) if self.cut == len(units) else run_units(units[: self.cut], inputs)
        return h

    def above(self, h: Tensor) -> Tensor:
        """Logits [n, classes] for h."""
        logits: Tensor = self.head(run_units(units_of(self.backbone)[self.cut :], self.eraser(h)))
        return logits

    def local_logits(self, h: Tensor) -> Tensor:
        """Logits [n, classes] of the head at the boundary, for h [n, ...]."""
        assert self.boundary is not None
        logits: Tensor = self.boundary(h.flatten(2).mean(2) if h.dim() > 2 else h)
        return logits

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits [n, classes] for raw inputs."""
        return self.above(self.below(inputs))

    def later(self, h: Tensor) -> list[Tensor]:
        """r(h) and what every later unit puts out, float32 [n, d], first to last."""
        out = [self.eraser(h)]
        for unit in units_of(self.backbone)[self.cut :]:
            out.append(unit.run(out[-1]))
        return [x.flatten(1).float() for x in out]

    def released(self, inputs: Tensor) -> Tensor:
        """What may be given away: r(h) float32 [n, d]."""
        found: Tensor = self.eraser(self.below(inputs))
        return found.flatten(1).float()

    def rest_below(self) -> None:
        """Eval mode for everything below the cut: what is kept as it is must not move its statistics."""
        for unit in units_of(self.backbone)[: self.cut]:
            for name, module in self.backbone.named_modules():
                if unit.owns(name):
                    module.training = False

    def with_head(self, head: nn.Module) -> nn.Module:
        """The same function with another head."""
        other = copy.copy(self)
        other._modules = {**self._modules, "head": head}
        return other


def detachable(experiment: Experiment, model: Classifier, info: DataInfo) -> Detachable:
    """The model of an experiment whose [detacher] names attributes.

    Raises:
        UserError: an attribute is unknown, there is no such cut, or the detacher does not fit the attributes.
    """
    keys = experiment["detacher"].common
    known = info.attributes
    try:
        attributes = tuple(known[place] for place in positions(keys["attributes"], known))
    except UserError as error:
        raise UserError(f"[detacher] attributes: {error}") from error
    units = units_of(model.backbone)
    cut = keys.get("cut", len(units))
    if cut > len(units):
        raise UserError(
            f"[detacher] cut = {cut}, but the backbone of model '{experiment['model'].name}' has "
            f"{len(units)} units; give 1 to {len(units)}, or leave the key out for its features"
        )
    shape = _shape(model, cut, info)
    width = math.prod(shape)
    inputs = 0 if info.dtype == "int32" else math.prod(info.sample_shape)
    detacher = experiment.build("detacher", Space(attributes, width, len(info.classes), inputs))
    boundary = nn.Linear(shape[0], len(info.classes)) if keys["isolated"] else None
    statistics = keys["group_statistics"]
    return Detachable(model, cut, attributes, width, detacher, group_statistics=statistics, boundary=boundary)


@torch.no_grad()
def _shape(model: Classifier, cut: int, info: DataInfo) -> tuple[int, ...]:
    """Of one representation at a cut."""
    set_train_mode(model, training=False)
    device = next(model.parameters()).device
    sample = torch.zeros(1, *info.sample_shape, dtype=getattr(torch, info.dtype), device=device)
    units = units_of(model.backbone)
    h = model.backbone(sample) if cut == len(units) else run_units(units[:cut], sample)
    return tuple(h.shape[1:])
