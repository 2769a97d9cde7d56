"""Selection, exactness on the wire, digests."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from torch import nn

from fedsim import messages, payload
from fedsim._flwr import LazyArray
from fedsim.errors import UserError
from fedsim.payload import Entry


class Net(nn.Module):
    """One layer of everything: dots in names are normal, unicode is allowed."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 2).bfloat16()
        self.bn = nn.BatchNorm1d(2)
        self.kopf_ü = nn.Linear(2, 2)


def test_selection_splits_what_changes() -> None:
    net = Net()
    net.body.requires_grad_(False)
    everything = payload.select(net, ("",))
    names = [e.name for e in everything.shared]
    assert "body.weight" not in names
    assert {"bn.weight", "bn.running_mean", "bn.num_batches_tracked", "kopf_ü.bias"} <= set(names)
    assert not everything.personal
    still = payload.select(net, ())
    assert "bn.running_mean" not in [e.name for e in still.shared]
    split = payload.select(net, ("",), ["bn.*", "kopf_?.bias"])
    assert [e.name for e in split.personal] == [
        "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked", "kopf_ü.bias",
    ]  # fmt: skip
    assert [e.name for e in split.shared] == ["kopf_ü.weight"]
    with pytest.raises(UserError, match=r"'head\.\*' matches nothing"):
        payload.select(net, ("",), ["head.*"])


def test_round_trip_is_exact_for_every_dtype() -> None:
    net = Net()
    selection = payload.select(net, ("",))
    state = net.state_dict()
    before = {k: v.clone() for k, v in state.items()}
    record = payload.to_record(state, selection.shared)
    assert record["body.weight"].dtype == "float32"  # every strategy can do arithmetic on it
    with torch.no_grad():
        for value in state.values():
            value.zero_()
    payload.load_record(record, selection.shared, state)
    for name, value in before.items():
        assert torch.equal(state[name], value), name
        assert state[name].dtype == value.dtype


@pytest.mark.parametrize("half", [True, False])
def test_packing_is_exact_and_makes_one_array_per_dtype(half: bool) -> None:
    net = Net()
    selection = payload.select(net, ("",))
    record = payload.to_record(net.state_dict(), selection.shared)
    content = RecordDict(
        {"arrays": record, "metrics": MetricRecord({"a": 1}), "config": ConfigRecord({"b": "x"})}
    )
    names = frozenset(e.name for e in selection.shared if e.dtype == "bfloat16") if half else frozenset()
    packed = payload.pack(content, names)
    assert len(packed["arrays"]) == (3 if half else 2)
    assert messages.nbytes(packed) == messages.nbytes(content, names)
    if half:
        assert messages.nbytes(packed) == sum(e.nbytes for e in selection.shared)
    restored = payload.unpack(packed)
    assert list(restored["arrays"]) == list(record)
    for name in record:
        assert restored["arrays"][name].numpy().tobytes() == record[name].numpy().tobytes()
        assert restored["arrays"][name].shape == record[name].shape
    assert dict(restored["metrics"]) == {"a": 1}
    assert payload.unpack(content) is content


def test_packed_description_is_small() -> None:
    """Two hundred names of a Transformer cost about a kilobyte, not eight."""
    values = {
        f"backbone.transformer.resblocks.{i}.attn.in_proj_bias": np.zeros(4, np.float32) for i in range(200)
    }
    packed = payload.pack(RecordDict({"arrays": messages.arrays_of(values)}))
    assert len(packed["layout"]["layout"]) < 1500  # type: ignore[index]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"a": np.zeros(2, np.float32)}, "missing"),
        ({"a": np.zeros(2, np.float32), "b": np.zeros(1, np.float32), "c": np.zeros(1)}, "unexpected"),
        ({"a": np.zeros(3, np.float32), "b": np.zeros(1, np.float32)}, r"'a' arrived as float32\[3\]"),
        ({"a": np.zeros(2), "b": np.zeros(1, np.float32)}, "'a' arrived as float64"),
    ],
)
def test_what_does_not_fit_is_refused(values: dict[str, np.ndarray], message: str) -> None:
    entries = (Entry("a", (2,), "float32"), Entry("b", (1,), "float32"))
    with pytest.raises(ValueError, match=message):
        payload.check(messages.arrays_of(values), entries)


def test_conform_brings_a_strangers_dtypes_back() -> None:
    entries = (Entry("n", (), "int64"), Entry("h", (2,), "bfloat16"), Entry("w", (1,), "float32"))
    values = {"n": np.array(2.7), "h": np.array([1.001, 3.0]), "w": np.array([0.1])}
    fixed = messages.views_of(payload.conform(messages.arrays_of(values), entries))
    assert fixed["n"].dtype == np.int64
    assert fixed["n"] == 3
    expected = torch.tensor([1.001, 3.0]).bfloat16().float().numpy()
    np.testing.assert_array_equal(fixed["h"], expected)
    assert fixed["w"].dtype == np.float32
    with pytest.raises(UserError, match="missing h, w; unexpected none"):
        payload.conform(messages.arrays_of({"n": np.array(1)}), entries)


def test_digests_tell_names_shapes_dtypes_and_values_apart() -> None:
    base = {"a": np.arange(4, dtype=np.float32)}
    others = [
        {"b": base["a"]},
        {"a": base["a"].reshape(2, 2)},
        {"a": base["a"].astype(np.int32)},
        {"a": base["a"] + 1},
        {},
    ]
    digests = {payload.digest(x) for x in [base, *others]}
    assert len(digests) == 6
    assert payload.digest({"x": base["a"], "y": base["a"]}) == payload.digest(
        {"y": base["a"], "x": base["a"]}
    )
    net = Net()
    changing = payload.select(net, ()).changing
    first = payload.frozen_digest(net, changing)
    with torch.no_grad():
        net.kopf_ü.weight.add_(1)
    assert payload.frozen_digest(net, changing) == first  # it changes, so it is not frozen
    net.bn.running_mean.add_(1)
    assert payload.frozen_digest(net, changing) != first


def test_lazy_arrays_are_flowers_arrays_byte_for_byte() -> None:
    import pickle

    from flwr.app import Array

    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    lazy, stock = LazyArray(values), Array(values)
    assert lazy.data == stock.data
    assert lazy == stock
    assert lazy.numpy().flags.writeable
    assert not np.shares_memory(lazy.numpy(), values)
    assert np.shares_memory(messages.views_of(messages.arrays_of({"a": values}))["a"], values)
    again = pickle.loads(pickle.dumps(lazy))
    assert again.data == stock.data
    assert again.numpy().tolist() == values.tolist()
