"""What can watch a run. A hook never changes it; the run folder and the live display are hooks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message

from fedsim.config import Experiment


@dataclass
class Round:
    """One line of `metrics.jsonl`: a finished round (round 0 is the state before training).

    Attributes:
        number: of the round.
        accuracy: of the shared state on the test data, or the mean over clients of their own models;
            None in rounds without evaluation.
        loss: likewise.
        train_loss: example-weighted mean of the clients' training losses; None in round 0.
        clients: usable replies.
        refused: clients whose reply could not be used.
        bytes_up: array bytes sent by clients so far.
        bytes_down: array bytes sent to clients so far.
        seconds: wall time of this round.
        extra: other metrics (validation, spread over clients, what a strategy reports).
    """

    number: int
    accuracy: float | None = None
    loss: float | None = None
    train_loss: float | None = None
    clients: int = 0
    refused: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """Flat, without what is missing."""
        row = {"round": self.number, **{k: v for k, v in vars(self).items() if k not in ("number", "extra")}}
        return {k: v for k, v in {**row, **self.extra}.items() if v is not None}


class Hook:
    """Watches a run; every method does nothing unless overridden."""

    def start(self, experiment: Experiment, first_round: int) -> None:
        """The run begins, or goes on, with round `first_round`."""

    def data(self, card: Sequence[str]) -> None:
        """What the run's data are, in lines; told after `start` where the data are the user's own."""

    def sent(self, server_round: int, phase: str, count: int) -> None:
        """`count` messages of a phase (`train`, `evaluate`) go out."""

    def reply(self, server_round: int, phase: str, client: int, message: Message) -> None:
        """A client answered (or failed: `message.has_error()`)."""

    def round(self, result: Round) -> None:
        """A round is finished."""

    def notice(self, text: str) -> None:
        """Something the user should know."""

    def finish(self, summary: dict[str, Any]) -> None:
        """The run is finished."""

    def close(self) -> None:
        """The run ended, one way or another (always called)."""
