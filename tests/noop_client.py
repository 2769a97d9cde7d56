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


def says(task: Task, /, *, client: int, key: str = "loss", value: float = float("nan")) -> ClientApp:
    """Clients that change nothing, one of which says something of its own of the model.

    Args:
        client: which one.
        key: metric of its evaluations and of its training.
        value: of the metric.
    """
    app = make(task)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        who = int(context.node_config["partition-id"])
        metrics = {messages.EXAMPLES: 10, "accuracy": 0.5 + who / 10, "loss": 1.0 + who}
        return messages.reply(message, None, {**metrics, key: value} if who == client else metrics)

    return app
