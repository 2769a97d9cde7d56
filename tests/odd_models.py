"""Models whose state is more than plain float parameters, one a kind."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fedsim.models.base import Classifier, DataInfo, Unit, run_units

WIDTH = 6


class Centred(nn.Module):
    """Subtracts a running mean that it assigns anew in every training step."""

    mean: Tensor

    def __init__(self, start: Tensor, *, persistent: bool = True, detached: bool = True) -> None:
        super().__init__()
        self.register_buffer("mean", start, persistent=persistent)
        self.detached = detached

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            batch = x.detach().mean(0)
            self.mean = self.mean * 0.9 + (batch if self.detached else batch + 0 * self.mean)
        return x - self.mean


class InPlace(nn.Module):
    """The same, written in place."""

    mean: Tensor

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", start)

    def forward(self, x: Tensor) -> Tensor:
        self.mean.lerp_(x.detach().mean(0), 0.1)
        return x - self.mean


class Clamped(nn.Linear):
    """Keeps its weights small by giving the parameter other memory, as old code does."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.weight.data = self.weight.data.clamp(-0.2, 0.2)
        return super().forward(x)


class Spectral(nn.Module):
    """Multiplies by complex weights in the frequency domain."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH // 2 + 1, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(x, n=WIDTH) * self.weight, n=WIDTH)


class Tied(nn.Module):
    """Two layers, one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(self.one(x).relu())
        return out


class Extra(nn.Identity):
    """Counts in Python and says so in the state."""

    def get_extra_state(self) -> Any:
        return {"steps": 1}

    def set_extra_state(self, state: Any) -> None:
        return


class Changes(nn.Module):
    """Does something to itself in its first training step."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.register_buffer("seen", None)
        self.register_buffer("bank", torch.zeros(1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            match self.what:
                case "late-buffer":
                    self.register_buffer("later", torch.zeros(1))
                case "late-parameter":
                    self.shift = nn.Parameter(torch.zeros(WIDTH))
                case "late-module":
                    self.proj = nn.Identity()
                case "filled":
                    self.seen = x.detach().mean(0)
                case "replaced":
                    self.scale = nn.Parameter(self.scale.detach() * 0.5)
                case "grows":
                    self.bank = torch.cat([self.bank, x.detach()[:1]])
                case "halved":
                    self.bank = self.bank.half()
        return x * self.scale


def _layer(kind: str) -> nn.Module:
    match kind:
        case "reassigned":
            return Centred(torch.zeros(WIDTH))
        case "in-graph":
            return Centred(torch.zeros(WIDTH), detached=False)
        case "transient":
            return Centred(torch.zeros(WIDTH), persistent=False)
        case "expanded":
            return InPlace(torch.zeros(1).expand(WIDTH))
        case "strided":
            return InPlace(torch.zeros(WIDTH, 2).t()[0])
        case "other-memory":
            return Clamped(WIDTH, WIDTH)
        case "complex":
            return Spectral()
        case "lazy":
            return nn.LazyLinear(WIDTH)
        case "weight-norm":
            return parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
        case "spectral-norm":
            return parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))
        case "tied":
            return Tied()
        case "extra":
            return Extra()
        case _:
            return Changes(kind)


def make(data: DataInfo, /, *, kind: str) -> Classifier:
    """Flatten, one linear layer, the odd one, a linear head."""
    size = math.prod(data.sample_shape)
    first = nn.Linear(size, WIDTH)
    backbone = nn.Sequential(nn.Flatten(), Float(), first, _layer(kind))
    return Classifier(backbone, nn.Linear(WIDTH, len(data.classes)))


class Float(nn.Module):
    """uint8 -> 0..1."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float() / 16


class Stack(nn.Module):
    """Units for `[local]`: a layer with BatchNorm over vectors each."""

    def __init__(self, size: int, norm: str) -> None:
        super().__init__()
        make_norm = {"batch": nn.BatchNorm1d, "none": nn.Identity}[norm]
        self.stem = nn.Sequential(nn.Flatten(), Float(), nn.Linear(size, WIDTH), make_norm(WIDTH))
        self.block = nn.Sequential(nn.Linear(WIDTH, WIDTH), make_norm(WIDTH), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())

    def units(self) -> list[Unit]:
        return [Unit((name,), self.get_submodule(name)) for name in ("stem", "block", "top")]

    def forward(self, x: Tensor) -> Tensor:
        return run_units(self.units(), x)


def stack(data: DataInfo, /, *, norm: str = "batch") -> Classifier:
    """A backbone in three units."""
    return Classifier(Stack(math.prod(data.sample_shape), norm), nn.Linear(WIDTH, len(data.classes)))


def one_pixel(data: DataInfo, /, *, norm: str) -> Classifier:
    """A convolution over the whole image, and a norm of what is left: one pixel."""
    channels, *_, side = data.sample_shape
    norms = {"batch": nn.BatchNorm2d, "instance": nn.InstanceNorm2d}
    backbone = nn.Sequential(Float(), nn.Conv2d(channels, WIDTH, side), norms[norm](WIDTH), nn.Flatten())
    return Classifier(backbone, nn.Linear(WIDTH, len(data.classes)))
