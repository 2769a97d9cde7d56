"""The client side of unlearning: the run's own client, inside masks, with two more actions.

train                       as ever; pruned channels go back to zero after every step
query.channel_statistics    Σ of channel activations by class, over all that the client has (no gradient)
train.ascent                projected gradient ascent on what is to be forgotten
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor

from clients.training import Recipe, arrays_of, back_propagation, fit, partition_of
from fedsim import messages, registry
from fedsim.building import build_model
from fedsim.models.base import set_train_mode
from fedsim.resident import places
from fedsim.task import Task
from fedsim.unlearning import ascent, graph, masks, scores


def make(task: Task, /, *, base: dict[str, Any] | None = None) -> ClientApp:
    """A client that can prune and forget around the one that the run had.

    Args:
        base: the run's own [client], its `name` among the keys (default: `standard`).
    """
    keys = dict(base or {})
    inner: ClientApp = registry.resolve("clients", keys.pop("name", "standard")).target(task, **keys)
    app = ClientApp()
    limits = Limits(task)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        task.constrain = limits.of(message)
        try:
            return inner(message, context)
        finally:
            task.constrain = None

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return inner(message, context)

    @app.query("channel_statistics")
    def channel_statistics(message: Message, context: Context) -> Message:
        return _statistics(task, limits.layers, message, partition_of(context))

    @app.train("ascent")
    def ascend(message: Message, context: Context) -> Message:
        return _ascent(task, message, partition_of(context))

    return app


class Limits:
    """Turns the masks of an instruction into what to call after each step.

    Args:
        task: its model is traced once.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        sample = torch.from_numpy(np.array(task.data.arrays.train_x[:1])).to(task.device)
        self.layers = graph.prunable(task.model, sample)
        self.fills = {name: masks.entries(task.model, layer) for name, layer in self.layers.items()}
        entries = {entry for fill in self.fills.values() for entry in fill}
        self.places = {name: place for name, place in places(task.model).items() if name in entries}

    def of(self, message: Message) -> Callable[[], None] | None:
        """Nothing where the instruction has no masks."""
        record = message.content.get(messages.MASKS)
        if not isinstance(record, ArrayRecord):
            return None
        device = self.task.device
        chosen = {
            name: torch.from_numpy(np.array(v)).to(device) for name, v in messages.views_of(record).items()
        }

        def enforce() -> None:
            state = {name: place.tensor for name, place in self.places.items() if place.tensor is not None}
            masks.enforce(state, self.fills, chosen)

        return enforce


def _statistics(task: Task, layers: Mapping[str, graph.Layer], message: Message, who: int) -> Message:
    config: Any = messages.config_of(message)
    started = time.perf_counter()
    task.load(arrays_of(message))
    set_train_mode(task.model, training=False)
    rows = task.data.had(who)
    if config["samples"]:
        rows = rows[torch.randperm(len(rows))[: config["samples"]].numpy()]
    clip, noise = float(config["clip"]), float(config["noise"])
    sums, counts = scores.channel_sums(
        task.network,
        {name: layers[name].channels for name in config["layers"]},
        _batches(task, rows),
        len(task.data.arrays.classes),
        clip=clip,
        model=task.model,
    )
    if noise:
        sums = {name: total + clip * noise * torch.randn_like(total) for name, total in sums.items()}
    found = {f"sums/{name}": total.float().cpu().numpy() for name, total in sums.items()}
    found["counts"] = counts.long().cpu().numpy()
    said = {
        messages.EXAMPLES: len(rows),
        messages.SAMPLES: len(rows),
        messages.SECONDS: time.perf_counter() - started,
    }
    return messages.reply(message, messages.arrays_of(found), said)


def _batches(task: Task, rows: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
    size = task.experiment.settings["evaluation"]["batch_size"]
    for start in range(0, len(rows), size):
        yield task.train_batch(rows[start : start + size])


def _ascent(task: Task, message: Message, who: int) -> Message:
    """The client's own last model is the global one after one more epoch at home: nothing was stored."""
    config: Any = messages.config_of(message)
    started = time.perf_counter()
    task.load(arrays_of(message))
    forgotten = task.data.forgotten
    rows = task.data.had(who) if forgotten is None else forgotten.training.client(who)
    parameters = [p for p in task.model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]
    recipe = Recipe(
        lr=float(config["lr"]),
        epochs=1.0,
        steps=None,
        batch_size=int(config["batch_size"]),
        momentum=0.9,
        weight_decay=0.0,
        clip=float(config["clip"]),
        proximal_mu=0.0,
    )
    tool = torch.optim.SGD(parameters, lr=recipe.lr, momentum=recipe.momentum)
    home = fit(task, rows, recipe, tool, back_propagation, lr_scale=1.0, proximal_mu=0.0)
    own = [p.detach().clone() for p in parameters]
    task.load(arrays_of(message))
    centre = ascent.reference(before, own, float(config["share"]))
    radius = torch.stack([ascent.distance(centre, other) for other in _random_models(task)]).mean() / 3
    with torch.no_grad():
        for parameter, value in zip(parameters, centre, strict=True):
            parameter.copy_(value)
    task.constrain = ascent.projection(parameters, centre, radius, own, float(config["far"]))
    try:
        up = Recipe(**{**vars(recipe), "epochs": float(config["epochs"])})
        said = fit(task, rows, up, tool, _upwards, lr_scale=1.0, proximal_mu=0.0)
    finally:
        task.constrain = None
    said[messages.SAMPLES] += home[messages.SAMPLES]
    said[messages.SECONDS] = time.perf_counter() - started
    return messages.reply(message, task.shared(), said)


def _upwards(task: Task, inputs: Tensor, labels: Tensor) -> Tensor:
    """A step that makes the loss larger."""
    loss = task.loss(task.network, inputs, labels)
    task.backward(-loss)
    return loss.detach()


def _random_models(task: Task, count: int = 10) -> Iterator[list[Tensor]]:
    """Parameters of models that were never trained."""
    for number in range(count):
        other = build_model(task.experiment.replace(f"seed={1000 + number}"), task.data.info)
        yield [p.detach().to(task.device) for p in other.parameters() if p.requires_grad]
