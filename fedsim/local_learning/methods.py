"""Methods: which windows a division has, and what trains each. A function is a name of `[local]`.

    bp               one window over everything                             the reference
    checkpointed-bp  the same; inside a block activations are computed twice (arXiv 1604.06174)
    greedy dgl       K windows, a head each                                 (arXiv 1901.08164)
    infopro          K windows, head and decoder                            (arXiv 2101.10832)
    man man++        K windows, coupled to the next block                   (ECCV 2024; arXiv 2507.16279)
    hpff             K windows of one block, K-1 of two; patched heads      (ECCV 2024)
    mlaan            the same with leaping heads                            (arXiv 2406.16633)

A method gets a `Division` and returns windows; its keyword arguments are keys of the experiment file. Papers'
bodies were not available for MAN, HPFF and MLAAN: written from their released code and from notes on them.
`compat = "official"` does what that code does where it matters (see each method).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Le
from torch import nn

from fedsim.errors import UserError
from fedsim.local_learning.chain import Chain
from fedsim.local_learning.couplings import ChannelBias, Leap, Momentum, duplicate, leap_units
from fedsim.local_learning.heads import HEADS, Decoder, Shape, linear
from fedsim.local_learning.lambdas import weights_of
from fedsim.local_learning.objectives import Patched, Supervised, patch_count
from fedsim.local_learning.plans import Plan
from fedsim.local_learning.windows import Auxiliary, Window
from fedsim.ranges import Count, NonNegative

Head = Literal["linear", "1c2f", "dgl"]
Base = Literal["dgl", "infopro"]
Bias = Literal["unit", "channel"]
Compat = Literal["paper", "official"]
Lambdas = list[tuple[float, float]]
Decay = Annotated[float, Ge(0), Le(1)]
_WIDTH = 128  #: of contrasted features


@dataclass(frozen=True)
class Division:
    """A chain and where it is cut.

    Attributes:
        chain: see `Chain`.
        ends: last unit of every block.
    """

    chain: Chain
    ends: Plan

    @property
    def blocks(self) -> int:
        """K."""
        return len(self.ends)

    def start(self, block: int) -> int:
        """First unit of a block."""
        return self.ends[block - 1] + 1 if block else 0

    def shape(self, block: int) -> Shape:
        """What a block puts out for one sample."""
        return self.chain.outputs[self.ends[block]]

    def window(self, first: int, last: int, objective: Auxiliary | None, **options: object) -> Window:
        """A window over blocks `first` to `last`; the last block's own objective is the model's tail."""
        return Window(self.start(first), self.ends[last] + 1, objective, **options)  # type: ignore[arg-type]


Method = Callable[..., list[Window]]


def bp(division: Division, /) -> list[Window]:
    """Back-propagation: one graph over everything; `blocks` plays no role."""
    return [division.window(0, division.blocks - 1, None)]


def checkpointed_bp(division: Division, /) -> list[Window]:
    """Gradient checkpointing: back-propagation that keeps K - 1 activations and computes the others twice.

    The honest rival of local learning: exact gradients, one more forward pass.
    """
    inner = tuple(division.start(block) for block in range(1, division.blocks))
    return [Window(0, len(division.chain), checkpoints=inner)]


def greedy(division: Division, /) -> list[Window]:
    """Greedy supervised learning: a linear head behind the mean of every block (smallest, weakest)."""
    return dgl(division, head="linear")


def dgl(division: Division, /, *, head: Head = "dgl") -> list[Window]:
    """Decoupled greedy learning (arXiv 1901.08164): every block has its own head.

    Args:
        head: `dgl` (pooled 1x1 convolutions and MLP), `1c2f` (one convolution, two linear layers), `linear`.
    """
    classes = division.chain.classes
    return _disjoint(division, lambda block: Supervised(HEADS[head](division.shape(block), classes)))


def infopro(
    division: Division,
    /,
    *,
    contrast: bool = False,
    head: Head = "1c2f",
    reconstruction: list[NonNegative] | None = None,
    task: list[NonNegative] | None = None,
) -> list[Window]:
    """InfoPro (arXiv 2101.10832): a head and a decoder of the image behind every block.

    Args:
        contrast: supervised contrastive task loss instead of cross-entropy.
        head: as of `dgl`.
        reconstruction: λ₁ of the first and of the last window (default: the paper's table).
        task: λ₂ likewise.
    """
    weights = weights_of(division.chain, division.ends, reconstruction, task)

    def objective(block: int) -> Supervised:
        shape = division.shape(block)
        width = _WIDTH if contrast else division.chain.classes
        one, two = weights[block]
        return Supervised(
            HEADS[head](shape, width),
            decoder=Decoder(shape, division.chain.inputs),
            task=two,
            reconstruction=one,
            contrast=contrast,
        )

    return _disjoint(division, objective)


def man(
    division: Division,
    /,
    *,
    base: Base = "dgl",
    bias: Bias = "unit",
    momentum: Decay = 0.995,
    compat: Compat = "paper",
) -> list[Window]:
    """Momentum auxiliary network (ECCV 2024): heads see the next block's first unit, in an EMA and a copy.

    Args:
        base: `dgl`, or `infopro` with its decoder.
        bias: `unit`, a trainable copy of the unit (released code), or `channel`, a number for every channel
            (a reading of the paper's "learnable bias": less memory, less time).
        momentum: of the EMA, per step.
        compat: `official` begins with independent random copies, and (base `infopro`) takes λ from the stage
            of the next unit, as the released code does.
    """
    return _coupled(division, base, bias, momentum, compat, scaled=False)


def man_plus(
    division: Division,
    /,
    *,
    base: Base = "dgl",
    bias: Bias = "unit",
    momentum: Decay = 0.995,
    compat: Compat = "paper",
) -> list[Window]:
    """MAN++ (arXiv 2507.16279): MAN with a learnable scale between copy and EMA.

    Args:
        base: `dgl`, or `infopro` with its decoder.
        bias: as of `man`.
        momentum: of the EMA, per step.
        compat: as of `man`.
    """
    return _coupled(division, base, bias, momentum, compat, scaled=True)


def hpff(
    division: Division,
    /,
    *,
    base: Base = "dgl",
    cascade: Count = 2,
    patches: Count = 2,
    independent_weight: NonNegative = 0.001,
    cascade_weight: NonNegative = 0.999,
) -> list[Window]:
    """HPFF (ECCV 2024): every block alone and with its predecessors; heads see patches, one at a time.

    Args:
        base: `dgl`, or `infopro`: cascade windows reconstruct the image, too.
        cascade: blocks of a cascade window.
        patches: patches a side (1: no patch feature fusion).
        independent_weight: of the losses of single blocks.
        cascade_weight: of the losses of cascades.
    """
    weights = weights_of(division.chain, division.ends) if base == "infopro" else None

    def single(block: int) -> Auxiliary:
        return _patched(division, block, patches, None)

    def several(block: int) -> Auxiliary:
        return _patched(division, block, patches, weights)

    return _hierarchy(division, cascade, independent_weight, cascade_weight, single, several)


def mlaan(
    division: Division,
    /,
    *,
    base: Base = "dgl",
    cascade: Count = 2,
    leap: Count = 4,
    momentum: Decay = 0.995,
    independent_weight: NonNegative = 0.001,
    cascade_weight: NonNegative = 0.999,
    compat: Compat = "paper",
) -> list[Window]:
    """MLAAN (arXiv 2406.16633): HPFF's hierarchy; heads of cascades leap over later units, with EMAs.

    Args:
        base: heads of single blocks: `dgl`, or `infopro` with its decoder.
        cascade: blocks of a cascade window.
        leap: units that a head leaps over, at most (more where more units change the shape).
        momentum: of the EMAs, per step.
        independent_weight: of the losses of single blocks.
        cascade_weight: of the losses of cascades.
        compat: `official` has an EMA at the first unit of a leap only, added instead of in the mean, random
            copies, and trains the last block by its cascade alone.
    """
    official = compat == "official"
    chain = division.chain
    weights = weights_of(chain, division.ends) if base == "infopro" else None

    def several(block: int) -> Auxiliary:
        units = leap_units(chain.outputs, division.ends[block], leap)
        coupling = Leap([chain.block(unit) for unit in units], momentum, official=official)
        return Supervised(linear(chain.outputs[-1], chain.classes), coupling)

    def single(block: int) -> Auxiliary:
        return _based(division, division.shape(block), None, block, weights)

    windows = _hierarchy(division, cascade, independent_weight, cascade_weight, single, several)
    return [w for w in windows if not (official and w.objective is None and w.weight == independent_weight)]


# ------------------------------------------------------------------------------------ topologies


def _disjoint(division: Division, objective: Callable[[int], Auxiliary]) -> list[Window]:
    """K windows of one block each."""
    last = division.blocks - 1
    return [division.window(k, k, objective(k) if k < last else None) for k in range(division.blocks)]


def _hierarchy(
    division: Division,
    cascade: int,
    independent_weight: float,
    cascade_weight: float,
    single: Callable[[int], Auxiliary],
    several: Callable[[int], Auxiliary],
) -> list[Window]:
    """K windows of one block and, sliding by one, those of `cascade` blocks."""
    last = division.blocks - 1
    if cascade > division.blocks:
        raise UserError(
            f"[local] cascade = {cascade} blocks, but the backbone is divided into {division.blocks}"
        )
    windows = [
        division.window(k, k, single(k) if k < last else None, weight=independent_weight)
        for k in range(division.blocks)
    ]
    for k in range(cascade - 1, division.blocks):
        objective = several(k) if k < last else None
        windows.append(division.window(k - cascade + 1, k, objective, weight=cascade_weight, kind="cascade"))
    return windows


def _coupled(
    division: Division, base: Base, bias: Bias, momentum: float, compat: Compat, *, scaled: bool
) -> list[Window]:
    """MAN's windows: the head of a block stands behind copies of the next block's first unit."""
    official = compat == "official"
    chain = division.chain
    weights = weights_of(chain, division.ends, by_stage=official) if base == "infopro" else None

    def objective(block: int) -> Supervised:
        following = division.start(block + 1)
        unit, shape = chain.block(following), chain.outputs[following]
        added = duplicate(unit, independent=official) if bias == "unit" else ChannelBias(shape)
        coupling = Momentum(unit, added, momentum, scaled=scaled, independent=official)
        return _based(division, shape, coupling, block, weights)

    return _disjoint(division, objective)


# ------------------------------------------------------------------------------------ objectives


def _based(
    division: Division, shape: Shape, coupling: nn.Module | None, block: int, weights: Lambdas | None
) -> Supervised:
    """DGL's head on what comes out of the coupling, or (weights) InfoPro's head and decoder."""
    classes = division.chain.classes
    if weights is None:
        return Supervised(HEADS["dgl"](shape, classes), coupling)
    one, two = weights[block]
    decoder = Decoder(shape, division.chain.inputs)
    return Supervised(HEADS["1c2f"](shape, classes), coupling, decoder, task=two, reconstruction=one)


def _patched(division: Division, block: int, wanted: int, weights: Lambdas | None) -> Auxiliary:
    """A head, and (weights) a decoder, for patches of what a block puts out."""
    shape, image = division.shape(block), division.chain.inputs
    n = patch_count(shape, wanted)
    part = _part(shape, n)
    head = HEADS["dgl" if weights is None else "1c2f"](part, division.chain.classes)
    if weights is None:
        return Supervised(head) if n == 1 else Patched(head, None, n)
    one, two = weights[block]
    decoder = Decoder(part, _part(image, n))
    if n == 1:
        return Supervised(head, None, decoder, task=two, reconstruction=one)
    return Patched(head, decoder, n, task=two, reconstruction=one)


def _part(shape: Shape, n: int) -> Shape:
    """Shape of the largest of n·n patches."""
    if len(shape) == 3:
        return (shape[0], *(-(-side // n) for side in shape[1:]))
    return (-(-shape[0] // n**2), *shape[1:]) if len(shape) == 2 else shape
