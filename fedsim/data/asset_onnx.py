"""A vision Transformer out of an ONNX file, read without the package onnx.

ONNX is protobuf: a message is a sequence of (field number, wire type, value). Read are, with the numbers
of onnx.proto: ModelProto.graph = 7; GraphProto.node = 1, .initializer = 5; NodeProto.input = 1, .output = 2,
.op_type = 4; TensorProto.dims = 1, .data_type = 2, .name = 8, .raw_data = 9.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_TYPES: dict[int, np.dtype[Any]] = {1: np.dtype("<f4"), 6: np.dtype("<i4"), 7: np.dtype("<i8")}

#: names in the file -> timm's, of one layer (the matrices have none)
_LAYER = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "attention.output.dense.bias": "attn.proj.bias",
    "layer_scale1.lambda1": "ls1.gamma",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "mlp.fc1.bias": "mlp.fc1.bias",
    "mlp.fc2.bias": "mlp.fc2.bias",
    "layer_scale2.lambda1": "ls2.gamma",
}


def vit_small(archive: Path, made: Path) -> None:
    """DINOv2's ViT-S/14 within a saliency model -> the names of timm's `vit_small_patch14_dinov2`.

    The exporter kept the names of the biases but not of the matrices: each is found through the Add that
    has its bias, and transposed. Queries, keys and values become one matrix. The position embedding is that
    of 518 pixels (37 x 37 patches).
    """
    from safetensors.numpy import save_file

    with zipfile.ZipFile(archive) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".onnx"))
        tensors, nodes = read_onnx(wheel.read(name))
    matrices = _matrices(tensors, nodes)
    stem = "backbone.embeddings"
    found = {
        "cls_token": tensors[f"{stem}.cls_token"],
        "pos_embed": np.concatenate([_position(tensors, 1), _position(tensors, 1369)], 1),
        "patch_embed.proj.weight": tensors[f"{stem}.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": tensors[f"{stem}.patch_embeddings.projection.bias"],
        "norm.weight": tensors["backbone.layernorm.weight"],
        "norm.bias": tensors["backbone.layernorm.bias"],
    }
    for layer in range(12):
        old, new = f"backbone.encoder.layer.{layer}", f"blocks.{layer}"
        found |= {f"{new}.{ours}": tensors[f"{old}.{theirs}"] for theirs, ours in _LAYER.items()}
        biases = [f"{old}.attention.attention.{part}.bias" for part in ("query", "key", "value")]
        found[f"{new}.attn.qkv.weight"] = np.concatenate([matrices[bias] for bias in biases])
        found[f"{new}.attn.qkv.bias"] = np.concatenate([tensors[bias] for bias in biases])
        found[f"{new}.attn.proj.weight"] = matrices[f"{old}.attention.output.dense.bias"]
        found |= {f"{new}.mlp.{fc}.weight": matrices[f"{old}.mlp.{fc}.bias"] for fc in ("fc1", "fc2")}
    save_file(
        {name: np.ascontiguousarray(array) for name, array in found.items()}, made / "model.safetensors"
    )


def _position(tensors: dict[str, npt.NDArray[Any]], count: int) -> npt.NDArray[Any]:
    """The nameless tensor [1, count, 384]: the class token's position, or those of the patches."""
    fits = [array for name, array in tensors.items() if "::" in name and array.shape == (1, count, 384)]
    if len(fits) != 1:
        raise ValueError(f"{len(fits)} position embeddings for {count} tokens")
    return fits[0]


def _matrices(tensors: dict[str, npt.NDArray[Any]], nodes: list[Node]) -> dict[str, npt.NDArray[Any]]:
    """Name of a bias -> the matrix [out, in] whose product it is added to."""
    products = {node.outputs[0]: node.inputs[1] for node in nodes if node.operation == "MatMul"}
    found = {}
    for node in nodes:
        if node.operation == "Add":
            bias = next((name for name in node.inputs if name in tensors), None)
            product = next((name for name in node.inputs if name in products), None)
            if bias and product and products[product] in tensors:
                found[bias] = tensors[products[product]].T
    return found


@dataclass(frozen=True)
class Node:
    """One operation of the graph."""

    operation: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def read_onnx(data: bytes) -> tuple[dict[str, npt.NDArray[Any]], list[Node]]:
    """Initialisers of the graph by name (float32, int32, int64 stored raw; others are left out), and nodes.

    Raises:
        ValueError: this is no ONNX model.
    """
    graph = b"".join(_all(memoryview(data), 7))
    if not graph:
        raise ValueError("not an ONNX model: it has no graph")
    view = memoryview(graph)
    tensors = dict(filter(None, (_tensor(part) for part in _all(view, 5))))
    return tensors, [_node(part) for part in _all(view, 1)]


def _tensor(data: memoryview) -> tuple[str, npt.NDArray[Any]] | None:
    name, kind, dims = "", 0, []
    raw: memoryview | None = None
    for number, value in _fields(data):
        if number == 1:
            dims += [value] if isinstance(value, int) else list(_varints(value))
        elif number == 2 and isinstance(value, int):
            kind = value
        elif number == 8 and not isinstance(value, int):
            name = bytes(value).decode()
        elif number == 9 and not isinstance(value, int):
            raw = value
    if raw is None or kind not in _TYPES:
        return None
    return name, np.frombuffer(raw, _TYPES[kind]).reshape(dims)


def _node(data: memoryview) -> Node:
    inputs, outputs, operation = ([bytes(part).decode() for part in _all(data, n)] for n in (1, 2, 4))
    return Node(operation[0] if operation else "", tuple(inputs), tuple(outputs))


def _all(data: memoryview, wanted: int) -> Iterator[memoryview]:
    """The values of one field of bytes, in order."""
    for number, value in _fields(data):
        if number == wanted and not isinstance(value, int):
            yield value


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of a message: integers, or the bytes of anything else."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        wire = tag & 7
        if wire == 0:
            value, place = _varint(data, place)
            yield tag >> 3, value
            continue
        if wire == 2:
            size, place = _varint(data, place)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"not a protobuf message: wire type {wire}")
        if place + size > len(data):
            raise ValueError("a protobuf message is cut off")
        yield tag >> 3, data[place : place + size]
        place += size


def _varints(data: memoryview) -> Iterator[int]:
    place = 0
    while place < len(data):
        value, place = _varint(data, place)
        yield value


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while place < len(data):
        byte = data[place]
        value, shift, place = value | (byte & 127) << shift, shift + 7, place + 1
        if byte < 128:
            return value, place
    raise ValueError("a protobuf message is cut off")
