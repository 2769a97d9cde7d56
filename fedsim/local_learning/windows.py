"""Windows, and the loop that trains them: the backward pass of each runs before the next one's forward pass.

    boundary 0 ─ window ─ objective ─ backward ─┐ graph freed
                    └─ boundary 1 (detached) ─ window ─ objective ─ backward ─ ... ─ tail ─ loss ─ backward

One loss over all windows and a single backward pass give the same gradients and save nothing.

A unit that several windows run (HPFF, MLAAN) moves its BatchNorm statistics in the first of them alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import NamedTuple, Protocol

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from fedsim.errors import UserError
from fedsim.local_learning.chain import Chain, still
from fedsim.local_learning.couplings import Follower

Backward = Callable[[Tensor], None]


class Batch(NamedTuple):
    """Inputs as the first unit takes them [n, ...], and labels int64 [n]."""

    inputs: Tensor
    labels: Tensor


class Objective(Protocol):
    """What a window's activations are trained for."""

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        """The loss, a scalar with a graph."""

    def backward(self, x: Tensor, batch: Batch, weight: float, backward: Backward) -> Tensor:
        """Leave gradients of `weight` times the loss in all parameters behind x; returns the detached loss.

        Args:
            x: activations with the window's graph.
            batch: see `Batch`.
            weight: of this window.
            backward: called with a scalar: it may scale losses (fp16).
        """


class Auxiliary(nn.Module):
    """A network behind a window, with its loss: what trains all windows but the last."""

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """See `Objective.__call__`."""
        raise NotImplementedError

    def backward(self, x: Tensor, batch: Batch, weight: float, backward: Backward) -> Tensor:
        """See `Objective`."""
        return backward_of(self(x, batch), weight, backward)


def backward_of(loss: Tensor, weight: float, backward: Backward) -> Tensor:
    """Backward pass of a weighted loss; the detached loss."""
    backward(loss if weight == 1 else weight * loss)
    return loss.detach()


@dataclass(frozen=True)
class Window:
    """A range of units whose graph is alive at one time, and what it is trained for.

    Attributes:
        start: first unit.
        stop: behind the last unit.
        objective: an auxiliary network with its loss, or (None) the model's own tail and loss.
        weight: of the loss.
        kind: tells windows apart that end at the same unit; part of their parameters' names.
        checkpoints: units inside, ascending, whose inputs are kept while what lies between is computed a
            second time in the backward pass (arXiv 1604.06174).
    """

    start: int
    stop: int
    objective: Auxiliary | None = None
    weight: float = 1.0
    kind: str = ""
    checkpoints: tuple[int, ...] = ()

    @cached_property
    def followers(self) -> tuple[Follower, ...]:
        """Copies that follow their unit after this window's backward pass."""
        modules = () if self.objective is None else self.objective.modules()
        return tuple(module for module in modules if isinstance(module, Follower))

    def key(self, first: int) -> str:
        """Name of its auxiliary network: the unit behind which it is, so that it does not depend on K.

        Args:
            first: number of the chain's first unit in the backbone.
        """
        return f"u{first + self.stop - 1}{self.kind and '_' + self.kind}"


def in_order(windows: Sequence[Window]) -> list[Window]:
    """In the order in which they can run: every window starts where an earlier one has passed."""
    return sorted(windows, key=lambda w: (w.stop, w.start))


def check(windows: Sequence[Window], units: int) -> None:
    """Whether windows, in order, can train a chain of so many units.

    Raises:
        UserError: some units or the model's head are in no window, a window starts where none has been, or
            two have the same place and kind.
    """
    if not any(window.objective is None and window.stop == units for window in windows):
        raise UserError(
            "no window of this method trains the model's head: one must go up to the last unit without an "
            "objective of its own"
        )
    reached = {0}
    for window in windows:
        if not 0 <= window.start < window.stop <= units or window.start not in reached:
            raise UserError(
                f"a window over the units {window.start} to {window.stop - 1} cannot run: windows must "
                "follow one another without a gap, each starting where an earlier one has been"
            )
        seen = window.checkpoints[-1] if window.checkpoints else window.start
        reached |= set(range(seen + 1, window.stop + 1))
    keys = [window.key(0) for window in windows if window.objective is not None]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice:
        raise UserError(
            f"two windows of this method have a network at '{twice}': give one of them a `kind` of its own"
        )


def run(
    chain: Chain,
    windows: Sequence[Window],
    own: Objective,
    batch: Batch,
    backward: Backward,
    after: Callable[[int], None] = lambda number: None,
) -> list[Tensor]:
    """Forward and backward over all windows; gradients are added to those that are there.

    Args:
        chain: what they run over.
        windows: `in_order`.
        own: the objective of windows that end in the model's tail.
        batch: see `Batch`.
        backward: see `Objective`.
        after: called with every window's number when its gradients are there and its graph is gone.

    Returns:
        Detached losses, one per window.
    """
    boundaries = {0: batch.inputs}
    moved: set[int] = set()
    losses = []
    for number, window in enumerate(windows):
        later = {other.start for other in windows[number + 1 :]}
        x = _forward(chain, window, boundaries, later, moved)
        objective = own if window.objective is None else window.objective
        tail = chain.norms[-1] if window.objective is None and len(chain) in moved else ()
        with still(tail):
            losses.append(objective.backward(x, batch, window.weight, backward))
        del x
        moved.update(range(window.start, window.stop))
        if window.objective is None:
            moved.add(len(chain))
        boundaries = {at: value for at, value in boundaries.items() if at in later}
        for follower in window.followers:
            follower.follow()
        after(number)
    return losses


def _forward(
    chain: Chain, window: Window, boundaries: dict[int, Tensor], later: set[int], moved: set[int]
) -> Tensor:
    """The window's activations with their graph; boundaries that a later window starts from are added."""
    x = boundaries[window.start]
    marks = [window.start, *window.checkpoints, window.stop]
    for start, stop in pairwise(marks):
        if stop < window.stop:
            norms = [norm for unit in range(start, stop) for norm in chain.norms[unit]]
            x = _recomputed(partial(chain.run, start, stop), x, norms)
            continue
        for unit in range(start, stop):
            with still(chain.norms[unit] if unit in moved else ()):
                x = chain.units[unit].run(x)
            if unit + 1 in later and unit + 1 not in boundaries:
                boundaries[unit + 1] = x.detach()
    return x


def _recomputed(function: Callable[[Tensor], Tensor], x: Tensor, norms: list[_BatchNorm]) -> Tensor:
    """`function(x)`, of which only x is kept for the backward pass."""
    out: Tensor = checkpoint(
        function, x, use_reentrant=False, context_fn=lambda: (nullcontext(), still(norms))
    )
    return out
