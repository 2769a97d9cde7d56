"""A client factory whose clients cannot train."""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedsim.task import Task


def make(task: Task, /) -> ClientApp:
    """A client that raises."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        raise RuntimeError("the battery is empty")

    return app
