"""Tiny archives in the form of the true ones."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def cifar10_files() -> tuple[dict[str, bytes], dict[str, bytes], list[np.ndarray], list[list[int]]]:
    """Four images a batch as pictures and as pickles, and what is in them."""
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, 256, (4, 3, 32, 32), np.uint8) for _ in range(6)]
    labels = [[int(label) for label in rng.integers(0, 10, 4)] for _ in range(6)]
    names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    pictures, pickles = {}, {}
    for name, batch, own in zip(names, batches, labels, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(batch.transpose(0, 2, 3, 1).reshape(4, 1024, 3)).save(buffer, "PNG")
        pictures[f"package/{name}.png"] = buffer.getvalue()
        content = {"data": batch.reshape(4, -1), "labels": own}
        pickles[f"cifar-10-batches-py/{name}"] = pickle.dumps(content, protocol=2)
    train = [label for own in labels[:5] for label in own]
    pictures["package/train_lables.json"] = json.dumps(train).encode()
    pictures["package/test_lables.json"] = json.dumps(labels[5]).encode()
    return pictures, pickles, batches, labels


def fashion_files() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    files = {}
    for part, count in (("train", 6), ("t10k", 2)):
        pixels, labels = rng.integers(0, 256, (count, 784), np.uint8), np.arange(count, dtype=np.uint8)
        files[f"{part}-images-idx3-ubyte.gz"] = gzip.compress(bytes(16) + pixels.tobytes(), mtime=0)
        files[f"{part}-labels-idx1-ubyte.gz"] = gzip.compress(bytes(8) + labels.tobytes(), mtime=0)
    return files
