"""Fresh attackers: what somebody who gets the representations could read of an attribute.

A probe is trained on representations of training samples and judged on unseen ones. Its figure is the
balanced accuracy (mean recall of the groups), whose chance level is 1 / groups whatever their sizes; training
weighs the groups alike. A number is attacked as "above the median or not".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kind = Literal["linear", "mlp"]
KINDS: tuple[Kind, ...] = ("linear", "mlp")
HIDDEN = 64
_EPOCHS, _BATCH, _LR, _DECAY = 30, 64, 5e-3, 1e-3


@dataclass(frozen=True)
class Attack:
    """What a probe reached on unseen samples.

    Attributes:
        accuracy: balanced accuracy over the groups that the test samples have.
        error: its standard error (binomial within each group).
        chance: balanced accuracy of guessing.
        information: H(z) - CE(probe), a lower bound on I(h; z) in nats that a bad probe makes negative.
    """

    accuracy: float
    error: float
    chance: float
    information: float

    @classmethod
    def of(cls, confusion: Tensor, information: float = math.nan) -> Attack:
        """From counts [true groups, guessed groups] on unseen samples."""
        confusion = confusion.double().cpu()
        count = confusion.sum(1)
        there = count > 0
        recall = confusion.diagonal()[there] / count[there]
        groups = max(int(there.sum()), 1)
        error = (recall * (1 - recall) / count[there]).sum().sqrt() / groups
        return cls(float(recall.sum() / groups), float(error), 1 / groups, information)


class Probe(nn.Module):
    """Standardised features -> a linear layer, or two with a ReLU between.

    Args:
        width: of the representation.
        groups: values of the attribute.
        kind: `linear` or `mlp`.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, width: int, groups: int, kind: Kind) -> None:
        super().__init__()
        self.groups = groups
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        if kind == "linear":
            self.layers = nn.Sequential(nn.Linear(width, groups))
        else:
            self.layers = nn.Sequential(nn.Linear(width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, groups))

    def standardise(self, mean: Tensor, deviation: Tensor) -> None:
        """Fix what features are divided by; constant ones stay what they are."""
        self.mean.copy_(mean)
        rounding = 1e-6 * torch.maximum(deviation.max(), mean.abs())
        self.scale.copy_(torch.where(deviation > rounding, deviation, 1))

    def forward(self, h: Tensor) -> Tensor:
        """Logits [n, groups] for h [n, d]."""
        logits: Tensor = self.layers((h - self.mean) / self.scale)
        return logits


def new_probe(width: int, groups: int, kind: Kind, seed: int) -> Probe:
    """An untrained probe; the process's random numbers stay as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Probe(width, groups, kind)


def group_weights(codes: Tensor, groups: int) -> Tensor:
    """Weights [groups] that make all groups count alike."""
    count = torch.bincount(codes, minlength=groups)
    there = (count > 0).float()
    return there * len(codes) / (count.clamp(min=1) * there.sum())


def train(probe: Probe, h: Tensor, codes: Tensor, *, epochs: int, seed: int) -> None:
    """Adam with a falling learning rate on h [n, d] and known codes int64 [n], in place."""
    weights = group_weights(codes, probe.groups)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=_LR, weight_decay=_DECAY)
    steps = epochs * math.ceil(len(h) / _BATCH)
    for number, rows in enumerate(_batches(len(h), epochs, seed)):
        optimizer.param_groups[0]["lr"] = _LR * (1 - number / steps)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(probe(h[rows]), codes[rows], weight=weights).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def solve(probe: Probe, h: Tensor, codes: Tensor) -> None:
    """A linear probe to its optimum (L-BFGS), with the usual penalty |w|² / 2n."""
    weights = group_weights(codes, probe.groups)
    parameters = list(probe.parameters())
    tool = torch.optim.LBFGS(parameters, max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        tool.zero_grad()
        value = F.cross_entropy(probe(h), codes, weight=weights)
        value = value + parameters[0].square().sum() / (2 * len(h))
        value.backward()  # type: ignore[no-untyped-call]
        return value

    tool.step(loss)  # type: ignore[no-untyped-call]


def attack(
    kind: Kind,
    train_h: Tensor,
    train_z: Tensor,
    test_h: Tensor,
    test_z: Tensor,
    groups: int,
    *,
    seed: int = 0,
) -> Attack:
    """Train a fresh probe and judge it.

    Args:
        kind: `linear` (to its optimum) or `mlp` (two layers, 30 epochs).
        train_h: [n, d]; all on one device.
        train_z: codes [n], -1 where not known (left out); numbers when `groups` is 0.
        test_h: [m, d].
        test_z: [m].
        groups: values of the attribute; 0: a number, split at the median of the training samples.
        seed: of weights and batches.

    Returns:
        Figures on the test samples; chance when there are no two groups to tell apart.
    """
    if not groups:
        middle = train_z.median()
        if not (train_z > middle).any():  # more than half of them are the largest
            middle = train_z[train_z < middle].max() if (train_z < middle).any() else middle
        train_z, test_z, groups = (train_z > middle).float(), (test_z > middle).float(), 2
    train_h, codes = train_h[train_z >= 0], train_z[train_z >= 0].long()
    test_h, wanted = test_h[test_z >= 0], test_z[test_z >= 0].long()
    if len(torch.bincount(codes).nonzero()) < 2 or len(wanted) == 0:
        return Attack(1 / groups, math.nan, 1 / groups, math.nan)
    probe = new_probe(train_h.shape[1], groups, kind, seed).to(train_h.device)
    probe.standardise(train_h.mean(0), train_h.std(0))
    if kind == "linear":
        solve(probe, train_h, codes)
    else:
        train(probe, train_h, codes, epochs=_EPOCHS, seed=seed)
    with torch.no_grad():
        logits = probe(test_h)
    weights = group_weights(wanted, groups)  # groups count alike, as in training
    entropy = math.log(int((weights > 0).sum()))
    information = entropy - F.cross_entropy(logits, wanted, weight=weights).item()
    return Attack.of(confusion(logits.argmax(1), wanted, groups), information)


def confusion(guessed: Tensor, wanted: Tensor, groups: int) -> Tensor:
    """Counts int64 [true groups, guessed groups]."""
    return torch.bincount(wanted * groups + guessed, minlength=groups * groups).reshape(groups, groups)


def _batches(count: int, epochs: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(count, generator=generator)
        for start in range(0, count, _BATCH):
            yield order[start : start + _BATCH]
