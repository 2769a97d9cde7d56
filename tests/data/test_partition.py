"""Splits: disjoint, complete, reproducible, refused with the key and the fix."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from flwr_datasets.partitioner import IidPartitioner

from fedsim.data.partition import Partition, partition
from fedsim.errors import UserError

LABELS = np.random.default_rng(0).integers(0, 10, 2000)
GROUPS = np.random.default_rng(1).integers(0, 13, 2000) * 7

NAMES: dict[str, dict[str, Any]] = {
    "iid": {},
    "dirichlet": {"alpha": 0.5},
    "pathological": {"classes_per_client": 3},
    "shard": {"shards_per_client": 2},
    "size-skew": {"kind": "square"},
    "natural": {},
}


def split(name: str, clients: int = 8, labels: np.ndarray = LABELS, **keys: Any) -> Partition:
    platform = {"shots": None, "pooled": False, "seed": 0, "groups": GROUPS}
    options = {**NAMES[name], **{k: v for k, v in keys.items() if k not in platform}}
    platform |= {k: v for k, v in keys.items() if k in platform}
    return partition(name, options, labels=labels, clients=clients, **platform)


def classes_of(found: Partition, labels: np.ndarray = LABELS) -> list[set[int]]:
    return [set(labels[found.client(pid)].tolist()) for pid in range(found.clients)]


@pytest.mark.parametrize("name", NAMES)
def test_disjoint_complete_and_a_function_of_the_seed(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    first = split(name)
    assert first.clients == 8
    assert len(np.unique(first.indices)) == len(first.indices)
    assert len(first.indices) >= 2000 - 16, "only a shard that is not filled may be left out"
    assert min(first.sizes()) >= 1
    assert all((np.diff(first.client(pid)) > 0).all() for pid in range(8))
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path))  # made anew, not read back
    again = split(name)
    assert np.array_equal(first.indices, again.indices)
    assert np.array_equal(first.offsets, again.offsets)
    if name != "natural":
        assert not np.array_equal(first.indices, split(name, seed=1).indices)


def test_a_small_alpha_concentrates_classes_and_a_large_one_does_not() -> None:
    def largest_share(alpha: float) -> float:
        found = split("dirichlet", alpha=alpha)
        counts = np.stack([np.bincount(LABELS[found.client(p)], minlength=10) for p in range(8)])
        return float((counts.max(0) / counts.sum(0)).mean())

    assert largest_share(0.1) > 0.55
    assert largest_share(1000.0) < 0.2


def test_pathological_with_and_without_overlap() -> None:
    assert all(len(owned) == 3 for owned in classes_of(split("pathological", clients=12)))
    alone = classes_of(split("pathological", clients=5, overlap=False))
    assert [len(owned) for owned in alone] == [2] * 5
    assert set.union(*alone) == set(range(10))
    with pytest.raises(UserError, match="11 clients, but 10 classes"):
        split("pathological", clients=11, overlap=False)
    with pytest.raises(UserError, match="classes_per_client = 11"):
        split("pathological", classes_per_client=11)


def test_sizes_grow_linearly() -> None:
    sizes = split("size-skew", clients=4, kind="linear").sizes()
    assert sizes.tolist() == [200, 400, 600, 800]


def test_natural_owners_stay_together_and_are_merged_when_there_are_fewer_clients() -> None:
    whole = split("natural", clients=13)
    assert all(len(set(GROUPS[whole.client(pid)])) == 1 for pid in range(13))
    merged = split("natural", clients=5)
    owners = [set(GROUPS[merged.client(pid)].tolist()) for pid in range(5)]
    assert sum(map(len, owners)) == 13
    assert merged.sizes().max() < 2 * merged.sizes().min()
    with pytest.raises(UserError, match="13 natural owners"):
        split("natural", clients=14)
    with pytest.raises(UserError, match="needs natural owners"):
        split("natural", groups=None)


def test_shots_per_class_and_client_without_replacement() -> None:
    found = split("iid", shots=5)
    for pid in range(8):
        assert set(np.bincount(LABELS[found.client(pid)])) == {5}
    everything = split("iid")
    assert all(set(found.client(p)) <= set(everything.client(p)) for p in range(8))
    skewed = split("dirichlet", alpha=0.1, shots=16)
    counts = np.stack([np.bincount(LABELS[skewed.client(p)], minlength=10) for p in range(8)])
    assert counts.max() == 16
    assert len(np.unique(skewed.indices)) == len(skewed.indices)
    with pytest.raises(UserError, match=r"shots = 500, but no client has more than \d+ samples"):
        split("iid", shots=500)


def test_pooled_is_the_union_of_the_clients() -> None:
    parts, pooled = split("dirichlet", shots=7), split("dirichlet", shots=7, pooled=True)
    assert pooled.clients == 1
    assert np.array_equal(np.sort(parts.indices), pooled.client(0))


def test_too_many_clients_and_clients_without_data() -> None:
    with pytest.raises(UserError, match="clients = 2001, but there are 2000 training samples"):
        split("iid", clients=2001)
    with pytest.raises(UserError, match=r"raise alpha \(now 0\.001\)"):
        split("dirichlet", alpha=0.001, clients=100)
    with pytest.raises(UserError, match="leaves 1 of 3 clients without data"):
        partition(
            "tests.data.test_partition:forgetful", {}, labels=LABELS, groups=None, clients=3,
            shots=None, pooled=False, seed=0,
        )  # fmt: skip


def forgetful(table: Any, /) -> list[np.ndarray]:
    """A user's own partition that forgets the last client."""
    return [*np.array_split(np.arange(len(table.labels)), table.clients - 1), np.empty(0, np.int64)]


def test_a_cached_partition_needs_no_flwr_datasets(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np\n"
        "from fedsim.data.partition import partition\n"
        "labels = np.arange(100) % 4\n"
        "p = partition('dirichlet', {'alpha': 1.0}, labels=labels, groups=None, clients=3, shots=None,"
        " pooled=False, seed=0)\n"
        "print(p.indices.sum(), 'flwr_datasets' in sys.modules)\n"
    )
    env = {**os.environ, "FEDSIM_CACHE": str(tmp_path)}
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    ]
    assert outputs == ["4950 True\n", "4950 False\n"]


def test_without_flwr_datasets_plain_cuts_work_and_others_say_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path))
    expected = split("iid").indices
    module = importlib.import_module("fedsim.data.partition")
    known = module.version

    def version(name: str) -> str:
        if name == "flwr-datasets":
            raise importlib.metadata.PackageNotFoundError(name)
        return str(known(name))

    monkeypatch.setattr(module, "version", version)
    monkeypatch.setitem(sys.modules, "datasets", None)
    np.testing.assert_array_equal(split("iid").indices, expected)
    for name in ("dirichlet", "shard"):
        with pytest.raises(UserError, match="'datasets' is not installed: pip install"):
            split(name)


def test_a_damaged_cache_file_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path))
    first = split("iid")
    (file,) = (tmp_path / "partitions").iterdir()
    file.write_bytes(file.read_bytes()[:50])
    assert np.array_equal(split("iid").indices, first.indices)


def test_an_edited_partition_function_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "my_split.py"
    parts = []
    for step in (2, 1):
        file.write_text(
            f"def mine(table, /):\n    import numpy as np\n    return [np.arange(0, 10, {step})]\n"
        )
        sys.modules.pop("my_split", None)
        importlib.invalidate_caches()
        keys = {"groups": None, "shots": None, "pooled": False, "seed": 0}
        parts.append(partition("my_split:mine", {}, labels=np.zeros(10, np.int64), clients=1, **keys))
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
    assert [len(part.indices) for part in parts] == [5, 10]


def test_iid_is_the_cut_of_flwr_datasets() -> None:
    order = np.random.default_rng(0).permutation(len(LABELS))
    theirs = IidPartitioner(7)
    theirs.dataset = Dataset.from_dict({"index": order})
    ours = split("iid", clients=7)
    for pid in range(7):
        assert np.array_equal(ours.client(pid), np.sort(theirs.load_partition(pid)["index"][:]))
