"""The only private Flower names fedsim uses, behind one version check.

Everything else imports from `flwr.app`, `flwr.clientapp` and `flwr.serverapp`. `tests/test_flwr.py`
fails loudly when a new Flower moves one of these names.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from io import BytesIO
from pickle import PickleBuffer
from typing import Any, cast

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    Metadata,
    MetricRecord,
    RecordDict,
)
from flwr.app.message import typeddict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.server.client_manager import SimpleClientManager
from flwr.serverapp import Grid
from flwr.serverapp.strategy import strategy_utils
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from numpy.typing import NDArray

SUPPORTED = ((1, 41), (1, 43))

_found = tuple(int(part) for part in version("flwr").split(".")[:2])
if not SUPPORTED[0] <= _found < SUPPORTED[1]:
    raise ImportError(
        f"fedsim works with flwr >=1.41,<1.43 but {version('flwr')} is installed; "
        "pip install 'flwr[simulation]>=1.41,<1.43'"
    )

__all__ = [
    "SUPERLINK_NODE_ID",
    "BareGrid",
    "ErrorCode",
    "HollowArray",
    "LazyArray",
    "Run",
    "TaskIdentity",
    "acting_as_server",
    "data_of",
    "lazy_codec",
    "numpy_view",
    "private_copy",
    "quiet",
    "record_dict",
    "sendable",
    "set_message_id",
    "set_source",
    "unavailable",
    "waits_refused",
    "with_content",
    "with_error",
]


class BareGrid(Grid):
    """Flower's Grid less the one method that it has deprecated but still declares abstract."""

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Make an instruction (Flower wants `Message(...)` instead)."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)


Record = ArrayRecord | MetricRecord | ConfigRecord

_PLAIN = "biufc"  #: kinds of dtypes whose names say everything


class LazyArray(Array):
    """A Flower Array that keeps the numpy buffer and runs `np.save` only if somebody reads `.data`.

    Inside one machine nobody does, which spares a serialisation and a deserialisation per array and
    message. `.data` is byte-identical to what `Array(ndarray)` would hold.
    """

    def __init__(self, values: NDArray[Any]) -> None:
        view = np.asarray(values).view()
        view.flags.writeable = False
        self.__dict__.update(dtype=_name_of(view.dtype), shape=view.shape, stype="numpy.ndarray", values=view)

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The `np.save` form, made on first use."""
        return _saved(self)

    def numpy(self) -> NDArray[Any]:
        """A private, writable copy, as Flower's own Array gives."""
        return np.array(self.__dict__["values"])

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """The values alone, out of band and without numpy's detour where that is possible."""
        values: NDArray[Any] = self.__dict__["values"]
        if protocol < 5 or not values.flags.c_contiguous or values.dtype.kind not in _PLAIN:
            return type(self), (values,)
        return _lazy_of, (PickleBuffer(values.data), self.dtype, self.shape)

    def deflate(self) -> bytes:
        """The wire form, under the name of Flower's class (the header carries it)."""
        return Array(self.dtype, self.shape, self.stype, self.data).deflate()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Array):
            return NotImplemented
        return (self.dtype, self.shape, self.stype, self.data) == (
            other.dtype,
            other.shape,
            other.stype,
            other.data,
        )

    __hash__ = None  # type: ignore[assignment]


def _lazy_of(buffer: Any, dtype: str, shape: tuple[int, ...]) -> LazyArray:
    return LazyArray(np.ndarray(shape, dtype, buffer))


def _saved(array: Array) -> bytes:
    """The `np.save` form of an Array that keeps its values, made once."""
    kept = array.__dict__
    if "_saved" not in kept:
        buffer = BytesIO()
        np.save(buffer, kept["values"], allow_pickle=False)
        kept["_saved"] = buffer.getvalue()
    saved: bytes = kept["_saved"]
    return saved


@lru_cache(maxsize=256)
def _name_of(dtype: np.dtype[Any]) -> str:
    """`str(dtype)`, which takes numpy 20 microseconds."""
    return str(dtype)


class _Unnamed:
    """In place of `Callable`, of which Flower's records make two new types for every item, to no end."""

    def __getitem__(self, item: Any) -> None:
        """No type."""


@contextmanager
def lazy_codec() -> Iterator[None]:
    """Inside, what a client app makes Arrays of is copied instead of going through `np.save`.

    For the foreign apps that our engines run: `ArrayRecord(model.state_dict())` then costs one copy, not
    four. An Array still has `.data` for whoever reads it; `sendable` turns what leaves the context into
    LazyArrays. It may be entered again inside.
    """
    if "__getattr__" in Array.__dict__:
        yield
        return
    stock = Array.__dict__["from_numpy_ndarray"]

    def from_numpy_ndarray(cls: type[Array], ndarray: NDArray[Any]) -> Array:
        if type(ndarray) is not np.ndarray or not ndarray.dtype.isnative or ndarray.dtype.kind not in _PLAIN:
            made: Array = stock.__func__(cls, ndarray)
            return made
        return LazyArray(ndarray.copy("F" if ndarray.flags.fnc else "C"))  # the order that np.save keeps

    def saved_of(array: Array, name: str) -> bytes:
        if name != "data" or "values" not in array.__dict__:
            raise AttributeError(name)
        return _saved(array)

    Array.from_numpy_ndarray = classmethod(from_numpy_ndarray)  # type: ignore[method-assign, assignment]
    Array.__getattr__ = saved_of  # type: ignore[attr-defined]
    typed: Any = typeddict
    named, typed.Callable = typed.Callable, _Unnamed()
    try:
        yield
    finally:
        typed.Callable = named
        Array.from_numpy_ndarray = stock  # type: ignore[method-assign]
        del Array.__getattr__  # type: ignore[attr-defined]


def sendable(content: RecordDict) -> RecordDict:
    """The same records with every array as a numpy buffer, which pickles out of band, where it can be one."""
    return _with_arrays(content, lazy)


def _with_arrays(content: RecordDict, change: Callable[[Array], Array]) -> RecordDict:
    """The same records with every Array changed."""
    out = dict(data_of(content))
    for key, record in out.items():
        if isinstance(record, ArrayRecord):
            out[key] = array_record({name: change(array) for name, array in data_of(record).items()})
    return record_dict(out)


class HollowArray(Array):
    """What is left of an Array whose values were summed up elsewhere: its dtype and shape."""

    def __init__(self, dtype: str, shape: tuple[int, ...], stype: str) -> None:
        self.__dict__.update(dtype=dtype, shape=shape, stype=stype)

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """Not there."""
        raise ValueError("the values of this reply were summed up where it was made and are gone")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.dtype, self.shape, self.stype)


def hollow(content: RecordDict) -> RecordDict:
    """The same records without the values of arrays: their names, dtypes and shapes are left."""
    return _with_arrays(content, lambda array: HollowArray(array.dtype, tuple(array.shape), array.stype))


def hollow_message(message: Message) -> Message:
    """The same message without the values of its arrays."""
    return with_content(message, hollow(message.content)) if message.has_content() else message


def numpy_view(array: Array) -> NDArray[Any]:
    """The values of an Array without a copy (read-only: do not write to it).

    Raises:
        ValueError: they are not what `np.save` writes. It is not tried to load them: what a header says may
            take any amount of memory.
    """
    values: NDArray[Any] | None = array.__dict__.get("values")
    if values is None:
        values = saved_view(array)
    if values is None:
        raise ValueError("not an array as np.save writes it")
    return values


def saved_view(array: Array) -> NDArray[Any] | None:
    """The values inside `.data` as `np.save` wrote them, uncopied; None where they are anything else."""
    data = array.data
    head = 10 + int.from_bytes(data[8:10], "little")  # magic, version 1.0, length of what follows
    if array.stype != "numpy.ndarray" or data[:8] != b"\x93NUMPY\x01\x00" or len(data) < head:
        return None
    try:
        shape, fortran, dtype = _npy_header(data[:head])
        if dtype.hasobject or len(data) != head + math.prod(shape) * dtype.itemsize:
            return None
        return np.ndarray(shape, dtype, data, head, order="F" if fortran else "C")
    except (ValueError, TypeError, RecursionError, MemoryError):  # a header from outside may be anything
        return None


@lru_cache(maxsize=4096)
def _npy_header(head: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    file = BytesIO(head)
    np.lib.format.read_magic(file)
    return np.lib.format.read_array_header_1_0(file)


def lazy(array: Array) -> Array:
    """The same Array with its values as a numpy buffer, where `.data` would come out byte-identical."""
    if isinstance(array, LazyArray | HollowArray):
        return array
    if "values" in array.__dict__:
        return LazyArray(array.__dict__["values"])
    values = saved_view(array)
    if values is None or not values.dtype.isnative:  # pickling would turn its bytes round
        return array
    if str(values.dtype) != array.dtype or tuple(values.shape) != tuple(array.shape):
        return array
    return LazyArray(values)


def private_copy(content: RecordDict) -> RecordDict:
    """The same records in new containers, so that a client's changes reach nobody else.

    Arrays themselves are shared: `.numpy()` hands out a private copy of the values.
    """
    return record_dict({key: _private_record(record) for key, record in data_of(content).items()})


def _private_record(record: Record) -> Record:
    values = data_of(record)
    if isinstance(record, ArrayRecord):
        return array_record(values.copy())
    copied = MetricRecord() if isinstance(record, MetricRecord) else ConfigRecord()
    copied.__dict__["_data"] = {k: list(v) if isinstance(v, list) else v for k, v in values.items()}
    return copied


def owned(content: RecordDict) -> RecordDict:
    """The same records with arrays of their own, where they are views of something larger."""
    return _with_arrays(content, lambda a: LazyArray(a.numpy()) if isinstance(a, LazyArray) else a)


def data_of(record: RecordDict | Record) -> dict[str, Any]:
    """The dict inside of a record: going through the record itself takes several times as long."""
    data: dict[str, Any] = record.__dict__["_data"]
    return data


def record_dict(records: dict[str, Record]) -> RecordDict:
    """A RecordDict around a dict of records; filling one entry by entry checks each of them."""
    made = RecordDict()
    made.__dict__["_data"] = records
    return made


def array_record(arrays: dict[str, Array]) -> ArrayRecord:
    """A record around a dict of Arrays; filling one entry by entry checks each of them in 5 microseconds."""
    record = ArrayRecord()
    record.__dict__["_data"] = arrays
    return record


def with_content(message: Message, content: RecordDict) -> Message:
    """The same message (same metadata) with another content."""
    return _message(message.metadata, content)


def _message(metadata: Metadata, content: RecordDict) -> Message:
    """`Message(content, metadata=metadata)`, without ten checks of what is known."""
    message = Message.__new__(Message)
    message.__dict__.update(_metadata=metadata, _content=content, _error=None)
    return message


def with_error(message: Message, reason: str) -> Message:
    """The same message (same metadata) as an error reply."""
    error = Error(ErrorCode.UNKNOWN, reason)
    return Message(error, metadata=message.metadata)  # type: ignore[call-overload, no-any-return]


def unavailable(message_id: str, run_id: int, reason: str) -> Message:
    """The error reply that Flower makes itself for a message that it does not have."""
    metadata = Metadata(
        run_id=run_id,
        message_id=f"{message_id}-unavailable",
        src_node_id=SUPERLINK_NODE_ID,
        dst_node_id=SUPERLINK_NODE_ID,
        reply_to_message_id=message_id,
        group_id="",
        created_at=time.time(),
        ttl=0,
        message_type="system",
    )
    error = Error(ErrorCode.MESSAGE_UNAVAILABLE, reason)
    return Message(error, metadata=metadata)  # type: ignore[call-overload, no-any-return]


def posted(message: Message, content: RecordDict) -> Message:
    """A message as it is now, with a content: whatever its sender does to it later is nobody else's."""
    metadata = Metadata.__new__(Metadata)
    metadata.__dict__.update(message.metadata.__dict__)
    return _message(metadata, content)


def metadata_row(message: Message) -> tuple[Any, ...]:
    """A message's metadata as a plain tuple, which pickles in half a microsecond."""
    return tuple(message.metadata.__dict__.values())


def message_of(row: tuple[Any, ...], content: RecordDict) -> Message:
    """The message with a metadata row and a content."""
    metadata = Metadata.__new__(Metadata)
    metadata.__dict__.update(zip(_METADATA_FIELDS, row, strict=True))
    return _message(metadata, content)


#: attributes of a message's metadata, in order
_METADATA_FIELDS = tuple(
    Message(RecordDict(), metadata=Metadata(1, "", 1, 1, "", "", 0.0, 1.0, "train")).metadata.__dict__  # type: ignore[call-overload]
)


def set_message_id(message: Message, message_id: str) -> None:
    """What a SuperLink does to a message that it accepts."""
    message.metadata.__dict__["_message_id"] = message_id


def set_source(message: Message, node: int) -> None:
    """Say whose message it is."""
    message.metadata.__dict__["_src_node_id"] = node


@contextmanager
def acting_as_server(run_id: int) -> Iterator[None]:
    """Give this process the identity that Flower's Message constructor asks for, then restore it."""
    names = ("_run_id", "_node_id", "_task_id")
    before = {name: getattr(TaskIdentity, name) for name in names}
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, SUPERLINK_NODE_ID, 0
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(TaskIdentity, name, value)


@contextmanager
def waits_refused(nodes: int, error: Callable[[], Exception]) -> Iterator[None]:
    """Inside, Flower's own waits for nodes raise where there are too few, instead of waiting for ever.

    Args:
        nodes: how many there are, now and later.
        error: what to raise.
    """
    sampling, managing = cast(Any, strategy_utils), cast(Any, SimpleClientManager)
    pause, wait_for = sampling.sleep, managing.wait_for

    def no_pause(_: float) -> None:
        raise error()

    def checked(manager: SimpleClientManager, num_clients: int, timeout: int = 86400) -> bool:
        if num_clients > nodes:
            raise error()
        return bool(wait_for(manager, num_clients, timeout))

    # `sample_nodes` sleeps only where it waits
    sampling.sleep, managing.wait_for = no_pause, checked
    try:
        yield
    finally:
        sampling.sleep, managing.wait_for = pause, wait_for


def context(
    run_id: int, node_id: int, node_config: dict[str, Any], state: RecordDict, run_config: dict[str, Any]
) -> Context:
    """A Flower Context."""
    return Context(
        run_id=run_id, node_id=node_id, node_config=node_config, state=state, run_config=run_config
    )


@contextmanager
def quiet(enabled: bool = True) -> Iterator[None]:
    """Silence Flower's console log below ERROR."""
    logger = logging.getLogger("flwr")
    before = logger.level
    if enabled:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
