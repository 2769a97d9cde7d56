"""What the metrics of training say that a user must know and no check of weights finds.

A loss that is no number beside finite weights: such a reply is averaged. With fp16 that is a step whose
gradients overflowed, which the loss scaling left out; where it leaves out all of them, nothing was trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedsim import messages
from fedsim.errors import listed_clients
from fedsim.messages import Replies, Roster

_CURE = 'set compute.precision = "bf16" or "fp32", or lower client.lr'


def used_metrics(replies: Replies, refused: Mapping[int, str], who: Roster) -> dict[int, Mapping[str, Any]]:
    """Metrics of the train replies that a strategy used, by client."""
    found: dict[int, Mapping[str, Any]] = {}
    if replies.folded is not None:
        found |= replies.folded.metrics
    for client, message in messages.by_client(replies, who):
        if client not in refused and message.has_content():
            found[client] = dict(message.content.metric_records.get(messages.METRICS, {}))
    return found


def odd_losses(metrics: Mapping[int, Mapping[str, Any]]) -> list[int]:
    """Clients that say a loss that is NaN or infinite."""
    losses = {client: said.get("loss") for client, said in metrics.items()}
    return sorted(c for c, loss in losses.items() if isinstance(loss, float) and not math.isfinite(loss))


def of_losses(server_round: int, clients: Sequence[int], metrics: Mapping[int, Mapping[str, Any]]) -> str:
    """A line that names clients whose loss is no number although their weights are finite."""
    who = listed_clients(clients)
    skipped = any(metrics[client].get(messages.SKIPPED) for client in clients)
    why = (
        f"fp16 left out steps whose gradients overflowed: {_CURE}"
        if skipped
        else "training diverges there: lower client.lr or set client.clip"
    )
    return (
        f"round {server_round}: loss is NaN or infinite at {who}, but the weights are finite and used; {why}"
    )


def of_skipped_steps(history: Sequence[Mapping[str, Any]]) -> str | None:
    """A line for a run of whose steps fp16's loss scaling left out every one; None where some were taken."""
    shares = [row[key] for row in history if (key := f"train_{messages.SKIPPED}") in row]
    if not shares or min(shares) < 1 - 1e-9:  # means over clients, which round
        return None
    return f"nothing was trained: fp16 left out every step, because all gradients overflowed; {_CURE}"
