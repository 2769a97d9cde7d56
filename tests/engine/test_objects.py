"""Instructions on their way to workers: nothing is lost, nothing goes twice, nothing is copied."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedsim import _flwr, messages
from fedsim.engine.objects import assemble, disassemble, parcels_of


def content(**arrays: Array) -> RecordDict:
    record = ArrayRecord()
    for name, array in arrays.items():
        record[name] = array
    return RecordDict({"arrays": record, "config": ConfigRecord({"x": 1})})


def test_shared_arrays_go_once_and_nobody_gets_what_is_anothers() -> None:
    shared, own = np.arange(6.0).reshape(2, 3), [np.full(4, float(k)) for k in range(3)]
    contents = [content(w=Array(shared.copy()), v=_flwr.LazyArray(own[k])) for k in range(3)]
    templates, parcels = disassemble(contents)
    assert sorted(len(p) for p in parcels) == [1, 1, 1, 1]
    assert sum(values.nbytes for parcel in parcels for values in parcel) == 48 + 3 * 32
    for number, template in enumerate(templates):
        needed = {k: parcels[k] for k in parcels_of(template)}
        assert len(needed) == 2
        again = assemble(template, needed)
        assert again == contents[number]
        assert again["arrays"]["w"].data == contents[number]["arrays"]["w"].data


@pytest.mark.parametrize(
    "values",
    [
        np.zeros(()),
        np.zeros((0, 3)),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.array([True, False]),
        np.array(["a", "bc"]),
        np.arange(3, dtype=np.complex64),
    ],
    ids=lambda v: v.dtype.str,
)
def test_any_array_survives_to_the_byte(values: np.ndarray) -> None:
    stock = Array(values)
    view = _flwr.saved_view(stock)
    assert view is not None
    assert not view.flags.writeable
    lazy = _flwr.lazy(stock)
    assert isinstance(lazy, _flwr.LazyArray)
    assert pickle.loads(pickle.dumps(lazy)).data == stock.data
    assert lazy == stock


def test_what_is_no_numpy_array_is_left_alone() -> None:
    odd = [
        Array("float32", (2,), "mine", b"12345678"),
        Array("bfloat16", (2,), "numpy.ndarray", Array(np.zeros(2, np.float32)).data),
        Array("float32", (2,), "numpy.ndarray", b"\x93NUMPY\x01\x00\x05\x00nonsense"),
        Array("float32", (2,), "numpy.ndarray", b""),
        Array(np.arange(4, dtype=">i4")),
    ]
    templates, parcels = disassemble([content(**{f"a{k}": array for k, array in enumerate(odd)})])
    again = assemble(templates[0], dict(enumerate(parcels)))
    for k, array in enumerate(odd):
        assert again["arrays"][f"a{k}"] == array
        assert _flwr.lazy(array) is array


def test_readers_of_arrays_get_what_they_may_write_to() -> None:
    record = messages.arrays_of({"w": np.zeros(3, np.float32)})
    state = record.to_torch_state_dict()
    state["w"] += torch.ones(3)
    assert record["w"].numpy().tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="read-only"):
        messages.views_of(record)["w"][0] = 1


def test_a_hollow_record_has_shapes_but_no_values() -> None:
    left = _flwr.hollow(content(w=Array(np.zeros((2, 3), np.float32))))
    assert messages.nbytes(left) == 24
    assert pickle.loads(pickle.dumps(left))["arrays"]["w"].shape == (2, 3)
    with pytest.raises(ValueError, match="summed up"):
        left["arrays"]["w"].numpy()
