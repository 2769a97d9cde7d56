"""Seeds of the process-wide generators and torch's thread count, whenever torch is imported.

A client may import torch in the middle of its first message. Its draws must be those of a process that
imported torch before: results must not depend on the engine, nor on who came first. So while torch is not
there, a hook waits for its import and then sets the seed and the thread count that are in force.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from anything printable."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def seed_everything(seed: int) -> None:
    """Seed `random`, numpy and torch; torch when it is imported, if it is not there yet."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    _hook.seed = seed
    torch = _torch()
    if torch is None:
        _hook.install()
    else:
        _seed_torch(torch, seed)


def use_threads(threads: int) -> None:
    """Set torch's thread count; when it is imported, if it is not there yet."""
    _hook.threads = threads
    torch = _torch()
    if torch is None:
        _hook.install()
    elif torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@contextmanager
def generators_restored() -> Iterator[None]:
    """Give back the generators of `random`, numpy and torch's CPU as they were.

    If torch is imported inside, its generator afterwards is that of a torch imported before.
    """
    torch = _torch()
    python, legacy, seed = random.getstate(), np.random.get_state(), _hook.seed
    generator = None if torch is None else torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
        _hook.seed = seed
        torch = _torch()
        if torch is not None:
            if generator is not None:
                torch.set_rng_state(generator)
            elif seed is not None:
                _seed_torch(torch, seed)
            elif _hook.generator is not None:
                torch.set_rng_state(_hook.generator)


@contextmanager
def threads_restored(threads: int) -> Iterator[None]:
    """Use so many torch threads inside, whatever the code inside sets or imports."""
    torch = _torch()
    wanted, before = _hook.threads, None if torch is None else torch.get_num_threads()
    use_threads(threads)
    try:
        yield
    finally:
        _hook.threads = wanted
        torch = _torch()
        before = before or wanted or _hook.own_threads
        if torch is not None and before is not None and torch.get_num_threads() != before:
            torch.set_num_threads(before)


def _torch() -> Any:
    """The torch module, or None while it is not imported, or not completely."""
    module = sys.modules.get("torch")
    if module is None or getattr(module.__spec__, "_initializing", False):
        return None
    return module if hasattr(module, "default_generator") else None  # a user's own torch.py


def _seed_torch(torch: Any, seed: int) -> None:
    if _has_accelerator():
        torch.manual_seed(seed)
    else:
        # torch.manual_seed would keep a formatted stack for a device that is not there: 0.7 ms a call
        torch.default_generator.manual_seed(seed)


@cache
def _has_accelerator() -> bool:
    return bool(sys.modules["torch"].accelerator.is_available())


class _TorchHook(MetaPathFinder):
    """Seeds torch at the end of its import.

    Attributes:
        seed: in force (None: nobody has set one).
        threads: torch threads in force (None: torch's own number).
        generator: state of torch's generator as its import left it.
        own_threads: thread count as its import left it.
    """

    def __init__(self) -> None:
        self.seed: int | None = None
        self.threads: int | None = None
        self.generator: Any = None
        self.own_threads: int | None = None

    def install(self) -> None:
        """Wait for the import."""
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """What the other finders find, with an import that ends in `_imported`."""
        if fullname != "torch":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            inner = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                inner(module)
                self._imported(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def _imported(self, torch: Any) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        if not hasattr(torch, "default_generator"):
            return
        self.generator, self.own_threads = torch.get_rng_state(), torch.get_num_threads()
        if self.seed is not None:
            _seed_torch(torch, self.seed)
        if self.threads is not None:
            torch.set_num_threads(self.threads)


_hook = _TorchHook()
