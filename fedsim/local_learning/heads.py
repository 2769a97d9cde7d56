"""Auxiliary heads: what a window puts out -> logits; and InfoPro's decoder: -> the image.

They take maps (c, h, w), tokens (t, d) or vectors (d,). BatchNorm in a head has no running statistics: a
head is never evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsim.errors import UserError

Shape = tuple[int, ...]

#: widths between a map and an image so many doublings larger
_DECODER = {1: (12,), 2: (32, 12), 3: (128, 32, 12), 4: (192, 64, 32, 12)}
_ROUNDING = 1e-5  #: spread of a channel, as a part of its largest value, that is no more than rounding
_SMALL = 64  #: pixels a side up to which a map is resized to the image at once


class Pooled(nn.Module):
    """Mean over pixels or tokens: [n, c, h, w], [n, t, d] or [n, d] -> [n, width]."""

    def forward(self, x: Tensor) -> Tensor:
        """The mean."""
        return x.mean((2, 3)) if x.dim() == 4 else x.mean(1) if x.dim() == 3 else x


def width_of(shape: Shape) -> int:
    """Channels of a map, width of tokens and vectors."""
    return shape[0] if len(shape) == 3 else shape[-1]


def linear(shape: Shape, classes: int) -> nn.Module:
    """`0c1f`: mean, then a linear layer; tokens are normalised first, as their stream is not."""
    norm = [nn.LayerNorm(shape[-1])] if len(shape) == 2 else []
    return nn.Sequential(*norm, Pooled(), nn.Linear(width_of(shape), classes))


def conv_mlp(shape: Shape, classes: int, hidden: int = 128) -> nn.Module:
    """`1c2f` of InfoPro: 3x3 convolution, mean, two linear layers.

    Below 64 channels the convolution has stride 2 and twice the channels. Tokens and vectors
    have no convolution.
    """
    width = width_of(shape)
    if len(shape) != 3:
        norm = [nn.LayerNorm(width)] if len(shape) == 2 else []
        front: list[nn.Module] = [*norm, Pooled()]
        out = width
    else:
        narrow = width < 64
        out = 2 * width if narrow else width
        conv = nn.Conv2d(width, out, 3, 2 if narrow else 1, padding=1, bias=False)
        front = [conv, _norm2d(out), nn.ReLU(), Pooled()]
    return nn.Sequential(*front, nn.Linear(out, hidden), nn.ReLU(), nn.Linear(hidden, classes))


def dgl(shape: Shape, classes: int) -> nn.Module:
    """`MLP-SR-aux` of DGL (arXiv 1901.08164): pooled maps, three 1x1 convolutions, an MLP.

    Maps are pooled to a quarter of their side; the MLP has two hidden layers, as in AugLocal's port.
    Channels are those of the map, at most 128 (MAN++'s port: 128, hidden 512). Tokens and vectors are pooled
    to [n, d] and have the linear layers alone.
    """
    width = min(width_of(shape), 128)
    if len(shape) != 3:
        norm = [nn.LayerNorm(shape[-1])] if len(shape) == 2 else []
        front: list[nn.Module] = [*norm, Pooled(), nn.Linear(width_of(shape), 4 * width, bias=False)]
        front += [_norm1d(4 * width), nn.ReLU()]
        hidden, count = 4 * width, 1
    else:
        side = math.ceil(min(shape[1:]) / 4)
        front = [nn.AdaptiveAvgPool2d(side)]
        for inputs in (width_of(shape), width, width):
            front += [nn.Conv2d(inputs, width, 1, bias=False), _norm2d(width), nn.ReLU()]
        last = min(side, 2)
        front += [nn.AdaptiveAvgPool2d(last), nn.Flatten()]
        hidden, count = width * last * last, 2
    back: list[nn.Module] = []
    for _ in range(count):
        back += [nn.Linear(hidden, hidden, bias=False), _norm1d(hidden), nn.ReLU()]
    return nn.Sequential(*front, *back, nn.Linear(hidden, classes))


#: names of `head = "..."`
HEADS: dict[str, Callable[[Shape, int], nn.Module]] = {"linear": linear, "1c2f": conv_mlp, "dgl": dgl}


class Decoder(nn.Module):
    """InfoPro's decoder: a map [n, c, h, w] -> logits of an image [n, channels, H, W] in 0..1.

    Up to 64 pixels a side: resized at once, two 3x3 convolutions (12 channels between them). Larger images:
    1x1 convolution, then doubled and convolved until the size is reached.

    Args:
        shape: of the map.
        image: of the image.

    Raises:
        UserError: there is no map, or no image, to reconstruct from or to.
    """

    def __init__(self, shape: Shape, image: Shape) -> None:
        super().__init__()
        if len(shape) != 3 or len(image) != 3:
            raise UserError(
                f"InfoPro reconstructs images from feature maps; here a window puts out {list(shape)} and "
                f'the inputs are {list(image)}: use name = "dgl", or base = "dgl" of another method (and '
                "[features] cache = false if the backbone's frozen part is cached)"
            )
        self.size = image[1:]
        steps = 1 if max(image[1:]) <= _SMALL else max(1, round(math.log2(image[1] / shape[1])))
        widths = _DECODER.get(steps) or (192,) * (steps - 3) + _DECODER[3]
        kernels = [3 if steps == 1 or number else 1 for number in range(steps)]
        self.convs = nn.ModuleList()
        inputs = shape[0]
        for width, kernel in zip(widths, kernels, strict=True):
            conv = nn.Conv2d(inputs, width, kernel, padding=kernel // 2, bias=False)
            self.convs.append(nn.Sequential(conv, _norm2d(width), nn.ReLU()))
            inputs = width
        self.last = nn.Conv2d(inputs, image[0], 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of pixel values."""
        if len(self.convs) == 1:
            return self._last(self.convs[0](self._resized(x, 0)))
        for number, conv in enumerate(self.convs):
            x = self._resized(conv(x), len(self.convs) - 1 - number)
        return self._last(x)

    def _resized(self, x: Tensor, halvings: int) -> Tensor:
        size = [math.ceil(side / 2**halvings) for side in self.size]
        if list(x.shape[-2:]) == size:
            return x
        return functional.interpolate(x, size=size, mode="bilinear", align_corners=True)

    def _last(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(x)
        return out


class _Norm2d(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(without_rounding(input))


class _Norm1d(nn.BatchNorm1d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(without_rounding(input))


def _norm2d(width: int) -> nn.Module:
    return _Norm2d(width, track_running_stats=False)


def _norm1d(width: int) -> nn.Module:
    return _Norm1d(width, track_running_stats=False)


def without_rounding(x: Tensor) -> Tensor:
    """Channels that are constant over a batch but for rounding become exactly so and get no gradient.

    BatchNorm divides what is left of such a channel by sqrt(eps) = 0.003, and its gradient likewise. Equal
    samples (blank images, say) make all channels of vectors constant: from norm to norm rounding errors
    grow 300 times. The exact gradient there is zero. Other channels pass bit by bit.

    Args:
        x: [n, channels, ...].
    """
    rest = [dim for dim in range(x.dim()) if dim != 1]
    values = x.detach()
    low, high = values.amin(rest, keepdim=True), values.amax(rest, keepdim=True)
    constant = high - low <= _ROUNDING * torch.maximum(low.abs(), high.abs())
    return torch.where(constant, low, x)


def needs_two(network: nn.Module) -> bool:
    """Whether a batch of one sample cannot pass: BatchNorm over vectors."""
    return any(isinstance(module, nn.BatchNorm1d) for module in network.modules())


def patches(x: Tensor, n: int) -> list[Tensor]:
    """n·n patches of a map, row by row; of tokens, n·n runs of neighbours."""
    if x.dim() == 3:
        return list(x.tensor_split(n * n, 1))
    return [patch for band in x.tensor_split(n, 2) for patch in band.tensor_split(n, 3)]


def joined(parts: list[Tensor], n: int) -> Tensor:
    """The inverse of `patches`."""
    if parts[0].dim() == 3:
        return torch.cat(parts, 1)
    return torch.cat([torch.cat(parts[row * n : row * n + n], 3) for row in range(n)], 2)
