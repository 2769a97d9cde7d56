"""One checkpoint = one safetensors file: arrays as tensors, everything else as JSON in its header.

No pickle. A file is written beside its name, flushed, then renamed, so a reader never sees half of one;
the digest in the header tells a damaged file. A tree is made of dicts, lists, scalars, bytes, numpy
arrays and Flower's records.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from fedsim.errors import UserError
from fedsim.files import write_atomic
from fedsim.messages import arrays_of, views_of

Arrays = dict[str, NDArray[Any]]
_RECORDS: dict[str, Any] = {"metrics": MetricRecord, "config": ConfigRecord, "records": RecordDict}


class Unstorable(TypeError):
    """A value that a checkpoint cannot hold; `path` says where it is."""

    def __init__(self, path: str, value: object) -> None:
        super().__init__(f"{path} ({type(value).__name__})")
        self.path = path


def save(path: Path, tree: Mapping[str, Any]) -> None:
    """Write a tree atomically.

    Raises:
        Unstorable: a value is neither array, record, scalar, list nor dict; says where.
    """
    from safetensors.numpy import save as to_bytes

    arrays: Arrays = {}
    plain = json.dumps(_encode(tree, "", arrays), separators=(",", ":"))
    metadata = {"tree": plain, "sha256": _digest(plain, arrays)}
    write_atomic(path, to_bytes(arrays, metadata=metadata))


def load(path: Path) -> dict[str, Any]:
    """Read a tree.

    Raises:
        UserError: the file is missing, truncated or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays: Arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or unreadable ({error})") from error
    plain = metadata.get("tree", "")
    if metadata.get("sha256") != _digest(plain, arrays):
        raise UserError(f"{path}: damaged (its contents do not match their digest)")
    tree: dict[str, Any] = _decode(json.loads(plain), arrays)
    return tree


def _digest(plain: str, arrays: Arrays) -> str:
    total = hashlib.sha256(plain.encode())
    for name in sorted(arrays):
        total.update(name.encode())
        total.update(np.ascontiguousarray(arrays[name]).tobytes())
    return total.hexdigest()


def _encode(value: Any, path: str, arrays: Arrays) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return {"@": "scalar", "dtype": value.dtype.str, "value": value.item()}
    if isinstance(value, bytes):
        return {"@": "bytes", "value": base64.b64encode(value).decode()}
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        key = f"t{len(arrays)}"
        arrays[key] = np.ascontiguousarray(value).reshape(value.shape)
        return {"@": "array", "key": key}
    if isinstance(value, ArrayRecord):
        return {"@": "arrays", "value": _encode_pairs(views_of(value), path, arrays)}
    for kind, record in _RECORDS.items():
        if isinstance(value, record):
            return {"@": kind, "value": _encode_pairs(value, path, arrays)}
    if isinstance(value, dict):
        return {"@": "dict", "value": _encode_pairs(value, path, arrays)}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {"@": kind, "value": [_encode(v, f"{path}[{i}]", arrays) for i, v in enumerate(value)]}
    raise Unstorable(path, value)


def _encode_pairs(items: Mapping[Any, Any], path: str, arrays: Arrays) -> list[Any]:
    # pairs, not an object: JSON keys are strings, and clients are numbers
    return [
        [key, _encode(value, f"{path}.{key}" if path else str(key), arrays)] for key, value in items.items()
    ]


def _decode(value: Any, arrays: Arrays) -> Any:
    if not isinstance(value, dict):
        return value
    kind: str = value["@"]
    inner: Any = value.get("value")
    if kind == "array":
        return arrays[value["key"]]
    if kind == "scalar":
        return np.dtype(value["dtype"]).type(inner)
    if kind == "bytes":
        return base64.b64decode(inner)
    if kind in ("list", "tuple"):
        items = [_decode(v, arrays) for v in inner]
        return tuple(items) if kind == "tuple" else items
    pairs = {key: _decode(v, arrays) for key, v in inner}
    if kind == "arrays":
        return arrays_of(pairs)
    return _RECORDS[kind](pairs) if kind in _RECORDS else pairs
