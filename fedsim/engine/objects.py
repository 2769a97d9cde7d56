"""How instructions travel to workers: arrays as numpy buffers, each distinct one once a send.

    contents ──> templates (records without values) + parcels (lists of arrays)
                                                      │  shared memory, once a node
    worker:  template + parcels ──> records of read-only views, no copy

Arrays that are in the same set of contents share a parcel: the state that everybody gets is one, what a
single client gets is another, and no worker receives what it does not need. Flower's `bytes` bodies would
be copied by every reader; a numpy buffer is mapped.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict
from numpy.typing import NDArray

from fedsim import _flwr

Parcel = list[NDArray[Any]]
#: a pickle and the buffers that it leaves out: Ray ships those without a copy, and its own pickler, which
#: looks at every object in Python, sees none of the rest
Packed = tuple[bytes, list[pickle.PickleBuffer]]


@dataclass(frozen=True)
class Place:
    """Where the values of one array are, and its fields if they are not a plain numpy array's."""

    parcel: int
    index: int
    fields: tuple[str, tuple[int, ...], str] | None  #: dtype, shape, stype of opaque bytes


#: a content without its arrays: record key -> record, or array name -> place
Template = dict[str, Any]


def disassemble(contents: Sequence[RecordDict]) -> tuple[list[Template], list[Parcel]]:
    """Separate distinct contents from the values of their arrays."""
    distinct = _Distinct()
    users: dict[int, set[int]] = {}
    for number, content in enumerate(contents):
        for record in content.values():
            if isinstance(record, ArrayRecord):
                for array in record.values():
                    users.setdefault(distinct.key(array), set()).add(number)
    parcels: list[Parcel] = []
    groups: dict[frozenset[int], int] = {}
    places: dict[int, Place] = {}
    for key, numbers in users.items():
        group = groups.setdefault(frozenset(numbers), len(groups))
        if group == len(parcels):
            parcels.append([])
        values, fields = distinct.values[key]
        places[key] = Place(group, len(parcels[group]), fields)
        parcels[group].append(values)
    templates = [
        {
            key: {name: places[distinct.key(array)] for name, array in record.items()}
            if isinstance(record, ArrayRecord)
            else record
            for key, record in content.items()
        }
        for content in contents
    ]
    return templates, parcels


def parcels_of(template: Template) -> set[int]:
    """Numbers of the parcels that a content needs."""
    return {
        place.parcel for record in template.values() if isinstance(record, dict) for place in record.values()
    }


def assemble(template: Template, parcels: dict[int, Parcel]) -> RecordDict:
    """The content again; its arrays are read-only views of the parcels."""
    content = RecordDict()
    for key, record in template.items():
        if isinstance(record, dict):
            arrays = {name: _array(parcels[at.parcel][at.index], at) for name, at in record.items()}
            record = _flwr.array_record(arrays)
        content[key] = record
    return content


def pack(thing: object) -> Packed:
    """Any importable object, with its numpy buffers beside it."""
    buffers: list[pickle.PickleBuffer] = []
    return pickle.dumps(thing, 5, buffer_callback=buffers.append), buffers


def unpack(packed: tuple[bytes | memoryview, Sequence[Any]]) -> Any:
    """The object again; its arrays are views of the buffers."""
    return pickle.loads(packed[0], buffers=packed[1])


def _array(values: NDArray[Any], place: Place) -> Array:
    if place.fields is None:
        return _flwr.LazyArray(values)
    return Array(*place.fields, values.tobytes())


class _Distinct:
    """Numbers for distinct arrays: by identity, and by content where shape and dtype are the same."""

    def __init__(self) -> None:
        self.values: list[tuple[NDArray[Any], tuple[str, tuple[int, ...], str] | None]] = []
        self._by_id: dict[int, int] = {}
        self._alike: dict[tuple[Any, ...], list[int]] = {}
        self._digests: dict[int, bytes] = {}
        self._kept: list[Array] = []  # so that no id is given twice

    def key(self, array: Array) -> int:
        if id(array) not in self._by_id:
            self._kept.append(array)
            self._by_id[id(array)] = self._same_or_new(array)
        return self._by_id[id(array)]

    def _same_or_new(self, array: Array) -> int:
        lazy = _flwr.lazy(array)
        if isinstance(lazy, _flwr.LazyArray):
            values, fields = _flwr.numpy_view(lazy), None
        else:
            values, fields = np.frombuffer(array.data, np.uint8), (array.dtype, array.shape, array.stype)
        number = len(self.values)
        self.values.append((values, fields))
        alike = self._alike.setdefault((values.dtype.str, values.shape, values.strides, fields), [])
        for other in alike:  # digests are made only where there is something to compare with
            if self._digest(other) == self._digest(number):
                self.values.pop()
                self._digests.pop(number)
                return other
        alike.append(number)
        return number

    def _digest(self, number: int) -> bytes:
        if number not in self._digests:
            values = self.values[number][0]
            self._digests[number] = hashlib.blake2b(values.tobytes("A"), digest_size=16).digest()
        return self._digests[number]
