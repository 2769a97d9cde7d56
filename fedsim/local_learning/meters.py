"""Bytes that a training step holds, measured.

    SavedMeter   what autograd saves for backward passes; works on any device
    LiveMeter    every storage that is alive, as `torch.cuda.max_memory_allocated` would count it; the same
                 number for the same step on the CPU and on `meta` tensors, where nothing is computed
    peak_bytes   of a real step: the allocator's own peak on a GPU, a LiveMeter elsewhere
    StepMeter    peak and time of a client's steps

What a kernel allocates and frees inside itself (workspaces) is not seen by the first two, nor is what
torch's checkpointing computes again by the first.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_METERED = 2  #: steps of a round that are metered: the optimiser's state is there from the second on


class _Count:
    """Bytes of storages, each counted once while anybody holds it."""

    def __init__(self) -> None:
        self.live = 0
        self.peak = 0
        self._holders: dict[int, int] = {}

    def add(self, key: int, size: int) -> None:
        """One more holder of a storage."""
        holders = self._holders.get(key, 0)
        self._holders[key] = holders + 1
        if not holders:
            self.live += size
            self.peak = max(self.peak, self.live)

    def remove(self, key: int, size: int) -> None:
        """One holder less."""
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._holders[key]
            self.live -= size


class SavedMeter:
    """A context in which saved activations are counted.

    Args:
        ignored: tensors that are there anyway: parameters, buffers.

    Attributes:
        live: bytes saved now.
        peak: most bytes saved at one time.
    """

    def __init__(self, ignored: Iterable[Tensor] = ()) -> None:
        self._count = _Count()
        self._ignored = {_key(tensor) for tensor in ignored}
        self._hooks: Any = None

    @property
    def live(self) -> int:
        """Bytes saved now."""
        return self._count.live

    @property
    def peak(self) -> int:
        """Most bytes saved at one time."""
        return self._count.peak

    def __enter__(self) -> SavedMeter:
        self._hooks = saved_tensors_hooks(self._pack, lambda held: held.tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> _Held:
        held = _Held(tensor)
        key = _key(tensor)
        if key not in self._ignored:
            size = tensor.untyped_storage().nbytes()
            self._count.add(key, size)
            weakref.finalize(held, self._count.remove, key, size)
        return held


@dataclass(eq=False)
class _Held:
    """A saved tensor; autograd drops it when its backward pass is over."""

    tensor: Tensor


class LiveMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context in which every storage that an operation makes is counted while it lives.

    Args:
        held: tensors that are there at the start and belong to the step (parameters, gradients, the
            optimiser's state, the batch).

    Attributes:
        live: bytes alive now.
        peak: most bytes alive at one time.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._known: set[int] = set()
        for tensor in held:
            self._hold(tensor)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._hold(leaf)
        return out

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = _key(tensor)
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._let_go, key, size)

    def _let_go(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _key(tensor: Tensor) -> int:
    """Identifies a living storage (on `meta` all have the same address, so it is not the address)."""
    return int(tensor.untyped_storage()._cdata)


@dataclass
class Peak:
    """Result of `peak_bytes`, when its block is over."""

    bytes: int = 0


@contextmanager
def peak_bytes(held: Iterable[Tensor], device: torch.device) -> Iterator[Peak]:
    """Most bytes alive while the block runs.

    Args:
        held: see `LiveMeter`; on a GPU everything that the process has there counts.
        device: where the block computes.
    """
    found = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found.bytes = torch.cuda.max_memory_allocated(device)
        return
    with LiveMeter(held) as meter:
        yield found
    found.bytes = meter.peak


class StepMeter:
    """Peak and time of the steps of one round of a client.

    Args:
        device: where the steps compute.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._steps = 0
        self._peak = 0
        self._first = 0.0
        self._seconds = 0.0

    @contextmanager
    def step(self, held: Callable[[], Iterable[Tensor]]) -> Iterator[None]:
        """Around one step.

        Args:
            held: gives what is there before the step and counts; asked of the steps that are metered.
        """
        metered = self._steps < _METERED
        before = held() if metered else ()
        began = time.perf_counter()
        with peak_bytes(before, self._device) if metered else nullcontext(Peak()) as peak:
            yield
        seconds = time.perf_counter() - began
        self._steps += 1
        if metered:
            self._first, self._peak = seconds, max(self._peak, peak.bytes)
        else:
            self._seconds += seconds

    def metrics(self) -> dict[str, float]:
        """`peak_bytes`, and `step_seconds` (forward and backward passes) of steps that were not metered."""
        plain = self._steps - _METERED
        return {
            "peak_bytes": self._peak,
            "step_seconds": self._seconds / plain if plain > 0 else self._first,
        }
