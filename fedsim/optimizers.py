"""The optimisers that a client may name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def make_optimizer(
    parameters: Iterable[Any], name: str, *, lr: float, momentum: float = 0.0, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """`sgd` or `adamw`.

    Args:
        parameters: parameters, or groups of them.
        name: which.
        lr: learning rate.
        momentum: of `sgd`.
        weight_decay: L2 term of `sgd`, decoupled decay of `adamw`.
    """
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)
