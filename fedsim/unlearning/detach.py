"""Detachers: terms of a client's loss that take an attribute z out of a representation h.

    x ─ below the cut ─> h [n, d] ─ above the cut ─> logits          loss = CE(logits, y) + λ · penalty(h, z)
                         └─ detacher ─> penalty

After "Efficient Attribute Unlearning" (Guo et al., arXiv 2202.13295), **reconstructed from its abstract**:
the paper's text was not available. Which term works is measured (`docs/attribute_unlearning.md`), not
believed.

A detacher is called with h float32 [n, d], the attributes float32 [n, a] (codes, -1: not known; or numbers),
labels int64 [n] and inputs [n, ...]; it returns a scalar with a graph. Groups of which a batch has too few
samples are left out by masks, never by branches, so that a step runs on `meta` tensors and needs no value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedsim.data.attributes import Attribute
from fedsim.errors import UserError

#: widths of the Gaussian kernels, in units of the batch's mean squared distance
SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)
_FLOOR = 1e-3  #: smallest variance of a feature that counts, as a part of the mean variance
_ROUNDING = 1e-5  #: standard deviation, as a part of the largest value, that is no more than rounding


@dataclass(frozen=True)
class Space:
    """What a detacher is built for.

    Attributes:
        attributes: in the order of z's columns.
        width: d, numbers of one representation.
        classes: of the task.
        inputs: numbers of one input; 0 where inputs are token ids, which cannot be reconstructed.
    """

    attributes: tuple[Attribute, ...]
    width: int
    classes: int
    inputs: int


class Nothing(nn.Module):
    """No term: the attribute is only measured (and erased afterwards, if the strategy says so)."""

    def __init__(self, space: Space, /) -> None:
        super().__init__()

    def forward(self, h: Tensor, z: Tensor, labels: Tensor, inputs: Tensor) -> Tensor:
        """Zero."""
        return h.new_zeros(())


class Mmd(nn.Module):
    """Maximum mean discrepancy between the groups: Gaussian kernels of five widths, no network.

    The unbiased MMD² (Gretton et al. 2012, eq. 3) between h of every two groups, averaged over the pairs of
    groups that have two samples in the batch; h is divided by its batch standard deviation first.

    Args:
        given_label: compare groups within each class (equalised odds) instead of as a whole.
    """

    def __init__(self, space: Space, /, *, given_label: bool = False) -> None:
        super().__init__()
        categorical(space.attributes, "mmd")
        self.attributes = space.attributes
        self.classes = space.classes if given_label else 1
        for column, attribute in enumerate(space.attributes):
            same = same_block([attribute.groups] * self.classes)
            self.register_buffer(f"same{column}", same, persistent=False)

    def forward(self, h: Tensor, z: Tensor, labels: Tensor, inputs: Tensor) -> Tensor:
        """Sum over attributes of the mean MMD² between groups; about 0 for equal groups, 2 at most."""
        kernel = gaussian_kernel(standardised(h))
        total = h.new_zeros(())
        for column, attribute in enumerate(self.attributes):
            cells = one_hot(z[:, column], attribute.groups)
            if self.classes > 1:
                cells = (one_hot(labels, self.classes)[:, :, None] * cells[:, None, :]).flatten(1)
            total = total + self._between(kernel, cells, self.get_buffer(f"same{column}"))
        return total

    def _between(self, kernel: Tensor, cells: Tensor, same: Tensor) -> Tensor:
        """Mean MMD² over pairs of cells of the same class; kernel [n, n], cells [n, c], same [c, c]."""
        count = cells.sum(0)
        sums = cells.T @ kernel @ cells
        within = (sums.diagonal() - count) / (count * (count - 1)).clamp(min=1)  # k(x, x) = 1 is left out
        across = sums / (count[:, None] * count[None, :]).clamp(min=1)
        squared = within[:, None] + within[None, :] - 2 * across
        there = (count >= 2).float()
        pairs = (there[:, None] * there[None, :] * same).triu(1)
        mean: Tensor = (pairs * squared).sum() / pairs.sum().clamp(min=1)
        return mean


class Covariance(nn.Module):
    """Squared distance of the groups' means of h (of a number: squared covariance with it), no network."""

    def __init__(self, space: Space, /) -> None:
        super().__init__()
        self.attributes = space.attributes

    def forward(self, h: Tensor, z: Tensor, labels: Tensor, inputs: Tensor) -> Tensor:
        """Sum over attributes; a mean over the standardised features and over pairs of groups."""
        h = standardised(h)
        total = h.new_zeros(())
        for column, attribute in enumerate(self.attributes):
            if attribute.groups:
                means, count = group_means(h, one_hot(z[:, column], attribute.groups))
                there = (count > 0).float()
                pairs = (there[:, None] * there[None, :]).triu(1)
                apart = (means[:, None] - means[None, :]).square().mean(2)
                total = total + (pairs * apart).sum() / pairs.sum().clamp(min=1)
            else:
                value = standardised(z[:, column : column + 1])
                total = total + (value.T @ h / len(h)).square().mean()
        return total


def categorical(attributes: tuple[Attribute, ...], detacher: str) -> None:
    """Raise UserError for a number where only groups make sense."""
    for attribute in attributes:
        if not attribute.groups:
            raise UserError(
                f"[detacher] '{detacher}' compares groups, but attribute '{attribute.name}' is a number; use "
                'name = "covariance" or "representation-detachment", or make groups of it'
            )


def one_hot(codes: Tensor, groups: int) -> Tensor:
    """Codes [n] -> float32 [n, groups]; a code that is not known (-1) is a row of zeros."""
    return (codes[:, None] == torch.arange(groups, device=codes.device)).float()


def same_block(sizes: Sequence[int]) -> Tensor:
    """Which pairs of groups belong to one block, float32 [groups, groups], for blocks of these sizes."""
    block = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return (block[:, None] == block[None, :]).float()


def group_means(h: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """Means [g, d] of h [n, d] in the groups of cells [n, g] (0 where a group is empty), and counts [g]."""
    count = cells.sum(0)
    return (cells.T @ h) / count.clamp(min=1)[:, None], count


def usable(z: Tensor, attributes: tuple[Attribute, ...]) -> Tensor:
    """Whether a batch has two groups of two samples (or two different numbers): a boolean scalar."""
    found = torch.zeros((), dtype=torch.bool, device=z.device)
    for column, attribute in enumerate(attributes):
        if attribute.groups:
            found = found | ((one_hot(z[:, column], attribute.groups).sum(0) >= 2).sum() >= 2)
        else:
            values = z[:, column]
            found = found | varies(values, values.var(correction=0))
    return found


def standardised(h: Tensor) -> Tensor:
    """h - mean over the batch, divided by its standard deviation; near-constant features stay small.

    Zero, without a gradient, where all samples are equal: rounding has no standard deviation.
    """
    centred = h - h.mean(0, keepdim=True)
    variance = centred.square().mean(0, keepdim=True)
    scale = (variance + _FLOOR * variance.mean() + 1e-12).sqrt()
    there = varies(h, variance)
    return torch.where(there, centred, 0.0) / torch.where(there, scale, 1.0)


def varies(x: Tensor, variance: Tensor) -> Tensor:
    """Whether the samples of a batch differ by more than rounding: a boolean scalar, without a gradient.

    Args:
        x: [n, ...].
        variance: of x over the batch.
    """
    return (variance.detach() > (_ROUNDING * x.detach().abs().amax(0)).square()).any()


def gaussian_kernel(h: Tensor) -> Tensor:
    """Mean of Gaussian kernels of several widths [n, n]; the widths follow the batch, without a gradient."""
    norms = h.square().sum(1)
    squared = (norms[:, None] + norms[None, :] - 2 * h @ h.T).clamp(min=0)
    typical = squared.detach().mean().clamp(min=1e-12)
    return torch.stack([torch.exp(-squared / (scale * typical)) for scale in SCALES]).mean(0)
