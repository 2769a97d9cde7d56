"""Clients that train with a detacher, and answer what the server asks of their representations.

    train                    the one loop; each batch: loss = CE + λ · penalty(h, z), λ from the server
    query.second_moments     sums of h, z and their products over the client's samples
    query.audit              judge the attackers that came along on samples kept apart, train them on others

Its keys are those of the standard client; the detacher and the cut stand in `[detacher]`. A sample whose
attribute is not known counts for the task alone; a batch with one group gives no term (and is counted in the
metric `detach_skipped`); with `group_statistics` groups are pulled towards the server's means of others.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor

from clients import training
from clients.training import arrays_of, partition_of, personal_of
from fedsim import messages
from fedsim.errors import UserError
from fedsim.local_learning.meters import StepMeter
from fedsim.models.base import set_train_mode, units_of
from fedsim.task import Task
from fedsim.unlearning import audit
from fedsim.unlearning.cut import Detachable
from fedsim.unlearning.detach import usable
from fedsim.unlearning.measure import read
from fedsim.unlearning.moments import LARGEST, Moments, coded, known, shapes

_HELD_OUT = 5  #: every fifth sample judges the attackers


class Detaching:
    """The step: cross-entropy plus λ times the detacher's penalty, over one graph.

    Args:
        task: whose model has a cut.
    """

    def __init__(self, task: Task) -> None:
        self.model = _detachable(task)
        self.detacher: Any = self.model.get_submodule("detacher")
        self.networks = list(self.detacher.parameters())
        lr: Any = getattr(self.detacher, "lr", None)  # of the networks, where there are some
        self.tool = torch.optim.Adam(self.networks, lr=lr) if self.networks else None
        self.strength, self.head_only = 0.0, False
        #: inside the backbone a block of its own may save memory
        self.metered = self.model.cut < len(units_of(self.model.backbone))

    def begin(self, task: Task, config: ConfigRecord) -> None:
        """Take λ and the phase from the instruction; forget what the last client left."""
        if messages.STRENGTH not in config:
            raise ValueError(
                "the strategy says nothing of the detacher's strength; the one that does is "
                "'attribute-unlearning'"
            )
        self.strength = float(config[messages.STRENGTH])  # type: ignore[arg-type]
        self.head_only = bool(config.get(messages.HEAD_ONLY, False))
        if self.tool is not None:
            self.tool.state.clear()
        self.penalties = torch.zeros((), device=task.device)
        self.skipped = torch.zeros((), device=task.device)
        self.batches = 0
        self.meter = StepMeter(task.device)
        if self.model.statistics is not None:
            self.model.statistics.begin()

    def batch(self, task: Task, rows: np.ndarray) -> tuple[Tensor, ...]:
        """Inputs, labels and attributes [b, a]."""
        return (*task.train_batch(rows), task.attributes_of("train", rows))

    def __call__(self, task: Task, inputs: Tensor, labels: Tensor, z: Tensor) -> Tensor:
        """See `Step`."""
        if self.head_only:
            return self._above_the_cut(task, inputs, labels)
        if not self.metered:
            return self._loss(task, inputs, labels, z)
        with self.meter.step(lambda: [*task.model.parameters(), *task.model.buffers(), inputs, labels, z]):
            return self._loss(task, inputs, labels, z)

    def _loss(self, task: Task, inputs: Tensor, labels: Tensor, z: Tensor) -> Tensor:
        h = self.model.below(inputs)
        if self.model.boundary is None:
            loss = task.loss(self.model.above, h, labels)
            self._backward(task, loss, h, z, labels, inputs)
        else:  # a gradient-isolated block: its backward frees its graph before the rest is run
            self._backward(task, task.loss(self.model.local_logits, h, labels), h, z, labels, inputs)
            loss = task.loss(self.model.above, h.detach(), labels)
            task.backward(loss)
        return loss.detach()

    def end(self, task: Task) -> dict[str, Any]:
        """Mean penalty, the share of batches that had nothing to compare, peak and time of a step."""
        if self.model.statistics is not None:
            self.model.statistics.end()
        found: dict[str, Any] = {"detach_penalty": 0.0, "detach_skipped": 0.0}
        if self.strength:
            count = max(self.batches, 1)
            found = {
                "detach_penalty": self.penalties.item() / count,
                "detach_skipped": self.skipped.item() / count,
            }
        return found | (self.meter.metrics() if self.metered and not self.head_only else {})

    def _backward(
        self, task: Task, loss: Tensor, h: Tensor, z: Tensor, labels: Tensor, inputs: Tensor
    ) -> None:
        """Gradients of a loss at or above the cut and of the detacher's term."""
        flat = h.flatten(1).float()
        if self.model.statistics is not None:
            self.model.statistics.collect(flat.detach(), z)
        if self.strength:
            with task.compute.autocast(on=False):
                penalty = self._penalty(flat, z, labels, inputs)
            task.backward(loss + self.strength * penalty)
            self.penalties += penalty.detach()
        else:
            task.backward(loss)
        for parameter in self.networks:
            parameter.grad = None  # the encoder's loss is none of theirs
        self.batches += 1

    def _penalty(self, h: Tensor, z: Tensor, labels: Tensor, inputs: Tensor) -> Tensor:
        """The detacher's term, with its networks trained on this batch first; 0 without two groups."""
        compared = usable(z, self.model.attributes).float()
        self.skipped += 1 - compared
        if self.tool is not None:
            for _ in range(self.detacher.inner):
                self.tool.zero_grad(set_to_none=True)
                (compared * self.detacher.auxiliary_loss(h.detach(), z, labels, inputs)).backward()
                self.tool.step()
        penalty: Tensor = compared * self.detacher(h, z, labels, inputs)
        if self.model.statistics is not None:
            penalty = penalty + self.model.statistics.penalty(h, z)
        return penalty

    def _above_the_cut(self, task: Task, inputs: Tensor, labels: Tensor) -> Tensor:
        """A round in which what is below the cut stays as it is (its representations were erased)."""
        self.model.rest_below()
        with torch.no_grad():
            h = self.model.below(inputs)
        loss = task.loss(self.model.above, h, labels)
        if loss.requires_grad:  # a tuning mode may leave everything above the cut as it is
            task.backward(loss)
        return loss.detach()


@wraps(training.make, assigned=("__annotations__",), updated=())
def make(task: Task, /, **keys: Any) -> ClientApp:
    app = training.make(task, step=Detaching(task), **keys)

    @app.query("second_moments")
    def second_moments(message: Message, context: Context) -> Message:
        task.load(arrays_of(message), personal_of(context))
        released = bool(messages.config_of(message)[messages.RELEASED])
        found = moments_of(task, task.data.client(partition_of(context)), released=released)
        arrays = messages.arrays_of(found.arrays())
        return messages.reply(message, arrays, {messages.EXAMPLES: int(found.count)})

    @app.query("audit")
    def audited(message: Message, context: Context) -> Message:
        task.load(arrays_of(message), personal_of(context))
        record = message.content[messages.PROBES]
        assert isinstance(record, ArrayRecord)
        config = messages.config_of(message)
        return _audit(
            message, task, task.data.client(partition_of(context)), messages.views_of(record), config
        )

    return app


make.__doc__ = (training.make.__doc__ or "").replace(
    "A client that trains by back-propagation.",
    "A client that trains with a detacher at a cut, and answers queries of its representations.",
)


@torch.no_grad()
def moments_of(task: Task, rows: np.ndarray, *, released: bool) -> Moments:
    """Moments of a client's representations and attributes, over samples whose attributes are known.

    Args:
        task: with the state loaded.
        rows: of the training data.
        released: behind the eraser instead of before it.

    Raises:
        UserError: the cut is too wide.
    """
    model = _detachable(task)
    if model.width > LARGEST:
        raise UserError(
            f"a representation at this cut has {model.width} numbers, but second moments are taken up to "
            f"{LARGEST}: choose a later [detacher] cut (without the key: the backbone's features)"
        )
    columns = sum(attribute.columns for attribute in model.attributes)
    total = Moments(
        **{k: np.zeros(s) for k, s in shapes(model.width, columns).items() if k != "count"}, count=0
    )
    set_train_mode(model, training=False)
    size = task.experiment.settings["evaluation"]["batch_size"]
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        z = task.attributes_of("train", part)
        there = known(z, model.attributes)
        inputs = task.inputs_of("train", part)
        with task.compute.autocast():
            h = model.released(inputs) if released else model.below(inputs).flatten(1)
        pair = h.double()[there].cpu().numpy(), coded(z, model.attributes)[there].cpu().numpy()
        total = total + Moments.of(*pair)
    return total


def _audit(
    message: Message, task: Task, rows: np.ndarray, probes: dict[str, np.ndarray], config: ConfigRecord
) -> Message:
    """Judge every probe on a fifth of the client's samples, train it on the others.

    A client with one group trains nothing (it would teach the probe to guess that group), but it judges.
    """
    model = _detachable(task)
    (h, *_), _ = read(task, "train", rows)
    z = task.attributes_of("train", rows)
    held = torch.arange(len(h), device=h.device) % _HELD_OUT == _HELD_OUT - 1
    seed = int(config[messages.SEED]) + int(config[messages.ROUND])  # type: ignore[arg-type]
    found, trained = audit.answer(model.attributes, probes, h, z, held, seed=seed)
    return messages.reply(message, messages.arrays_of(found), {messages.EXAMPLES: trained})


def _detachable(task: Task) -> Detachable:
    if not isinstance(task.model, Detachable):
        raise UserError(
            '[client] "attribute-unlearning" needs attributes: set detacher.attributes = ["NAME"], a list of '
            "attributes of the data"
        )
    return task.model
