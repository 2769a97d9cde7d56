"""What every model of fedsim looks like: a backbone that makes features and a head that makes logits.

    images (as stored: uint8 or float32) ─ backbone ─> features [n, d] ─ head ─> logits [n, classes]

Normalisation and resizing belong to the backbone, so that data are stored once, raw, for all models.
Because the two parts have fixed names, tuning modes, feature caches and personal heads
(`personal = ["head.*"]`) need no code per model.

A backbone may say what it consists of, first to last (`units`): between any two units it may be cut.

    inputs ─ embedding or stem ─ block ─ block ─ ... ─ block ─ top (last norm, pooling) ─> features
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fedsim.data.attributes import Attribute
from fedsim.errors import UnfitTuning

if TYPE_CHECKING:
    from fedsim.models.text_towers import TextSide


_NO_LENGTH = 1e-6  #: length below which a vector has no direction


@dataclass(frozen=True)
class DataInfo:
    """What a model may know when it is built.

    Attributes:
        classes: names of the classes, in the order of the logits.
        sample_shape: of one sample as stored.
        attributes: what else the data say of a sample.
        dtype: of the inputs as stored: uint8, int32 (token ids) or float32.
        folders: where relative paths of weights are looked up (`fedsim.lookup`).
        vocabulary: words of the tokenizer that token ids are from, or None.
        padding: the token id that this tokenizer pads with, or None.
    """

    classes: tuple[str, ...]
    sample_shape: tuple[int, ...]
    attributes: tuple[Attribute, ...] = ()
    dtype: str = "uint8"
    folders: tuple[Path, ...] = ()
    vocabulary: int | None = None
    padding: int | None = None


@dataclass(frozen=True)
class Unit:
    """A part of a backbone that runs as a whole: the smallest thing that a cut may follow.

    The first unit takes raw inputs (normalisation and resizing are part of it), the last one puts out the
    features, and those between them are blocks, one module each.

    Attributes:
        parts: dotted names, relative to the backbone, of the modules, parameters and buffers that `run`
            uses; `""` is the whole backbone. No tensor belongs to two units.
        run: what the unit below puts out (the first unit: raw inputs) -> one tensor [n, ...].
    """

    parts: tuple[str, ...]
    run: Callable[[Tensor], Tensor]

    def owns(self, name: str) -> bool:
        """Whether a parameter, buffer or module (dotted name, relative to the backbone) is the unit's."""
        return any(part in {"", name} or name.startswith(f"{part}.") for part in self.parts)


@runtime_checkable
class Divided(Protocol):
    """A backbone that says what it consists of.

    Its `forward` is `run_units(self.units(), inputs)`, so that running the units *is* the forward pass.
    """

    def units(self) -> list[Unit]:
        """First to last; they use the backbone's present modules, those that a tuning mode inserted, too."""


def units_of(backbone: nn.Module) -> list[Unit]:
    """The backbone's units; one that does not say what it consists of is a single unit."""
    return backbone.units() if isinstance(backbone, Divided) else [Unit(("",), backbone)]


def hooked(module: nn.Module) -> bool:
    """Whether somebody registered a forward hook on the module itself."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def hooked_around(network: nn.Module, units: Iterable[Unit]) -> bool:
    """Whether there are hooks on the network or on a container inside: running the units would miss them."""
    around = {""}
    for unit in units:
        for part in unit.parts:
            while part:
                part = part.rpartition(".")[0]
                around.add(part)
    return any(hooked(network.get_submodule(name)) for name in around)


def run_units(units: Iterable[Unit], x: Tensor) -> Tensor:
    """One after the other."""
    for unit in units:
        x = unit.run(x)
    return x


class Classifier(nn.Module):
    """A backbone and a head.

    Args:
        backbone: maps raw inputs [n, *sample_shape] to features [n, d], float32.
        head: maps features to logits [n, classes].
        head_is_prior: the head already classifies (a CLIP text classifier): bias tuning leaves it frozen.
        derived: entries of the state that were computed -> digest of all that they were computed from. Two
            honest machines may differ in the last bits of such a value, never in its ingredients: while an
            entry is frozen, `payload.frozen_digest` covers the ingredients in its place.

    Attributes:
        train_modules: see `train_only`.
        class_rows: names of parameters with one row per class: their rows are averaged over the clients
            that have samples of the class.
        text: of a CLIP, what captions are written with; only until the model is tuned.
        schooling: what its weights were trained on, where its start accuracy would mislead without.
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
        self.class_rows: tuple[str, ...] = ()
        self.text: TextSide | None = None
        self.schooling = ""

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits [n, classes] for raw inputs [n, ...]."""
        logits: Tensor = self.head(self.backbone(inputs))
        return logits

    def with_head(self, head: nn.Module) -> nn.Module:
        """The same function with another head (modules are not copied)."""
        return nn.Sequential(self.backbone, head)


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


def at_rest(network: nn.Module) -> nn.Module:
    """The same function as long as no parameter changes: what depends on no input is computed once, here.

    Args:
        network: a head or a classifier; a head that gains from this has a method `at_rest`.
    """
    if isinstance(network, Classifier):
        head = at_rest(network.head)
        return network if head is network.head else network.with_head(head)
    resting: Callable[[], nn.Module] | None = getattr(network, "at_rest", None)
    return network if resting is None else resting()


def to_unit(inputs: Tensor) -> Tensor:
    """Inputs as stored -> float32: uint8 is scaled to 0..1, floats are taken as they are."""
    return inputs.float() / 255 if inputs.dtype == torch.uint8 else inputs.float()


def directions(x: Tensor) -> Tensor:
    """Vectors [..., d] divided by their length; zero ones stay zero.

    A gradient is not made larger than 1e6 times: dividing a zero vector by a smallest length does that.
    """
    length = x.norm(dim=-1, keepdim=True)
    return x / torch.where(length > _NO_LENGTH, length, 1.0)


def set_train_mode(model: Classifier, training: bool) -> None:
    """Eval mode everywhere, and train mode in `model.train_modules` when `training`."""
    model.eval()
    if training:
        for prefix in model.train_modules:
            model.get_submodule(prefix).train()
