"""Readers of archives, on tiny ones: one content whatever the form, and no code of theirs is run."""

from __future__ import annotations

import gzip
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from fedsim.data import asset_onnx, asset_readers, assets
from tests.data.archives import cifar10_files, fashion_files, tar


def read(reader: Callable[[Any, Path], None], source: Any, made: Path) -> dict[str, np.ndarray]:
    made.mkdir()
    reader(source, made)
    return {file.stem: np.load(file) for file in made.glob("*.npy")}


def test_both_forms_of_cifar10_have_one_content(tmp_path: Path) -> None:
    pictures, pickles, batches, labels = cifar10_files()
    found = read(asset_readers.cifar10, tar(tmp_path / "a.tgz", pictures), tmp_path / "a")
    np.testing.assert_array_equal(found["train_x"], np.concatenate(batches[:5]))
    np.testing.assert_array_equal(found["test_x"], batches[5])
    assert found["test_y"].tolist() == labels[5]
    read(asset_readers.cifar10_pickles, tar(tmp_path / "b.tgz", pickles), tmp_path / "b")
    assert assets.content_digest(tmp_path / "a") == assets.content_digest(tmp_path / "b")


def test_both_forms_of_fashion_mnist_have_one_content(tmp_path: Path) -> None:
    files = fashion_files()
    inner = tar(tmp_path / "data", {f"./usr/share/x/{name}": data for name, data in files.items()})
    parts = {b"debian-binary": b"2.0\n", b"control.tar": b"odd", b"data.tar.gz": inner.read_bytes()}
    deb = b"!<arch>\n"
    for name, data in parts.items():
        header = name.ljust(16) + b"0".ljust(12) + b"0".ljust(6) * 2 + b"100644  "
        deb += header + str(len(data)).encode().ljust(10) + b"`\n" + data + b"\n" * (len(data) % 2)
    (tmp_path / "x.deb").write_bytes(deb)
    found = read(asset_readers.fashion_mnist, tmp_path / "x.deb", tmp_path / "a")
    assert found["train_x"].shape == (6, 1, 28, 28)
    assert found["test_y"].tolist() == [0, 1]
    read(asset_readers.fashion_mnist_files, files, tmp_path / "b")
    assert assets.content_digest(tmp_path / "a") == assets.content_digest(tmp_path / "b")


def test_minilm_has_one_form_however_its_files_were_written(tmp_path: Path) -> None:
    weights = {"a.weight": np.ones((2, 3), np.float32), "b.bias": np.zeros(3, np.float32)}
    old = {"embeddings.position_ids": np.arange(4)[None], **weights}
    config = {"model_type": "bert", "hidden_size": 3, "transformers_version": "4", "_name_or_path": "x"}
    words = {"model": {"vocab": {"[PAD]": 0, "é": 1}}, "truncation": {"max_length": 128}}
    one = {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": save(weights),
        "tokenizer.json": json.dumps(words).encode(),
        "tokenizer_config.json": b"{}",
        "vocab.txt": "[PAD]\né\n".encode(),
    }
    other = {
        **one,
        "config.json": json.dumps({**config, "transformers_version": "5"}, indent=2).encode(),
        "model.safetensors": save(old),
        "tokenizer.json": json.dumps({**words, "truncation": None}, indent=2, ensure_ascii=False).encode(),
        "vocab.txt": "[PAD]\r\né\r\n".encode(),
    }
    for files, name in ((one, "a"), (other, "b")):
        (tmp_path / name).mkdir()
        asset_readers.minilm_files(files, tmp_path / name)
    assert assets.content_digest(tmp_path / "a") == assets.content_digest(tmp_path / "b")
    np.testing.assert_array_equal(
        load_file(tmp_path / "b" / "model.safetensors")["a.weight"], np.ones((2, 3))
    )


def test_vader_keeps_every_rated_sentence(tmp_path: Path) -> None:
    stems = ("tweets", "movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets")
    inner = {f"h/{stem}_GroundTruth.txt": f"1\t-2.5\tbad {stem}\r\n".encode() for stem in stems}
    inner["h/tweets_GroundTruth.txt"] = "\ufeff1\t1.5\tgood\t:)\n2\t0.0\tso so\n\n".encode()
    nested = tar(tmp_path / "inner", inner).read_bytes()
    source = tar(tmp_path / "v.tgz", {"v-1/additional_resources/hutto_ICWSM_2014.tar.gz": nested})
    read(asset_readers.vader, source, tmp_path / "a")
    found = json.loads((tmp_path / "a" / "sentences.json").read_text("utf-8"))
    assert found["text"][:3] == ["good\t:)", "so so", "bad movieReviewSnippets"]
    assert found["rating"] == [1.5, 0.0, -2.5, -2.5, -2.5]
    assert found["domain"] == [0, 0, 1, 2, 3]
    assert len(found["domains"]) == 4


class Frame:
    """What the pickle calls a DataFrame."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def __reduce__(self) -> Any:
        return (Frame, (None,), self.state)


def frame(label: list[int]) -> Frame:
    rows = len(label)
    signal = np.arange(6 * rows, dtype=np.float64).reshape(6, rows)
    numbers = np.stack([np.zeros(rows, np.int64), np.array(label, np.int64)])
    axes = {"0.14.1": {"axes": [], "blocks": [{"values": numbers}, {"values": signal}]}}
    return Frame({"_data": Frame(([], [], [], axes))})


def as_pandas(content: Any) -> bytes:
    old = pickle.dumps(content, protocol=2)
    ours = f"c{Frame.__module__}\nFrame\n".encode()
    assert ours in old
    return old.replace(ours, b"cpandas.core.frame\nDataFrame\n")


def test_hapt_windows_lie_within_one_activity(tmp_path: Path) -> None:
    label = [-1] * 5 + [1] * 256 + [7] * 128 + [6] * 130 + [2] * 127
    data = gzip.compress(as_pandas({2: [frame(label)], 1: [frame([3] * 128)]}))
    found = read(asset_readers.hapt, tar(tmp_path / "h.tgz", {"h/res/HAPT.pkl.gz": data}), tmp_path / "a")
    assert found["user"].tolist() == [0, 1, 1, 1, 1]
    assert found["y"].tolist() == [2, 0, 0, 0, 5]
    assert found["x"].shape == (5, 128, 6)
    assert found["x"].dtype == np.float32
    assert found["x"][1:, 0, 0].tolist() == [5, 69, 133, 5 + 256 + 128]
    assert found["x"][1, 0, 1] == len(label) + 5  # the second channel


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def test_a_pickle_that_names_anything_else_is_not_loaded(tmp_path: Path) -> None:
    for protocol in (0, 2, 4):
        with pytest.raises(ValueError, match=r"asks for \w+\.mkdir, which is not allowed"):
            asset_readers.unpickle(pickle.dumps({1: Evil(tmp_path / "made")}, protocol=protocol))
    with pytest.raises(ValueError, match="not a readable pickle"):
        asset_readers.unpickle(b"nothing of the kind")
    assert not (tmp_path / "made").exists()


def field(number: int, value: int | bytes) -> bytes:
    """One field of a protobuf message."""

    def varint(rest: int) -> bytes:
        low, rest = rest & 127, rest >> 7
        return bytes([low | 128]) + varint(rest) if rest else bytes([low])

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def onnx_tensor(name: str, array: np.ndarray, kind: int) -> bytes:
    dims = b"".join(field(1, size) for size in array.shape)
    return field(5, dims + field(2, kind) + field(8, name.encode()) + field(9, array.tobytes()))


def test_onnx_tensors_and_nodes_are_read_without_its_package() -> None:
    matrix = np.arange(600, dtype=np.float32).reshape(2, 300)
    node = field(1, b"x") + field(1, b"m") + field(2, b"y") + field(4, b"MatMul") + b"\x3d\0\0\0\0"
    skipped = onnx_tensor("text", np.zeros(1, np.uint8), 8)
    graph = field(1, node) + onnx_tensor("m", matrix, 1) + onnx_tensor("n", np.array([-3]), 7) + skipped
    model = field(1, 8) + field(7, graph)
    tensors, nodes = asset_onnx.read_onnx(model)
    assert set(tensors) == {"m", "n"}
    np.testing.assert_array_equal(tensors["m"], matrix)
    assert tensors["n"].tolist() == [-3]
    assert nodes == [asset_onnx.Node("MatMul", ("x", "m"), ("y",))]
    for broken, reason in ((model[:-5], "cut off"), (b"", "no graph"), (b"\x0b", "wire type 3")):
        with pytest.raises(ValueError, match=reason):
            asset_onnx.read_onnx(broken)
