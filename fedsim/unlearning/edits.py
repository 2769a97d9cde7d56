"""One-shot changes of a state that make a model forget, or seem to: pure functions on named tensors.

negated      w -> -w in the first layer (NoT, CVPR 2025: no data, no storage)
head_masked  the class can no longer be the answer, everything below the head is as it was: a control
fresh_rows   new rows in the head: how whoever learns a class again would begin
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fedsim.errors import UserError

State = dict[str, Tensor]

#: a logit that never wins, and no overflow in half precision
_NEVER = -1e4


def negated(state: Mapping[str, Tensor], layer: str) -> State:
    """A copy with the weights of `layer` negated (its bias is not).

    Raises:
        UserError: its weights do not travel (the tuning mode freezes them).
    """
    name = f"{layer}.weight"
    _require(name, state, "not")
    return {**state, name: -state[name]}


def head_masked(state: Mapping[str, Tensor], head: nn.Module, classes: Sequence[int]) -> State:
    """A copy in which the linear head never answers the classes: rows 0, bias far below all logits."""
    return _rows(state, head, classes, "head-mask", _NEVER)


def fresh_rows(state: Mapping[str, Tensor], head: nn.Module, classes: Sequence[int]) -> State:
    """A copy whose head knows nothing of the classes: rows and bias 0."""
    return _rows(state, head, classes, "relearn", 0.0)


def _rows(
    state: Mapping[str, Tensor], head: nn.Module, classes: Sequence[int], edit: str, bias: float
) -> State:
    if not isinstance(head, nn.Linear) or head.bias is None:
        raise UserError(
            f"edit '{edit}' changes rows of a linear head with a bias; this model's head is a "
            f"{type(head).__name__}"
        )
    changed = dict(state)
    for name, value in (("head.weight", 0.0), ("head.bias", bias)):
        _require(name, state, edit)
        changed[name] = state[name].index_fill(0, torch.tensor(classes), value)
    return changed


def _require(name: str, state: Mapping[str, Tensor], edit: str) -> None:
    if name not in state:
        raise UserError(f"edit '{edit}' changes '{name}', which this [tuning] freezes; choose another method")
