"""Where a model computes, in which precision and memory layout: what the keys of `[compute]` mean.

Weights, gradients and sums stay float32; `bf16` and `fp16` are torch's automatic mixed precision, so what
travels and what is aggregated does not change.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from fedsim.errors import UserError

_Model = TypeVar("_Model", bound=nn.Module)

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Compute:
    """Device, precision and memory layout of a task.

    Attributes:
        device: where model and batches live.
        precision: `fp32`, `bf16` or `fp16`.
        channels_last: whether convolutions compute with the channels last in memory.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: str = "fp32"
    channels_last: bool = False

    def place(self, model: _Model) -> _Model:
        """Move a model to the device and into the memory layout."""
        layout = torch.channels_last if self.channels_last else torch.preserve_format
        return model.to(self.device).to(memory_format=layout)

    def autocast(self, *, on: bool = True) -> AbstractContextManager[Any]:
        """Around a forward pass: matrix products in 16 bits, unless the precision is fp32.

        Args:
            on: False is for a part inside such a context that must not run under it.
        """
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=_DTYPES[self.precision], enabled=on)

    def scaler(self) -> torch.amp.GradScaler:
        """A fresh scaler of fp16 losses, whose small gradients would vanish; it does nothing otherwise."""
        # a client trains a few dozen steps: from torch's 2^16 the first of them would be skipped
        return torch.amp.GradScaler(self.device.type, init_scale=2.0**10, enabled=self.precision == "fp16")


def resolve(
    device: str, precision: str, *, deterministic: bool = True, channels_last: bool = False
) -> Compute:
    """The device of this process.

    Args:
        device: `auto` (the GPU when there is one), `cpu` or `cuda`.
        precision: `fp32`, `bf16` or `fp16`.
        deterministic: only algorithms that give the same bits again (on a GPU; the CPU's do anyway).
        channels_last: the memory layout of convolutions.

    Raises:
        UserError: CUDA is asked for and there is none.
    """
    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        raise UserError(
            '[compute] device = "cuda", but torch finds no CUDA GPU here; check `fedsim doctor`, or set '
            'compute.device = "auto"'
        )
    if device == "cpu" or not there:
        return Compute(torch.device("cpu"), precision, channels_last)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first use
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    # fused attention adds its gradients in any order unless every such operation is an error
    torch.backends.cuda.enable_flash_sdp(not deterministic)
    torch.backends.cuda.enable_mem_efficient_sdp(not deterministic)
    torch.backends.cuda.enable_cudnn_sdp(not deterministic)
    return Compute(torch.device("cuda", torch.cuda.current_device()), precision, channels_last)
