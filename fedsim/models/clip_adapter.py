"""Image-feature adapter of FedCLIP (arXiv 2302.13485): a gate on the features, in front of the head.

    features f [n, d] ─> f * d * softmax(W2 tanh(W1 f + b1) + b2) ─> head

W2 = b2 = 0 at the start, so the gate is 1 everywhere. (The factor d changes no cosine; it makes the start
an identity for linear heads, too.) The backbone is never touched: its features can be cached.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedsim.errors import UnfitTuning
from fedsim.models.base import Classifier, train_only


class FeatureGate(nn.Module):
    """f [n, d] -> f times a positive gate per feature whose mean over features is 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Same shape as features."""
        gate = torch.softmax(self.outer(torch.tanh(self.inner(features))), dim=-1)
        return features * gate * features.shape[-1]

    def before(self, module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        """Forward pre-hook: what the head gets goes through the gate."""
        gated: Tensor = self(inputs[0])
        return gated


def clip_adapter(model: Classifier, /, *, head: bool | None = None) -> Classifier:
    """A gate on the features in front of the head trains; any model, made for CLIP.

    The gate is `head.adapter.*`. Features of the frozen backbone are computed once.

    Args:
        head: whether the head trains, too; by default a new head does, a CLIP text classifier does not.

    Raises:
        UnfitTuning: the head has no weight matrix [classes, features].
    """
    weight = getattr(model.head, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise UnfitTuning(
            "tuning 'clip-adapter' needs a head with a weight [classes, features], this model's head is "
            f"a {type(model.head).__name__}"
        )
    gate = FeatureGate(weight.shape[1]).to(weight.device)
    model.head.add_module("adapter", gate)
    model.head.register_forward_pre_hook(gate.before)
    start = "head.adapter." if (model.head_is_prior if head is None else not head) else "head."
    return train_only(model, lambda name: name.startswith(start), mode="clip-adapter")
