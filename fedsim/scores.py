"""What a model says of test samples, row by row: any part of the test set is then a choice of rows.

Base-to-new (CoCoOp, arXiv 2203.05557): the first classes are trained on (base), the last ones are new. A
sample is then scored twice, among all classes and among those of its own kind, as the field does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """Of each row.

    Attributes:
        loss: cross-entropy among all classes, float32 [n].
        hit: whether the largest logit is the label's, bool [n].
        own_loss: cross-entropy among the classes of the label's kind (base or new), float32 [n].
        own_hit: whether the largest logit among those is the label's, bool [n].
    """

    loss: Tensor
    hit: Tensor
    own_loss: Tensor
    own_hit: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Scores]) -> Scores:
        """Scores of all rows of some batches."""
        if not parts:
            return cls(torch.empty(0), torch.empty(0) > 0, torch.empty(0), torch.empty(0) > 0)
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in cls.__annotations__))

    def at(self, rows: NDArray[np.int64]) -> Scores:
        """Scores of some rows."""
        chosen = torch.from_numpy(rows).to(self.loss.device)
        return Scores(*(getattr(self, name)[chosen] for name in self.__annotations__))

    def means(self, *, among_own: bool = False) -> dict[str, float]:
        """`num-examples`, mean `loss` and `accuracy`; NaN where there are no rows to measure.

        Args:
            among_own: count the scores among the classes of the label's kind.
        """
        loss, hit = (self.own_loss, self.own_hit) if among_own else (self.loss, self.hit)
        count = len(loss)
        if not count:
            return {"num-examples": 0, "loss": math.nan, "accuracy": math.nan}
        return {
            "num-examples": count,
            "loss": loss.double().sum().item() / count,
            "accuracy": hit.sum().item() / count,
        }


def scores_of(logits: Tensor, labels: Tensor, base: int) -> Scores:
    """Scores of a batch.

    Args:
        logits: float32 [n, classes].
        labels: int64 [n].
        base: how many classes, the first, are base; all of them: the two kinds of scores are equal.
    """
    loss, hit = _scores(logits, labels)
    if base == logits.shape[1]:
        return Scores(loss, hit, loss, hit)
    kind = torch.arange(logits.shape[1], device=logits.device) < base
    other = (labels < base)[:, None] != kind[None]
    return Scores(loss, hit, *_scores(logits.masked_fill(other, -torch.inf), labels))


def _scores(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return F.cross_entropy(logits, labels, reduction="none"), logits.argmax(1) == labels
