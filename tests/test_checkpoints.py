"""Checkpoints: exact round trip, atomic, damage is noticed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from fedsim.checkpoints import Unstorable, load, save
from fedsim.errors import UserError
from fedsim.files import write_atomic
from fedsim.messages import arrays_of


def tree() -> dict[str, object]:
    return {
        "none": None,
        "text": "ü",
        "number": 0.1,
        "infinite": float("inf"),
        "bytes": b"\0\xff",
        "scalar": np.float32(0.1),
        "zero-d": np.array(3),
        "list": [1, (2, np.zeros((2, 0)))],
        "clients": {
            7: RecordDict({"p.q": arrays_of({"w.ü": np.arange(3.0)}), "m": MetricRecord({"n": [1, 2]})})
        },
        "config": ConfigRecord({"a": "b", "c": b"d"}),
        "empty": {},
    }


def test_round_trip_keeps_types_and_bits(tmp_path: Path) -> None:
    save(tmp_path / "c.safetensors", tree())
    found = load(tmp_path / "c.safetensors")
    assert list(found) == list(tree())
    assert found["none"] is None
    assert found["number"] == 0.1
    assert found["infinite"] == float("inf")
    assert found["bytes"] == b"\0\xff"
    assert type(found["scalar"]) is np.float32
    assert found["zero-d"].shape == ()
    assert found["list"][1][1].shape == (2, 0)
    assert isinstance(found["list"][1], tuple)
    state = found["clients"][7]
    assert isinstance(state, RecordDict)
    assert state["p.q"]["w.ü"].numpy().tolist() == [0.0, 1.0, 2.0]
    assert dict(state["m"]) == {"n": [1, 2]}
    assert dict(found["config"]) == {"a": "b", "c": b"d"}


def test_what_cannot_be_stored_is_named(tmp_path: Path) -> None:
    with pytest.raises(Unstorable, match=r"strategy\.fn"):
        save(tmp_path / "c", {"strategy": {"fn": print}})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "missing"])
def test_damage_is_noticed(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "c.safetensors"
    save(path, {"w": np.arange(1000.0)})
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(data[:-100])
    elif damage == "flipped":
        data[-5] ^= 1
        path.write_bytes(data)
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    with pytest.raises(UserError, match=r"c\.safetensors: damaged"):
        load(path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    write_atomic(path, b"old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
