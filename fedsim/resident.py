"""The state of a model that changes from client to client, found where its modules keep it *now*.

A module may assign a new tensor to a buffer in `forward` (`self.mean = 0.9 * self.mean + 0.1 * x.mean(0)`). A
tensor that somebody remembers from before then belongs to no module any more. So what is remembered is the
place: a module's table and a key in it.

    module._buffers["mean"]     read: the tensor that is there now
                                reset: the first tensor, with its first values, is put there again

What cannot be reset or sent is refused by name: extra state, tensors without fixed values in memory, parameters
that are replaced (the optimiser holds the old ones), and whatever a module registers only in `forward`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fedsim.errors import UserError


@dataclass(frozen=True)
class Place:
    """Where a module keeps a parameter or a buffer.

    Attributes:
        table: of the module: `_parameters` or `_buffers`.
        key: in it.
        parameter: whether it is one.
        persistent: whether it is part of `state_dict()`.
    """

    table: dict[str, Tensor | None]
    key: str
    parameter: bool
    persistent: bool

    @property
    def tensor(self) -> Tensor | None:
        """What is there now."""
        return self.table[self.key]


def places(model: nn.Module) -> dict[str, Place]:
    """Name -> place of every parameter and buffer, in the order of `state_dict()`; tied ones under every name.

    Raises:
        UserError: a module has extra state, or a lazy one has not run yet.
    """
    found: dict[str, Place] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise UserError(
                f"module '{path}' ({type(module).__name__}) has extra state (get_extra_state), which can neither "
                "be sent nor reset between clients: keep it in buffers (register_buffer)"
            )
        prefix = f"{path}." if path else ""
        for key in list(module._parameters.keys()):  # tables of TorchScript cannot be iterated over
            found[prefix + key] = Place(module._parameters, key, True, True)
        for key in list(module._buffers.keys()):
            persistent = key not in module._non_persistent_buffers_set
            found[prefix + key] = Place(module._buffers, key, False, persistent)
    for name, place in found.items():
        if place.tensor is not None and is_lazy(place.tensor):
            raise UserError(
                f"'{name}' gets its shape in the first forward pass, which comes too late: "
                "run the model once on a sample before you return it, or give the shape"
            )
    return found


def unfold(model: nn.Module) -> None:
    """Give expanded tensors memory of their own: values that share memory cannot be written one by one."""
    for place in places(model).values():
        tensor = place.tensor
        if tensor is None or tensor.layout != torch.strided:
            continue
        if any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
            own = tensor.detach().contiguous()
            if place.parameter:
                tensor.data = own
            else:
                place.table[place.key] = own


class Resident:
    """What changes in a model while a client trains.

    Args:
        model: stays where it is.
        changing: names of entries that training may change.

    Attributes:
        initial: name -> the values before any training, copies.

    Raises:
        UserError: see `places`.
    """

    def __init__(self, model: nn.Module, changing: Iterable[str]) -> None:
        found = places(model)
        wanted = set(changing)
        self._places = {name: place for name, place in found.items() if name in wanted}
        # buffers that do not travel, but that a client may change, too
        self._aside = {n: p for n, p in found.items() if n not in wanted and not p.parameter}
        self._home = {name: place.tensor for name, place in (self._places | self._aside).items()}
        self.initial = {name: t.detach().clone() for name, t in self._home.items() if t is not None}
        self._versions = {name: _version(self._home[name]) for name in self._aside}
        self._empty = {n: p for n, p in found.items() if p.tensor is None and (p.parameter or p.persistent)}
        # what `check` compares: it runs twice a client, so it only counts
        self._model, self._names = model, found.keys()
        modules = list(model.modules())
        self._tables: list[dict[str, Any]] = [
            table for m in modules for table in (m._parameters, m._buffers, m._modules)
        ]
        self._sizes = list(map(len, self._tables))
        self._children = [(m._modules, list(m._modules.values())) for m in modules if m._modules]

    def add(self, store: dict[str, Tensor]) -> None:
        """Further entries, kept in a dictionary whose tensors are only written in place."""
        for name, tensor in store.items():
            self._places[name] = Place(store, name, True, True)  # type: ignore[arg-type]
            self._home[name] = tensor
            self.initial[name] = tensor.detach().clone()

    @torch.no_grad()
    def reset(self) -> None:
        """Put first tensors with first values back; a frozen buffer only where a forward pass changed it.

        Raises:
            UserError: as `check`, or a parameter is another one.
        """
        self.check()
        for name, place in self._places.items():
            home = self._home[name]
            assert home is not None
            if place.table[place.key] is not home:
                self._put_back(name, place)
            home.copy_(self.initial[name])
        for name, place in self._aside.items():
            home = self._home[name]
            if place.table[place.key] is not home:
                self._put_back(name, place)
            if home is not None and home._version != self._versions[name]:
                home.copy_(self.initial[name])
                self._versions[name] = home._version

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Whatever runs inside leaves no trace in entries that a client may change."""
        held = self._places | self._aside
        before = [(place, place.tensor, _copy(place.tensor)) for place in held.values()]
        try:
            yield
        finally:
            with torch.no_grad():
                for place, tensor, values in before:
                    place.table[place.key] = tensor
                    if tensor is not None and values is not None:
                        tensor.copy_(values)

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Entries as they are now, no copies.

        Raises:
            UserError: an entry has become another kind of tensor, or another parameter.
        """
        return {name: self._now(name) for name in names}

    def _now(self, name: str) -> Tensor:
        place, initial = self._places[name], self.initial[name]
        tensor = place.table[place.key]
        if tensor is not self._home[name] and place.parameter:
            raise _replaced(name)
        if tensor is None or tensor.shape != initial.shape or tensor.dtype != initial.dtype:
            raise UserError(
                f"'{name}' was {_kind(initial)} and is {_kind(tensor)} after a forward pass: what travels keeps "
                "its shape and dtype; register it with the final ones, or with persistent=False"
            )
        return tensor

    def _put_back(self, name: str, place: Place) -> None:
        if place.parameter:
            raise _replaced(name)
        place.table[place.key] = self._home[name]

    def check(self) -> None:
        """Raise UserError unless every module has the entries and the modules that it had, and no others."""
        for name, place in self._empty.items():
            if place.tensor is not None:
                raise _late(name)
        for children, known in self._children:
            if list(children.values()) != known:
                raise _late(next((key for key, child in children.items() if child not in known), "a module"))
        if list(map(len, self._tables)) != self._sizes:
            raise _late(min(places(self._model).keys() ^ self._names, default="a module"))


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def _version(tensor: Tensor | None) -> int:
    """Goes up with every change in place."""
    return 0 if tensor is None else tensor._version


def _kind(tensor: Tensor | None) -> str:
    if tensor is None:
        return "nothing"
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _replaced(name: str) -> UserError:
    return UserError(
        f"parameter '{name}' was replaced by another one while the model ran, and the optimiser trains the old one: "
        "change its values in place"
    )


def _late(name: str) -> UserError:
    return UserError(
        f"'{name}' was added to the model, removed or replaced while it ran, so it is neither reset between clients nor "
        "sent: create it in __init__ (a buffer that nobody else needs: register_buffer with persistent=False)"
    )
