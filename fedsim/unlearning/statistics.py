"""Group statistics from the server, for clients that do not have all groups of an attribute.

Such a client has nothing to compare its groups with. It is given the means of h in all groups, over all
clients, one round old, and pulls its own groups towards the means of those that its batch lacks.

What travels is part of the shared state: a client writes Σ h and the number of its samples of each group,
both divided by all its samples, into two buffers, and the ordinary mean over clients, weighted by samples, is
that of everybody's samples.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedsim.data.attributes import Attribute
from fedsim.errors import UserError
from fedsim.unlearning.detach import group_means, one_hot, same_block, varies


class GroupStatistics(nn.Module):
    """Means of h in every group of categorical attributes.

    Args:
        attributes: numbers have no groups and are refused.
        width: d.

    Attributes:
        sums: Σ h of each group per sample of anybody [groups, d], the groups of all attributes in a row.
        shares: part of the samples that belong to each group [groups].
    """

    sums: Tensor
    shares: Tensor
    same: Tensor

    def __init__(self, attributes: tuple[Attribute, ...], width: int) -> None:
        super().__init__()
        numbers = [attribute.name for attribute in attributes if not attribute.groups]
        if numbers:
            raise UserError(
                f"[detacher] group_statistics: attribute '{numbers[0]}' is a number and has no groups"
            )
        self.attributes = attributes
        groups = sum(attribute.groups for attribute in attributes)
        self.register_buffer("sums", torch.zeros(groups, width))
        self.register_buffer("shares", torch.zeros(groups))
        same = same_block([attribute.groups for attribute in attributes])
        self.register_buffer("same", same, persistent=False)

    def begin(self) -> None:
        """Keep what the server sent as the reference; collect anew."""
        self._means = self.sums / self.shares.clamp(min=1e-12)[:, None]
        self._there = (self.shares > 0).float()
        self._collected = torch.zeros_like(self.sums), torch.zeros_like(self.shares)
        self._seen = 0

    def cells(self, z: Tensor) -> Tensor:
        """Which group of each attribute a sample belongs to: float32 [n, groups]."""
        return torch.cat([one_hot(z[:, i], a.groups) for i, a in enumerate(self.attributes)], 1)

    def collect(self, h: Tensor, z: Tensor) -> None:
        """Count a batch, h [n, d] without a graph."""
        cells = self.cells(z)
        self._collected[0].add_(cells.T @ h)
        self._collected[1].add_(cells.sum(0))
        self._seen += len(h)

    def end(self) -> None:
        """Write what was collected into the buffers that travel."""
        for buffer, collected in zip((self.sums, self.shares), self._collected, strict=True):
            buffer.copy_(collected / max(self._seen, 1))

    def penalty(self, h: Tensor, z: Tensor) -> Tensor:
        """Squared distance of the batch's group means to the server's means of the groups it lacks.

        A mean over features, in units of the batch's variance, and over pairs of a group that the batch has
        and one of the same attribute that it lacks and some client has; 0 without any.
        """
        means, count = group_means(h, self.cells(z))
        variance = (h - h.mean(0)).square().mean(0).detach()
        scale = variance + 1e-3 * variance.mean() + 1e-12
        scale = torch.where(varies(h, variance), scale, torch.inf)  # equal samples have no unit
        apart = ((means[:, None] - self._means[None, :]).square() / scale).mean(2)
        lacking = (count == 0).float() * self._there
        pairs = self.same * (count > 0).float()[:, None] * lacking[None, :]
        mean: Tensor = (pairs * apart).sum() / pairs.sum().clamp(min=1)
        return mean
