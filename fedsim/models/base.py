"""What every model of fedsim looks like: a backbone that makes features and a head that makes logits.

    images (as stored: uint8 or float32) ─ backbone ─> features [n, d] ─ head ─> logits [n, classes]

Normalisation and resizing belong to the backbone, so that data are stored once, raw, for all models.
Because the two parts have fixed names, tuning modes, feature caches and personal heads
(`personal = ["head.*"]`) need no code per model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fedsim.errors import UnfitTuning


@dataclass(frozen=True)
class DataInfo:
    """What a model may know when it is built.

    Attributes:
        classes: names of the classes, in the order of the logits.
        sample_shape: of one sample as stored.
        folders: where relative paths of weights are looked up (`fedsim.lookup`).
    """

    classes: tuple[str, ...]
    sample_shape: tuple[int, ...]
    folders: tuple[Path, ...] = ()


class Classifier(nn.Module):
    """A backbone and a head.

    Args:
        backbone: maps raw inputs [n, *sample_shape] to features [n, d], float32.
        head: maps features to logits [n, classes].
        head_is_prior: the head already classifies (a CLIP text classifier): bias tuning leaves it frozen.
        derived: entries of the state that were computed -> digest of all that they were computed from. Two
            honest machines may differ in the last bits of such a value, never in its ingredients: while an
            entry is frozen, `payload.frozen_digest` covers the ingredients in its place.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        *,
        head_is_prior: bool = False,
        derived: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.head_is_prior = head_is_prior
        self.derived = dict(derived or {})
        self.train_modules: tuple[str, ...] = ()

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits [n, classes] for raw inputs [n, ...]."""
        logits: Tensor = self.head(self.backbone(inputs))
        return logits


def train_only(
    model: Classifier, chosen: Callable[[str], bool], *, mode: str, train_modules: Iterable[str] = ()
) -> Classifier:
    """Let gradients flow into the chosen parameters and into nothing else.

    Args:
        model: changed in place and returned.
        chosen: says of a parameter's name whether it trains.
        mode: the tuning mode's name, for the error message.
        train_modules: prefixes of modules that run in train mode (dropout on, BatchNorm statistics
            moving); `""` is the whole model. Everything else stays in eval mode, so the statistics of a
            frozen backbone never move.

    Raises:
        UnfitTuning: no parameter was chosen.
    """
    names = [name for name, _ in model.named_parameters() if chosen(name)]
    if not names:
        kinds = sorted({name.rsplit(".", 1)[-1] for name, _ in model.named_parameters()})
        raise UnfitTuning(
            f"tuning '{mode}' selects no parameter of this model (its parameters end in {', '.join(kinds)})"
        )
    selected = set(names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in selected)
    model.train_modules = tuple(train_modules)
    return model


def to_unit(inputs: Tensor) -> Tensor:
    """Inputs as stored -> float32: uint8 is scaled to 0..1, floats are taken as they are."""
    return inputs.float() / 255 if inputs.dtype == torch.uint8 else inputs.float()


def set_train_mode(model: Classifier, training: bool) -> None:
    """Eval mode everywhere, and train mode in `model.train_modules` when `training`."""
    model.eval()
    if training:
        for prefix in model.train_modules:
            model.get_submodule(prefix).train()
