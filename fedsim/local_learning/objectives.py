"""What windows are trained for: a task loss on a head, InfoPro's reconstruction beside it, both on patches.

    Supervised   λ₂ · task(head(z), y)  +  λ₁ · BCE(decoder(z), image)        z = coupling(x), or x itself
    Patched      the same on n·n patches of x, one patch's graph alive at a time

InfoPro (arXiv 2101.10832) keeps information about the input in early windows: λ₁ falls and λ₂ grows with
depth. Its decoders have seen raw images: they never leave a client.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsim.errors import warn_once
from fedsim.local_learning.chain import Chain
from fedsim.local_learning.heads import Decoder, joined, patches
from fedsim.local_learning.windows import Auxiliary, Backward, Batch, backward_of
from fedsim.models.base import directions, to_unit

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


class Whole:
    """The model's own tail with the task's own loss.

    Args:
        chain: whose tail.
        loss: (tail, activations, labels) -> mean loss.
    """

    def __init__(self, chain: Chain, loss: Loss) -> None:
        self.tail = chain.tail
        self.loss = loss

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        """The loss."""
        return self.loss(self.tail, x, batch.labels)

    def backward(self, x: Tensor, batch: Batch, weight: float, backward: Backward) -> Tensor:
        """See `windows.Objective`."""
        return backward_of(self(x, batch), weight, backward)


class Supervised(Auxiliary):
    """Task loss on a head behind a window, and optionally InfoPro's reconstruction.

    Args:
        head: z -> logits, or (contrast) features of any width.
        coupling: x -> z; None: z = x.
        decoder: z -> image; None: no reconstruction.
        task: λ₂, weight of the task loss.
        reconstruction: λ₁, weight of the reconstruction.
        contrast: the task loss is `contrast` instead of cross-entropy.
    """

    def __init__(
        self,
        head: nn.Module,
        coupling: nn.Module | None = None,
        decoder: Decoder | None = None,
        *,
        task: float = 1.0,
        reconstruction: float = 0.0,
        contrast: bool = False,
    ) -> None:
        super().__init__()
        self.head = head
        self.coupling = coupling
        self.decoder = decoder
        self.task = task
        self.reconstruction = reconstruction
        self.task_loss = supervised_contrast if contrast else functional.cross_entropy

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """The loss."""
        z = x if self.coupling is None else self.coupling(x)
        loss: Tensor = self.task * self.task_loss(self.head(z), batch.labels)
        if self.decoder is not None:
            loss = loss + self.reconstruction * image_loss(self.decoder(z), to_unit(batch.inputs))
        return loss


class Patched(Auxiliary):
    """Patch feature fusion of HPFF (arXiv ECCV 2024): the head sees n·n patches, its outputs are averaged.

        logits = 1/n² Σ_p head(patch_p(x))

    Exact and with the graph of one patch at a time: a first pass without graph gives the logits and the
    gradient δ at them; a second pass runs every patch again with its graph and sends δ/n² through it. The
    released code holds all patches at once, which saves nothing. A decoder reconstructs the matching patch of
    the image; its losses are averaged.

    Args:
        head: patch -> logits.
        decoder: patch -> patch of the image; None: no reconstruction.
        n: patches a side.
        task: λ₂.
        reconstruction: λ₁.
    """

    def __init__(
        self,
        head: nn.Module,
        decoder: Decoder | None,
        n: int,
        *,
        task: float = 1.0,
        reconstruction: float = 0.0,
    ) -> None:
        super().__init__()
        self.head = head
        self.decoder = decoder
        self.n = n
        self.task = task
        self.reconstruction = reconstruction

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """The loss with one graph over all patches: what `backward` computes in less memory."""
        logits = self._mean([self.head(patch) for patch in patches(x, self.n)])
        loss: Tensor = self.task * functional.cross_entropy(logits, batch.labels)
        for patch, image in self._images(x, batch):
            loss = loss + self._patch_loss(patch, image)
        return loss

    def backward(self, x: Tensor, batch: Batch, weight: float, backward: Backward) -> Tensor:
        """See `windows.Objective`."""
        held = x.detach()
        with torch.no_grad():
            logits = self._mean([self.head(patch) for patch in patches(held, self.n)])
        logits.requires_grad_()
        total = backward_of(self.task * functional.cross_entropy(logits, batch.labels), weight, backward)
        assert logits.grad is not None
        delta = logits.grad / self.n**2
        gradients = []
        for patch, image in self._targets(held, batch):
            leaf = patch.detach().requires_grad_()
            torch.autograd.backward(self.head(leaf), delta)
            if image is not None:
                total = total + backward_of(self._patch_loss(leaf, image), weight, backward)
            assert leaf.grad is not None
            gradients.append(leaf.grad)
        if x.requires_grad:
            torch.autograd.backward(x, joined(gradients, self.n))
        return total

    def _mean(self, outputs: list[Tensor]) -> Tensor:
        return torch.stack(outputs).mean(0)

    def _targets(self, x: Tensor, batch: Batch) -> list[tuple[Tensor, Tensor | None]]:
        parts = patches(x, self.n)
        if self.decoder is None:
            return [(part, None) for part in parts]
        return list(zip(parts, patches(to_unit(batch.inputs), self.n), strict=True))

    def _images(self, x: Tensor, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        return [(part, image) for part, image in self._targets(x, batch) if image is not None]

    def _patch_loss(self, patch: Tensor, image: Tensor) -> Tensor:
        assert self.decoder is not None
        return self.reconstruction / self.n**2 * image_loss(self.decoder(patch), image)


def image_loss(logits: Tensor, image: Tensor) -> Tensor:
    """Binary cross-entropy of pixel values in 0..1 (on logits: the same numbers, safe in 16 bits)."""
    return functional.binary_cross_entropy_with_logits(logits, image)


def supervised_contrast(features: Tensor, labels: Tensor, temperature: float = 0.07) -> Tensor:
    """Supervised contrastive loss (arXiv 2004.11362) on normalised features [n, d].

    Positives have the same label; a row without any counts zero.
    """
    z = directions(features.float())
    similar = z @ z.T / temperature
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    positive = (labels[:, None] == labels[None, :]) & ~itself
    log_share = similar - similar.masked_fill(itself, float("-inf")).logsumexp(1, keepdim=True)
    count = positive.sum(1)
    per_row = -log_share.masked_fill(~positive, 0).sum(1) / count.clamp(min=1)
    return per_row.mean()


def patch_count(shape: tuple[int, ...], wanted: int) -> int:
    """Patches a side: as many as wanted while each has at least two pixels a side (tokens: two), else 1."""
    room = min(shape[1:]) if len(shape) == 3 else shape[0] // wanted if len(shape) == 2 else 0
    if wanted == 1 or room >= 2 * wanted:
        return wanted
    warn_once(
        f"hpff: what passes here ({list(shape)}) is too small for {wanted}x{wanted} patches: "
        "its heads see it whole (n = 1)"
    )
    return 1
