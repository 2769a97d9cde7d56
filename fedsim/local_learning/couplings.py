"""What couples a window to units behind it: copies of later units between a window and its head.

    MAN    (arXiv 2024 ECCV; code)   z = bias(x) + ema(x)
    MAN++  (arXiv 2507.16279; code)  z = s·bias(x) + (2 - s)·ema(x),  s one learnable number, 1 at the start
    MLAAN  (arXiv 2406.16633; code)  z <- (step_j(z) + ema_j(z)) / 2 along a few later units, up to the last

`bias` ("learnable bias") and `step_j` are trainable copies, `ema` is a frozen copy that follows the live
unit: ema <- m·ema + (1 - m)·unit after the window's backward pass, parameters only. Gradients flow through
it. `bias` may also be one number a channel.

The released code gives all copies independent random weights (`independent`); here they begin as copies, so
that an EMA that is rebuilt in every federated round is one from its first step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn


class Follower(nn.Module):
    """A frozen copy of a live module that follows it slowly.

    Args:
        source: the live module.
        momentum: m of one step.
        independent: begin with random weights instead of the source's.
    """

    def __init__(self, source: nn.Module, momentum: float, *, independent: bool = False) -> None:
        super().__init__()
        self.copy = duplicate(source, independent=independent).requires_grad_(False)
        self.momentum = momentum
        self.source = (source,)  # in a tuple: no submodule, its parameters are the backbone's
        self.twins = ((self.copy, source),)
        self.begun = () if independent else self.twins

    def forward(self, x: Tensor) -> Tensor:
        """As the source."""
        out: Tensor = self.copy(x)
        return out

    @torch.no_grad()
    def follow(self) -> None:
        """One step towards the source."""
        for mine, live in zip(self.copy.parameters(), self.source[0].parameters(), strict=True):
            mine.lerp_(live, 1 - self.momentum)

    def rebuild(self) -> None:
        """Become the source, as it is now."""
        _become(self.copy, self.source[0])


class Momentum(nn.Module):
    """The coupling of MAN and MAN++: shape as of the unit that is copied.

    Args:
        unit: first unit of the next block.
        bias: what is added to the EMA: a copy of the unit, or a `ChannelBias`.
        momentum: of the EMA.
        scaled: with the learnable scale of MAN++.
        independent: see `Follower`.
    """

    def __init__(
        self, unit: nn.Module, bias: nn.Module, momentum: float, *, scaled: bool, independent: bool
    ) -> None:
        super().__init__()
        self.bias = bias
        self.ema = Follower(unit, momentum, independent=independent)
        self.scale = nn.Parameter(torch.ones(1, device=_device(unit))) if scaled else None
        self.twins = () if isinstance(bias, ChannelBias) else ((bias, unit),)
        self.begun = () if independent else self.twins  # those that begin with the unit's own values

    def forward(self, x: Tensor) -> Tensor:
        """z."""
        bias, ema = self.bias(x), self.ema(x)
        out: Tensor = bias + ema if self.scale is None else self.scale * bias + (2 - self.scale) * ema
        return out


class ChannelBias(nn.Module):
    """One learnable number a channel, 0 at the start: [n, ...] -> what is added to maps, tokens or vectors.

    Args:
        shape: of what it is added to, for one sample.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        place = (1, shape[0], 1, 1) if len(shape) == 3 else (1,) * len(shape) + (shape[-1],)
        self.values = nn.Parameter(torch.zeros(place))

    def forward(self, x: Tensor) -> Tensor:
        """The bias, whatever x is."""
        return self.values


class Leap(nn.Module):
    """The leap of MLAAN: trainable copies of a few later units, each in the mean with an EMA of its unit.

    The mean is our reading. A sum at every unit doubles the activations each time (a residual unit passes its
    input on), 16 times after four units, and does not train: the head of a leap has no normalisation.

    Args:
        units: those units, in order.
        momentum: of the EMAs.
        official: as the released code: random weights, and an EMA at the first unit only, which is added.
    """

    def __init__(self, units: Sequence[nn.Module], momentum: float, *, official: bool) -> None:
        super().__init__()
        followed = units[:1] if official else units
        self.steps = nn.ModuleList(duplicate(unit, independent=official) for unit in units)
        self.emas = nn.ModuleList(Follower(unit, momentum, independent=official) for unit in followed)
        self.share = 1.0 if official else 0.5
        self.twins = tuple(zip(self.steps, units, strict=True))
        self.begun = () if official else self.twins

    def forward(self, x: Tensor) -> Tensor:
        """[n, ...] -> shape as of the last unit."""
        for number, step in enumerate(self.steps):
            x = self.share * (step(x) + self.emas[number](x)) if number < len(self.emas) else step(x)
        return x


def leap_units(shapes: Sequence[tuple[int, ...]], after: int, most: int) -> list[int]:
    """Units over which a leap from behind unit `after` goes: all that change the shape, and the last.

    The papers' tables are of this kind; this rule is a reconstruction of them for any net. Room that is left
    is filled with units in between, spread evenly.

    Args:
        shapes: what each unit puts out.
        after: number of the unit that the leap starts behind.
        most: so many at most (more only where more units change the shape).
    """
    rest = range(after + 1, len(shapes))
    needed = {n for n in rest if shapes[n] != shapes[n - 1]} | {len(shapes) - 1}
    spare = [n for n in rest if n not in needed]
    room = min(most - len(needed), len(spare))
    if room > 0:
        needed |= {spare[int((k + 0.5) * len(spare) / room)] for k in range(room)}
    return sorted(needed)


def same_mode(networks: nn.Module) -> None:
    """Every copy inside in the mode of its live module: a tuning mode may keep some in eval mode."""
    for part in networks.modules():
        for copy, live in getattr(part, "twins", ()):
            for mine, theirs in zip(copy.modules(), live.modules(), strict=True):
                mine.training = theirs.training


def begin_as_live(networks: nn.Module) -> None:
    """Every copy inside becomes its live module as it is now; those that begin at random stay."""
    for part in networks.modules():
        for copy, live in getattr(part, "begun", ()):
            _become(copy, live)


@torch.no_grad()
def _become(copy: nn.Module, live: nn.Module) -> None:
    for mine, theirs in zip(copy.parameters(), live.parameters(), strict=True):
        mine.copy_(theirs)


def duplicate(module: nn.Module, *, independent: bool = False) -> nn.Module:
    """A copy with parameters of its own.

    Args:
        module: what is copied.
        independent: with random weights, as the released code of MAN and MLAAN draws them.
    """
    made = deepcopy(module)
    if independent:
        for part in made.modules():
            if isinstance(part, nn.Conv2d):
                fan_out = part.kernel_size[0] * part.kernel_size[1] * part.out_channels
                nn.init.normal_(part.weight, 0, math.sqrt(2 / fan_out))
            elif isinstance(part, nn.Linear):
                part.reset_parameters()
    return made


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
