"""A client that loads what it gets and answers at once: what is left is the platform's own cost."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp import ClientApp

from fedsim import messages
from fedsim.task import Task


def make(task: Task, /) -> ClientApp:
    """No training."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        arrays = message.content["arrays"]
        assert isinstance(arrays, ArrayRecord)
        task.load(arrays)
        return messages.reply(message, task.shared(), {messages.EXAMPLES: 1, "loss": 0.0})

    return app


def odd(task: Task, /) -> ClientApp:
    """Metrics that a careless client might send."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        metrics = {messages.EXAMPLES: 1, "loss": float("nan"), "round": 999, "lengths": [0.5] * (1 + client)}
        return messages.reply(message, task.initial_payload(), metrics)

    return app
