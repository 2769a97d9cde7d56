"""The private names of Flower that fedsim leans on: this file fails first when Flower moves one."""

from __future__ import annotations

import inspect
import subprocess
import sys

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedsim import _flwr
from fedsim.engine import objects


def test_private_names_are_where_they_were() -> None:
    assert _flwr.SUPERLINK_NODE_ID == 1
    assert _flwr.ErrorCode.CLIENT_APP_RAISED_EXCEPTION == 2
    assert _flwr.Run.create_empty(5).run_id == 5
    for name in ("_run_id", "_node_id", "_task_id"):
        assert hasattr(_flwr.TaskIdentity, name)


def test_a_record_is_a_dict_behind_checks() -> None:
    array = Array(np.ones(2))
    ours, stock = _flwr.array_record({"w": array}), ArrayRecord()
    stock["w"] = array
    assert ours.is_dirty
    assert ours == stock
    assert ours.object_id == stock.object_id


def test_copies_are_what_flower_would_make() -> None:
    """Records and messages that are put together without Flower's checks."""
    content = RecordDict({"arrays": ArrayRecord([np.ones(2)])})
    content["config"] = ConfigRecord({"lr": 0.1, "layers": [1, 2]})
    content["metrics"] = MetricRecord({"loss": 0.5, "losses": [0.5, 0.25]})
    copied = _flwr.private_copy(content)
    assert copied == content
    assert copied.is_dirty
    assert copied.object_id == content.object_id
    assert {key: type(record) for key, record in copied.items()} == {k: type(v) for k, v in content.items()}
    for key in ("config", "metrics"):
        assert vars(copied[key]).keys() == vars(content[key]).keys()
    copied["config"]["layers"].append(3)
    copied["metrics"]["more"] = 1
    del copied["arrays"]["0"]
    assert content["config"] == {"lr": 0.1, "layers": [1, 2]}
    assert "more" not in content["metrics"]
    assert len(content["arrays"]) == 1
    with pytest.raises(TypeError):
        copied["config"]["lr"] = {}
    with _flwr.acting_as_server(17):
        message = Message(RecordDict(), dst_node_id=3, message_type="train")
    stock = Message(content, metadata=message.metadata)  # type: ignore[call-overload]
    ours = _flwr.with_content(message, content)
    assert vars(ours) == vars(stock)
    assert ours.is_dirty
    assert ours.has_content()
    assert not ours.has_error()


def test_what_is_kept_holds_no_larger_memory() -> None:
    whole = np.arange(1000.0)
    content = RecordDict({"arrays": _flwr.array_record({"w": _flwr.LazyArray(whole[:5])})})
    content["config"] = ConfigRecord({"lr": 0.1})
    kept = _flwr.owned(content)
    assert kept == content
    assert not np.shares_memory(_flwr.numpy_view(kept["arrays"]["w"]), whole)


def test_the_abstract_grid_is_what_we_implement() -> None:
    assert sorted(Grid.__abstractmethods__) == [
        "create_message",
        "get_node_ids",
        "pull_messages",
        "push_messages",
        "run",
        "send_and_receive",
        "set_run",
    ]
    assert list(inspect.signature(ClientApp.__call__).parameters) == ["self", "message", "context"]
    assert "series_id" in inspect.signature(Context.__init__).parameters


def test_identity_is_set_and_restored() -> None:
    before = _flwr.TaskIdentity._run_id
    with _flwr.acting_as_server(17):
        message = Message(RecordDict(), dst_node_id=3, message_type="train")
        assert message.metadata.run_id == 17
        assert message.metadata.src_node_id == 1
        _flwr.set_message_id(message, "abc")
        assert message.metadata.message_id == "abc"
        assert Message(RecordDict(), reply_to=message).metadata.reply_to_message_id == "abc"
    assert _flwr.TaskIdentity._run_id == before


def test_lazy_arrays_survive_flowers_object_store() -> None:
    """Deflated for the wire, an Array made lazily has the object id of a stock one."""
    values = np.arange(5, dtype=np.float32)
    assert _flwr.LazyArray(values).object_id == Array(values).object_id


@pytest.mark.parametrize(
    "values",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.arange(6.0).reshape(2, 3).T,
        np.arange(12).reshape(3, 4)[:, ::2],
        np.array(3, dtype=np.int64),
        np.zeros((0, 4), np.float16),
        np.arange(4, dtype=">f4"),
    ],
    ids=["c", "fortran", "strided", "scalar", "empty", "big-endian"],
)
def test_the_lazy_codec_changes_no_byte(values: np.ndarray) -> None:
    stock = Array(values)
    with _flwr.lazy_codec():
        both = ArrayRecord({"made": Array(values), "ready": Array.from_numpy_ndarray(values)})
        assert [a.data for a in both.values()] == [stock.data, stock.data]
        kept = _flwr.sendable(RecordDict({"arrays": both}))["arrays"]
    again = objects.unpack(objects.pack(kept))
    for array in (*kept.values(), *again.values()):
        assert (array.dtype, array.shape, array.stype) == (stock.dtype, stock.shape, stock.stype)
        assert array.data == stock.data
        np.testing.assert_array_equal(array.numpy(), values)
    assert not hasattr(Array, "__getattr__")
    assert "values" not in Array(values).__dict__


def test_the_lazy_codec_keeps_a_copy() -> None:
    """A client goes on writing to the arrays that it made a record of."""
    values = np.zeros(3, np.float32)
    with _flwr.lazy_codec():
        record = ArrayRecord([values])
        values += 1
    assert _flwr.sendable(RecordDict({"arrays": record}))["arrays"]["0"].numpy().tolist() == [0, 0, 0]
    torch_made = torch.zeros(3)
    with _flwr.lazy_codec():
        record = ArrayRecord({"w": torch_made})
        torch_made += 1
    assert record["w"].numpy().tolist() == [0, 0, 0]


def test_import_fedsim_is_light() -> None:
    heavy = ("torch", "flwr", "ray", "numpy", "pydantic")
    code = f"import sys, fedsim, fedsim.cli; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
