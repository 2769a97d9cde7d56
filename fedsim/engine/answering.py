"""One client answers one message, in this process, with whatever it kept from its earlier messages."""

from __future__ import annotations

import sys
import traceback
from typing import Any

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedsim import _flwr
from fedsim.engine.clock import TimedOut, limited_time

#: records in which a kept state holds the configs of a context, once a client has changed them
_NODE_CONFIG, _RUN_CONFIG = "context.node-config", "context.run-config"


def answer(
    client_app: ClientApp,
    message: Message,
    client: int,
    num_clients: int,
    state: RecordDict | None,
    run_config: dict[str, Any],
    timeout: float | None = None,
) -> tuple[Message | None, RecordDict]:
    """Let one client answer one message, in this process.

    Args:
        client_app: the app.
        message: the instruction.
        client: partition id.
        num_clients: number of nodes.
        state: what the client kept, or None.
        run_config: what it finds in `context.run_config` unless it has changed that.
        timeout: seconds that the client has.

    Returns:
        The reply, an error reply with the traceback if the client raised, or None if it took too long; and
        what the client keeps (what it kept before if it raised or took too long).
    """
    before = state if state is not None else RecordDict()
    node_config = {"partition-id": client, "num-partitions": num_clients}
    context = _context(message, before, node_config, run_config)
    delivered = _flwr.with_content(message, _flwr.private_copy(message.content))
    try:
        with _flwr.lazy_codec():
            with limited_time(timeout):
                reply = client_app(delivered, context)
            if not isinstance(reply, Message):
                raise TypeError(f"the client app returned {type(reply).__name__}, not a Message")
            if reply.metadata.reply_to_message_id != message.metadata.message_id:
                raise ValueError("the client app returned a Message that is no reply to the one it got")
            if reply.has_content():
                reply = _flwr.with_content(reply, _flwr.sendable(reply.content))
            after = _kept(context, node_config, run_config)
    except TimedOut:
        return None, before
    except (Exception, SystemExit) as error:
        trace = "".join(traceback.format_exception(error)).rstrip()
        reason = f"client {client}: {type(error).__name__}: {error}\n{trace}"
        code = _flwr.ErrorCode.CLIENT_APP_RAISED_EXCEPTION
        _release_gpu(error)
        return Message(Error(code, reason), reply_to=message), before
    return reply, after


def _context(
    message: Message, kept: RecordDict, node_config: dict[str, Any], run_config: dict[str, Any]
) -> Context:
    """The client's context as it left it."""
    state = _flwr.private_copy(kept)
    records = _flwr.data_of(state)
    changed_node, changed_run = records.pop(_NODE_CONFIG, None), records.pop(_RUN_CONFIG, None)
    return _flwr.context(
        run_id=message.metadata.run_id,
        node_id=message.metadata.dst_node_id,
        node_config=dict(node_config if changed_node is None else changed_node),
        state=state,
        run_config=dict(run_config if changed_run is None else changed_run),
    )


def _kept(context: Context, node_config: dict[str, Any], run_config: dict[str, Any]) -> RecordDict:
    """What is left of a context: its state, and its configs where they are not the usual ones."""
    state = _flwr.sendable(context.state)
    if context.node_config != node_config:
        state[_NODE_CONFIG] = ConfigRecord(dict(context.node_config))
    if context.run_config != run_config:
        state[_RUN_CONFIG] = ConfigRecord(dict(context.run_config))
    return state


def is_empty(state: RecordDict) -> bool:
    """True when a client keeps nothing."""
    return not any(len(record) for record in state.values())


def _release_gpu(error: BaseException) -> None:
    """After a GPU ran out of memory, give back what torch keeps cached: the next client needs it."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
