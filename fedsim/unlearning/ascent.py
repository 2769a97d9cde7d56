"""Projected gradient ascent on the leaving client (Halimi et al. 2022, arXiv 2207.05521).

    w_ref = (w - p w_i) / (1 - p)          the global model less the client's own part
    δ     = mean over random models of ‖w_ref - w_rand‖² / 3
    w     ← w + η ∇ loss, back into the ball ‖w - w_ref‖² ≤ δ, from w_ref;
            it stays where ‖w - w_i‖² first exceeds `far`

p is the client's share of the weights in the mean that made w; the paper's (N w - w_i) / (N - 1) is the case
of N clients that weigh alike and all take part.

All distances are squared L2 norms over the parameters that train. Runs wholly on the model's device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Weights = Sequence[Tensor]


def distance(left: Weights, right: Weights) -> Tensor:
    """Squared L2 distance, a scalar tensor."""
    return torch.stack(
        [(a.detach() - b.detach()).square().sum() for a, b in zip(left, right, strict=True)]
    ).sum()


def reference(w: Weights, own: Weights, share: float) -> list[Tensor]:
    """w_ref of a client with local model `own` and this share (less than 1) of the weights in w."""
    return [(a.detach() - share * b.detach()) / (1 - share) for a, b in zip(w, own, strict=True)]


def projection(
    parameters: Weights, centre: Weights, radius: Tensor, own: Weights, far: float
) -> Callable[[], None]:
    """What to call after each step of ascent.

    Args:
        parameters: they change in place.
        centre: w_ref.
        radius: δ, of squared distances.
        own: the client's local model.
        far: squared distance from `own` at which ascent ends; later steps are taken back.
    """
    halted = torch.zeros((), dtype=torch.bool, device=radius.device)
    last = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def after_step() -> None:
        shrink = (radius / distance(parameters, centre).clamp_min(1e-30)).sqrt().clamp_max(1.0)
        for parameter, middle, before in zip(parameters, centre, last, strict=True):
            inside = middle + (parameter - middle) * shrink
            parameter.copy_(torch.where(halted, before, inside))
            before.copy_(parameter)
        halted.logical_or_(distance(parameters, own) > far)

    return after_step
