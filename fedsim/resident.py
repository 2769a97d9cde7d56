"""The state of a model that changes from client to client, found where its modules keep it *now*.

A module may assign a new tensor to a buffer in `forward` (`self.mean = 0.9 * self.mean + 0.1 * x.mean(0)`). A
tensor that somebody remembers from before then belongs to no module any more. So what is remembered is the
place: a module's table and a key in it.

    module._buffers["mean"]     read: the tensor that is there now
                                reset: the first tensor, with its first values, is put there again

What cannot be reset or sent is refused by name: extra state, tensors without fixed values in memory,
parameters that are replaced (the optimiser holds the old ones), and whatever a module registers only in
`forward`.
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
    """Name -> place of every parameter and buffer, in order of `state_dict()`; tied ones under every name.

    Raises:
        UserError: a module has extra state, or a lazy one has not run yet.
    """
    found: dict[str, Place] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise UserError(
                f"module '{path}' ({type(module).__name__}) has extra state (get_extra_state), which can "
                "neither be sent nor reset between clients: keep it in buffers (register_buffer)"
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


class _Held:
    """An entry that changes: its place, and the tensor that was there first.

    Attributes:
        home: that tensor.
        plain: the same memory without a graph.
        pointer: where that memory is.
        initial: its first values, a copy.
    """

    __slots__ = ("home", "initial", "key", "parameter", "plain", "pointer", "table")

    def __init__(self, place: Place) -> None:
        home = place.tensor
        assert home is not None
        self.table, self.key, self.parameter = place.table, place.key, place.parameter
        self.home, self.plain = home, home.data  # cheaper than a view of it, in what follows
        self.pointer, self.initial = home.data_ptr(), self.plain.clone()


class Resident:
    """What changes in a model while a client trains.

    Args:
        model: stays where it is.
        changing: names of entries that training may change.

    Attributes:
        first: name -> the tensor that is in its place after a reset.

    Raises:
        UserError: see `places`.
    """

    def __init__(self, model: nn.Module, changing: Iterable[str]) -> None:
        found = places(model)
        wanted = set(changing)
        self._held = {name: _Held(place) for name, place in found.items() if name in wanted}
        self.first = {name: held.plain for name, held in self._held.items()}
        # buffers that do not travel, but that a client may change, too: first tensor, a copy, its version
        aside = [p for name, p in found.items() if name not in wanted and not p.parameter]
        self._aside = [(p, p.tensor, _copy(p.tensor)) for p in aside]
        self._versions = [_version(tensor) for _, tensor, _ in self._aside]
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
        table: Any = store
        self._held |= {name: _Held(Place(table, name, True, True)) for name in store}
        self.first |= {name: self._held[name].plain for name in store}

    @property
    def initial(self) -> dict[str, Tensor]:
        """Name -> the values before any training; not to be written to."""
        return {name: held.initial for name, held in self._held.items()}

    @torch.no_grad()
    def reset(self) -> None:
        """Put first tensors with first values back; a frozen buffer only where a forward pass changed it.

        Raises:
            UserError: as `check`, or a parameter is another one.
        """
        self.check()
        for name, held in self._held.items():
            tensor = held.table[held.key]
            if tensor is not held.home or tensor.data_ptr() != held.pointer:
                if held.parameter and tensor is not held.home:
                    raise _replaced(name)
                held.home.data = held.plain
                held.table[held.key] = held.home
        torch._foreach_copy_(list(self.first.values()), list(self.initial.values()))
        for number, (place, home, initial) in enumerate(self._aside):
            place.table[place.key] = home
            if home is not None and initial is not None and home._version != self._versions[number]:
                home.copy_(initial)
                self._versions[number] = home._version

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Whatever runs inside leaves no trace in entries that a client may change."""
        slots = [(held.table, held.key) for held in self._held.values()]
        slots += [(place.table, place.key) for place, _, _ in self._aside]
        before = [(table, key, table[key], _copy(table[key])) for table, key in slots]
        try:
            yield
        finally:
            with torch.no_grad():
                for table, key, tensor, values in before:
                    table[key] = tensor
                    if tensor is not None and values is not None:
                        tensor.copy_(values)

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Entries as they are now, no copies.

        Raises:
            UserError: an entry has become another kind of tensor, or another parameter.
        """
        found = {}
        for name in names:
            held = self._held[name]
            tensor = held.table[held.key]
            same = tensor is held.home and tensor.data_ptr() == held.pointer
            found[name] = held.plain if same else self._moved(name, held)
        return found

    def _moved(self, name: str, held: _Held) -> Tensor:
        """The tensor that stands in the place of the first one."""
        tensor = held.table[held.key]
        if tensor is not held.home and held.parameter:
            raise _replaced(name)
        if tensor is None or tensor.shape != held.initial.shape or tensor.dtype != held.initial.dtype:
            raise UserError(
                f"'{name}' was {_kind(held.initial)} and is {_kind(tensor)} after a forward pass: what "
                "travels keeps its shape and dtype; register it with the final ones, or with persistent=False"
            )
        return tensor.detach()

    def check(self) -> None:
        """Raise UserError unless every module has the entries and the modules that it had, and no others."""
        for name, place in self._empty.items():
            if place.table[place.key] is not None:
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
        f"parameter '{name}' was replaced by another one while the model ran, and the optimiser trains the "
        "old one: change its values in place"
    )


def _late(name: str) -> UserError:
    return UserError(
        f"'{name}' was added to the model, removed or replaced while it ran, so it is neither reset "
        "between clients nor sent: create it in __init__ (a buffer that nobody else needs: register_buffer "
        "with persistent=False)"
    )
