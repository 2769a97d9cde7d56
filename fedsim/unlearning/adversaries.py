"""Detachers with networks of their own: what can be read from h is estimated by training somebody to read it.

    representation detachment     penalty = I(h; z) + keep_input · MSE(d(h), x) + keep_task · CE(q(h), y)
    gradient reversal (DANN)      penalty = -CE(q(h), z)

I(h; z) is replaced by the variational bound of Barber and Agakov (2003): with any reader q,
I(h; z) >= H(z) - CE(q(h), z), in nats; of a number q is a Gaussian, I >= ½ log(Var / MSE). The two terms that
are to be kept, I(h; x) and I(h; y), are bounded likewise, up to constants: by a Gaussian of fixed variance
around the decoder's output, so by a mean squared error (in squared units of the input, not in nats), and by a
cross-entropy. The readers are trained on frozen h (`auxiliary_loss`), the encoder against frozen readers
(`forward`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.data.attributes import Attribute
from fedsim.errors import UserError
from fedsim.models.base import to_unit
from fedsim.ranges import Count, NonNegative, Positive
from fedsim.unlearning.detach import Space, categorical, one_hot, varies


def reader(width: int, hidden: int, outputs: int) -> nn.Sequential:
    """Three layers: h [n, width] -> [n, outputs]."""
    return nn.Sequential(
        nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
    )


class GradientReversal(nn.Module):
    """A reader of the attribute is trained along; the encoder maximises its loss (DANN, arXiv 1505.07818).

    A baseline: an encoder that flips the attribute's sign fools the reader and hides nothing.

    Args:
        hidden: units of the reader's two hidden layers.
        lr: learning rate of the reader (Adam).
        inner: steps of the reader for each batch.
    """

    def __init__(self, space: Space, /, *, hidden: Count = 64, lr: Positive = 1e-3, inner: Count = 1) -> None:
        super().__init__()
        categorical(space.attributes, "gradient-reversal")
        self.attributes, self.lr, self.inner = space.attributes, lr, inner
        self.readers = nn.ModuleList(reader(space.width, hidden, a.groups) for a in space.attributes)

    def forward(self, h: Tensor, z: Tensor, labels: Tensor, inputs: Tensor) -> Tensor:
        """The readers' loss, negated."""
        return -self.auxiliary_loss(h, z, labels, inputs)

    def auxiliary_loss(self, h: Tensor, z: Tensor, labels: Tensor, inputs: Tensor) -> Tensor:
        """What the readers minimise: the sum of their cross-entropies."""
        pairs = zip(self.readers, z.T, strict=True)
        return torch.stack([_cross_entropy(q(h), codes) for q, codes in pairs]).sum()


class RepresentationDetachment(nn.Module):
    """The paper's loss: less information on z, kept information on x and y, three networks (reconstructed).

    Args:
        keep_input: weight of the mean squared error with which the input is reconstructed.
        keep_task: weight of the cross-entropy with which the class is read.
        hidden: units of the networks' hidden layers.
        lr: learning rate of the networks (Adam).
        inner: their steps for each batch; a reader that lags behind makes the bound useless.
    """

    def __init__(
        self,
        space: Space,
        /,
        *,
        keep_input: NonNegative = 0.1,
        keep_task: NonNegative = 0.1,
        hidden: Count = 64,
        lr: Positive = 1e-3,
        inner: Count = 5,
    ) -> None:
        super().__init__()
        if keep_input and not space.inputs:
            raise UserError(
                "[detacher] 'representation-detachment' reconstructs inputs, but these are token ids; "
                "set detacher.keep_input = 0"
            )
        self.attributes, self.lr, self.inner = space.attributes, lr, inner
        self.keep_input, self.keep_task = keep_input, keep_task
        self.readers = nn.ModuleList(reader(space.width, hidden, max(a.groups, 1)) for a in space.attributes)
        self.task_reader = reader(space.width, hidden, space.classes) if keep_task else None
        self.decoder = None
        if keep_input:
            layers = nn.Linear(space.width, hidden), nn.ReLU(), nn.Linear(hidden, space.inputs)
            self.decoder = nn.Sequential(*layers)

    def forward(self, h: Tensor, z: Tensor, labels: Tensor, inputs: Tensor) -> Tensor:
        """I(h; z) in nats + keep_input · mean squared error (per input number) + keep_task · cross-entropy.

        A reader that does worse than guessing reads nothing: its bound counts as 0 and gives no gradient.
        """
        total = h.new_zeros(())
        for q, values, attribute in zip(self.readers, z.T, self.attributes, strict=True):
            total = total + _information(q(h), values, attribute).clamp(min=0)
        if self.decoder is not None:
            total = total + self.keep_input * _mse(self.decoder(h), inputs)
        if self.task_reader is not None:
            total = total + self.keep_task * F.cross_entropy(self.task_reader(h), labels)
        return total

    def auxiliary_loss(self, h: Tensor, z: Tensor, labels: Tensor, inputs: Tensor) -> Tensor:
        """What the networks minimise: the sum of their errors."""
        total = h.new_zeros(())
        for q, values, attribute in zip(self.readers, z.T, self.attributes, strict=True):
            if attribute.groups:
                total = total + _cross_entropy(q(h), values)
            else:
                total = total + _gaussian(q(h)[:, 0], values)
        if self.decoder is not None:
            total = total + _mse(self.decoder(h), inputs)
        if self.task_reader is not None:
            total = total + F.cross_entropy(self.task_reader(h), labels)
        return total


def _information(output: Tensor, values: Tensor, attribute: Attribute) -> Tensor:
    """Lower bound on I(h; z) from a reader's output, in nats."""
    if not attribute.groups:
        return -0.5 * _gaussian(output[:, 0], values).clamp(min=1e-6).log()
    share = one_hot(values, attribute.groups).sum(0)
    share = share / share.sum().clamp(min=1)
    return -torch.xlogy(share, share).sum() - _cross_entropy(output, values)


def _gaussian(output: Tensor, values: Tensor) -> Tensor:
    """Mean squared error in units of the batch's variance; 1, which is guessing, where all are equal."""
    variance = values.var(correction=0)
    there = varies(values, variance)
    error = (output - values).square().mean() / torch.where(there, variance.clamp(min=1e-12), 1.0)
    return torch.where(there, error, 1.0)


def _cross_entropy(logits: Tensor, codes: Tensor) -> Tensor:
    """Mean over the samples whose value is known (0 without any)."""
    known = (codes >= 0).sum().clamp(min=1)
    return F.cross_entropy(logits, codes.long(), ignore_index=-1, reduction="sum") / known


def _mse(output: Tensor, inputs: Tensor) -> Tensor:
    """Error of a reconstruction whose last layer is a sigmoid for images and linear for other numbers."""
    image = inputs.dtype == torch.uint8
    return F.mse_loss(output.sigmoid() if image else output, to_unit(inputs).flatten(1))
