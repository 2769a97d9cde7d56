"""What travels and what stays: selection of the changing state, its form on the wire, digests.

The state of a tuned model falls into three parts:

* **frozen**: never changes, never travels; only its digest does, so that a client with another
  backbone is refused instead of silently averaged;
* **shared**: changes, travels, is aggregated;
* **personal**: changes, stays in the client's `context.state`.

bfloat16 entries travel as float32 (exact, and every strategy can do arithmetic on them); `pack` puts
them back into two bytes on a real wire. Complex entries travel as pairs of real numbers, [..., 2].
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsim import json_text
from fedsim.errors import UserError, listed, nearest
from fedsim.messages import arrays_of, views_of
from fedsim.resident import places

LAYOUT = "layout"  #: key of the packed form's description in a content's config record
_DIMENSIONS = 64  #: of an array, as numpy has it
_FLAT = "flat."  #: packed arrays are named flat.<dtype>
#: dtypes of the model that travel as another one
_ON_THE_WIRE = {
    "bfloat16": "float32",
    "complex32": "float16",
    "complex64": "float32",
    "complex128": "float64",
}


@dataclass(frozen=True)
class Entry:
    """One named tensor of the changing state."""

    name: str
    shape: tuple[int, ...]
    dtype: str  #: of the model: "float32", "bfloat16", "int64", ...

    @property
    def wire_dtype(self) -> str:
        """numpy dtype inside a record."""
        return _ON_THE_WIRE.get(self.dtype, self.dtype)

    @property
    def wire_shape(self) -> tuple[int, ...]:
        """Shape inside a record; complex entries have the parts of a number as last dimension."""
        return (*self.shape, 2) if self.dtype.startswith("complex") else self.shape

    @property
    def nbytes(self) -> int:
        """Bytes on a packed wire."""
        size = 2 if self.dtype == "bfloat16" else np.dtype(self.wire_dtype).itemsize
        return int(np.prod(self.wire_shape, dtype=np.int64)) * size


@dataclass(frozen=True)
class Selection:
    """Names of the changing state, split into what travels and what stays.

    Attributes:
        shared: what travels.
        personal: what stays.
        statistics: names of those that are no parameters (running means and counters of BatchNorm, say): they
            are averaged, whatever a server optimiser does with parameters.
    """

    shared: tuple[Entry, ...]
    personal: tuple[Entry, ...]
    statistics: frozenset[str] = frozenset()

    @property
    def shared_statistics(self) -> frozenset[str]:
        """Those of `statistics` that travel."""
        return self.statistics & {entry.name for entry in self.shared}

    @property
    def changing(self) -> tuple[Entry, ...]:
        """Everything that training may change."""
        return self.shared + self.personal


def select(model: nn.Module, train_modules: Sequence[str], personal: Iterable[str] = ()) -> Selection:
    """Split the changing state of a tuned model.

    Args:
        model: parameters that train have `requires_grad`.
        train_modules: prefixes of modules in train mode: their buffers change too (BatchNorm).
        personal: name patterns with `*` and `?` of entries that stay with the client.

    A tied tensor, which has several names, travels once, under the first; it is personal if one name is.

    Raises:
        UserError: a pattern matches nothing that changes, or something that changes cannot travel.
    """
    inside = tuple(f"{prefix}." if prefix else "" for prefix in train_modules)
    names: dict[int, list[str]] = {}  # of one tensor
    found: dict[int, Tensor] = {}
    parameters: set[int] = set()
    for name, place in places(model).items():
        value = place.tensor
        if value is None or not place.persistent:
            continue
        if value.requires_grad if place.parameter else inside and name.startswith(inside):
            found[id(value)] = value
            names.setdefault(id(value), []).append(name)
            parameters |= {id(value)} if place.parameter else set()
    patterns = list(personal)
    known = [name for some in names.values() for name in some]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise UserError(
                f"[payload] personal: '{pattern}' matches nothing that changes under this tuning: "
                f"{nearest(pattern, known[:4])}"
            )
    shared: dict[str, Tensor] = {}
    mine: dict[str, Tensor] = {}
    for key, some in names.items():
        stays = any(fnmatchcase(name, pattern) for name in some for pattern in patterns)
        (mine if stays else shared)[some[0]] = _sendable(some[0], found[key])
    return Selection(
        shared=tuple(entries_of(shared)),
        personal=tuple(entries_of(mine)),
        statistics=frozenset(some[0] for key, some in names.items() if key not in parameters),
    )


def _sendable(name: str, value: Tensor) -> Tensor:
    """The tensor, if numpy has its like."""
    dtype = str(value.dtype).removeprefix("torch.")
    try:
        np.dtype(_ON_THE_WIRE.get(dtype, dtype))
    except TypeError:
        dtype = ""
    if not dtype or value.layout != torch.strided or value.is_quantized:
        raise UserError(
            f"'{name}' changes while clients train, but a tensor of {value.dtype} ({value.layout}) cannot "
            "travel: keep it frozen ([tuning]), or give the model a dense one of float32"
        )
    return value


def entries_of(state: Mapping[str, Tensor]) -> list[Entry]:
    """Name, shape and dtype of tensors."""
    return [
        Entry(name, tuple(value.shape), str(value.dtype).removeprefix("torch."))
        for name, value in state.items()
    ]


# ------------------------------------------------------------------------- tensors <-> records


def to_record(state: Mapping[str, Tensor], entries: Sequence[Entry]) -> ArrayRecord:
    """Copy tensors into a record (bfloat16 as float32, complex numbers as pairs)."""
    return arrays_of({entry.name: _to_numpy(state[entry.name]) for entry in entries})


def _to_numpy(tensor: Tensor) -> NDArray[Any]:
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    elif tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return np.array(tensor.numpy(force=True), order="C")


@torch.no_grad()
def load_record(record: ArrayRecord, entries: Sequence[Entry], state: Mapping[str, Tensor]) -> None:
    """Copy a record into tensors in place.

    Args:
        record: must hold exactly the entries' names, shapes and wire dtypes.
        entries: what is expected.
        state: name -> tensor to be overwritten (any device, the model's dtype).

    Raises:
        ValueError: names, a shape or a dtype differ; says which.
    """
    check(record, entries)
    for name, values in views_of(record).items():
        target = state[name]
        if target.is_complex():
            target = torch.view_as_real(target)
        if target.is_cpu and target.dtype != torch.bfloat16:
            np.copyto(target.numpy(), values)  # no intermediate copy of a read-only view
        else:
            target.copy_(torch.from_numpy(np.array(values)))


def check(record: ArrayRecord, entries: Sequence[Entry]) -> None:
    """Raise ValueError unless the record holds exactly these entries."""
    expected = {entry.name: entry for entry in entries}
    missing, extra = sorted(set(expected) - set(record)), sorted(set(record) - set(expected))
    if missing or extra:
        raise ValueError(
            f"the shared state does not fit this model: missing {missing[:3]}, unexpected {extra[:3]} "
            f"({len(missing)} and {len(extra)} in all); server and client must use the same experiment"
        )
    for name, entry in expected.items():
        array = record[name]
        if tuple(array.shape) != entry.wire_shape or array.dtype != entry.wire_dtype:
            raise ValueError(
                f"'{name}' arrived as {array.dtype}{list(array.shape)}, this model has "
                f"{entry.wire_dtype}{list(entry.wire_shape)}"
            )


def conform(record: ArrayRecord, entries: Sequence[Entry]) -> ArrayRecord:
    """Bring what a strategy returned back to the model's dtypes.

    Flower's own strategies may return float64 for integer buffers, and a mean of bfloat16 values is not
    a bfloat16 value: both are cast once, here.

    Raises:
        UserError: names or shapes differ.
    """
    values, names = views_of(record), [entry.name for entry in entries]
    if set(values) != set(names):
        missing = [name for name in names if name not in values]
        extra = [name for name in values if name not in names]
        raise UserError(
            "aggregate_train returned other array names than the strategy was given: "
            f"missing {listed(missing) or 'none'}; unexpected {listed(extra) or 'none'}"
        )
    out: dict[str, NDArray[Any]] = {}
    for entry in entries:
        array = values[entry.name]
        if tuple(array.shape) != entry.wire_shape:
            raise UserError(
                f"aggregate_train returned '{entry.name}' with shape {array.shape}, not {entry.wire_shape}"
            )
        if entry.dtype == "bfloat16":
            array = torch.from_numpy(np.array(array, dtype=np.float32)).bfloat16().float().numpy()
        elif array.dtype != np.dtype(entry.wire_dtype):
            whole = np.dtype(entry.wire_dtype).kind in "iu"
            array = (np.rint(array) if whole else array).astype(entry.wire_dtype)
        out[entry.name] = array
    return arrays_of(out)


# ----------------------------------------------------------------------------------- digests


def digest(arrays: Mapping[str, NDArray[Any]]) -> str:
    """sha256 hex over names, dtypes, shapes and bytes, in order of name."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        total.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        total.update(array.view(np.uint8).reshape(-1).data if array.size else b"")
    return total.hexdigest()


def digest_of(state: Mapping[str, Tensor], derived: Mapping[str, str] | None = None) -> str:
    """`digest` of tensors, "meta" when one of them has no values.

    Args:
        state: tensors by name.
        derived: names of computed ones -> digest of their ingredients, which is taken instead of the values:
            the last bits of a computed value depend on the CPU.
    """
    if any(value.is_meta for value in state.values()):
        return "meta"
    made_of = derived or {}
    return digest(
        {
            name: np.frombuffer(made_of[name].encode(), np.uint8) if name in made_of else _to_numpy(value)
            for name, value in state.items()
        }
    )


def frozen_digest(
    model: nn.Module, changing: Iterable[Entry], derived: Mapping[str, str] | None = None
) -> str:
    """Digest of everything in the model's state that does not change (16 hex digits).

    Args:
        model: the tuned model.
        changing: what is left out.
        derived: see `digest_of` and `Classifier`.
    """
    skip = {entry.name for entry in changing}
    frozen = {name: value for name, value in model.state_dict().items() if name not in skip}
    return digest_of(frozen, derived)[:16]


# ---------------------------------------------------------------------------- flat packing


def pack(content: RecordDict, half: frozenset[str] = frozenset()) -> RecordDict:
    """One flat array per dtype instead of one per tensor: Flower's wire pays several requests an array.

    Args:
        content: any message content; config and metric records stay as they are.
        half: names whose float32 values are bfloat16 values and may travel in two bytes.

    Returns:
        A content that `unpack` restores exactly; a content without arrays is returned unchanged.
    """
    if not content.array_records:
        return content
    packed = RecordDict()
    layouts: dict[str, list[list[Any]]] = {}
    for key, record in content.items():
        if not isinstance(record, ArrayRecord):
            packed[key] = record
            continue
        rows: list[list[Any]] = []
        parts: dict[str, list[NDArray[Any]]] = {}
        for name, values in views_of(record).items():
            kind = "bfloat16" if name in half and _is_half(values) else values.dtype.str
            flat = np.ascontiguousarray(values).reshape(-1)
            parts.setdefault(kind, []).append(
                (flat.view(np.uint32) >> 16).astype(np.uint16) if kind == "bfloat16" else flat
            )
            rows.append([name, kind, list(values.shape)])
        packed[key] = arrays_of({_FLAT + kind: np.concatenate(some) for kind, some in parts.items()})
        layouts[key] = rows
    text = json.dumps(layouts, separators=(",", ":")).encode()
    packed[LAYOUT] = ConfigRecord({LAYOUT: zlib.compress(text, 9)})
    return packed


def _is_half(values: NDArray[Any]) -> bool:
    if values.dtype != np.float32:
        return False
    bits = np.ascontiguousarray(values).reshape(-1).view(np.uint32)
    return not (bits & 0xFFFF).any()


def unpack(content: RecordDict) -> RecordDict:
    """The inverse of `pack`; a content that is not packed is returned unchanged."""
    layout = content.get(LAYOUT)
    if not isinstance(layout, ConfigRecord):
        return content
    raw = layout[LAYOUT]
    if not isinstance(raw, bytes):
        raise ValueError("the layout of a packed message must be bytes")
    layouts = json_text.received(zlib.decompressobj().decompress(raw, json_text.SIZE + 1), "the layout")
    if not isinstance(layouts, dict):
        raise ValueError("the layout is no table")
    plain = RecordDict()
    for key, record in content.items():
        if key == LAYOUT:
            continue
        if not isinstance(record, ArrayRecord):
            plain[key] = record
            continue
        plain[key] = arrays_of(_unflattened(views_of(record), layouts.get(key)))
    return plain


def _is_shape(sizes: Sequence[Any]) -> bool:
    """Whether an array can have them: the product of millions of numbers would take hours."""
    return len(sizes) <= _DIMENSIONS and all(type(n) is int and n >= 0 for n in sizes)


def _unflattened(flat: Mapping[str, NDArray[Any]], rows: object) -> dict[str, NDArray[Any]]:
    """Arrays by name, cut out of the flat ones.

    Args:
        flat: by the name of their kind.
        rows: [name, kind, shape] of each array, in order; from outside.

    Raises:
        ValueError: rows and flat arrays do not fit.
    """
    at = dict.fromkeys(flat, 0)
    values: dict[str, NDArray[Any]] = {}
    for row in rows if isinstance(rows, list) else [None]:
        match row:
            case [str(name), str(kind), [*shape]] if _is_shape(shape):
                source, size = _FLAT + kind, math.prod(shape)
            case _:
                raise ValueError(f"the layout has {str(row)[:80]} where a name, a kind and a shape should be")
        if source not in flat or flat[source].ndim != 1 or at[source] + size > len(flat[source]):
            raise ValueError(f"'{name}' is {kind}{shape}, but there are not that many values of this kind")
        part = flat[source][at[source] : at[source] + size]
        at[source] += size
        if kind == "bfloat16":
            part = (part.astype(np.uint32) << 16).view(np.float32)
        values[name] = part.reshape(shape)
    return values
