"""The only private Flower names fedsim uses, behind one version check.

Everything else imports from `flwr.app`, `flwr.clientapp` and `flwr.serverapp`. `tests/test_flwr.py`
fails loudly when a new Flower moves one of these names.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from io import BytesIO
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
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
    "LazyArray",
    "Run",
    "TaskIdentity",
    "acting_as_server",
    "numpy_view",
    "private_copy",
    "quiet",
    "set_message_id",
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


class LazyArray(Array):
    """A Flower Array that keeps the numpy buffer and runs `np.save` only if somebody reads `.data`.

    Inside one machine nobody does, which spares a serialisation and a deserialisation per array and
    message. `.data` is byte-identical to what `Array(ndarray)` would hold.
    """

    def __init__(self, values: NDArray[Any]) -> None:
        view = np.asarray(values).view()
        view.flags.writeable = False
        self.__dict__.update(
            dtype=str(view.dtype), shape=tuple(view.shape), stype="numpy.ndarray", values=view
        )

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The `np.save` form, made on first use."""
        if "_saved" not in self.__dict__:
            buffer = BytesIO()
            np.save(buffer, self.__dict__["values"], allow_pickle=False)
            self.__dict__["_saved"] = buffer.getvalue()
        saved: bytes = self.__dict__["_saved"]
        return saved

    def numpy(self) -> NDArray[Any]:
        """A private, writable copy, as Flower's own Array gives."""
        return np.array(self.__dict__["values"])

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


def numpy_view(array: Array) -> NDArray[Any]:
    """The values of an Array without a copy where possible (read-only: do not write to it)."""
    values: NDArray[Any] | None = array.__dict__.get("values")
    return array.numpy() if values is None else values


def private_copy(content: RecordDict) -> RecordDict:
    """The same records in new containers, so that a client's changes reach nobody else.

    Arrays themselves are shared: `.numpy()` hands out a private copy of the values.
    """
    copied = RecordDict()
    for key, record in content.items():
        if isinstance(record, ArrayRecord):
            copied[key] = _array_record(dict(record.items()))
        else:
            values: dict[str, Any] = {k: list(v) if isinstance(v, list) else v for k, v in record.items()}
            copied[key] = MetricRecord(values) if isinstance(record, MetricRecord) else ConfigRecord(values)
    return copied


def _array_record(arrays: dict[str, Array]) -> ArrayRecord:
    record = ArrayRecord()
    for name, array in arrays.items():
        record[name] = array
    return record


def with_content(message: Message, content: RecordDict) -> Message:
    """The same message (same metadata) with another content."""
    return Message(content, metadata=message.metadata)  # type: ignore[call-overload, no-any-return]


def with_error(message: Message, reason: str) -> Message:
    """The same message (same metadata) as an error reply."""
    error = Error(ErrorCode.UNKNOWN, reason)
    return Message(error, metadata=message.metadata)  # type: ignore[call-overload, no-any-return]


def set_message_id(message: Message, message_id: str) -> None:
    """What a SuperLink does to a message that it accepts."""
    message.metadata.__dict__["_message_id"] = message_id


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
