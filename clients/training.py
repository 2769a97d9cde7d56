"""The training and evaluation loop of every client. There is no second one.

    message ─> load shared + personal into the resident model
            ─> for each batch:  zero gradients -> step -> proximal term -> clip -> optimiser
            ─> reply: shared part, metrics        (personal part -> context.state)

A *step* turns one batch into gradients: back-propagation here, windows or a detacher term in other
files, which pass their own `step` to `make` instead of writing a loop. A step runs wholly on the
model's device (no `.item()`), so that it also runs on `meta` tensors. A step that is an object may also have

    batch(task, rows) -> tensors      what it takes, instead of inputs and labels
    begin(task, config)               before the first batch of a round, after the state is loaded
    end(task) -> metrics              after the last one, before the state is sent
    trial(task, *tensors)             its forward passes alone, where they are others than the network's

BatchNorm cannot normalise a single value a channel. Where that makes a batch of one sample impossible, a
sample that an epoch leaves over joins the batch before it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor

from clients.local import LocalClient
from fedsim import messages
from fedsim.errors import UserError, warn_once
from fedsim.models.base import set_train_mode
from fedsim.optimizers import make_optimizer
from fedsim.ranges import Count, NonNegative, Positive
from fedsim.task import Task

#: how torch says that a norm has a single value to normalise: a channel of a batch, or a map
_ONE_VALUE = "Expected more than 1 value per channel when training"
_ONE_PIXEL = "Expected more than 1 spatial element when training"

PERSONAL = "personal"  #: key of the personal part in `context.state`

#: (task, inputs, labels) -> detached mean loss; leaves gradients in the parameters (by `task.backward`)
Step = Callable[..., Tensor]


def back_propagation(task: Task, inputs: Tensor, labels: Tensor) -> Tensor:
    """The ordinary step: one graph over the whole model."""
    loss = task.loss(task.network, inputs, labels)
    task.backward(loss)
    return loss.detach()


@dataclass(frozen=True)
class Recipe:
    """How a client trains; the keys of `[client]`."""

    lr: float
    epochs: float
    steps: int | None
    batch_size: int
    momentum: float
    weight_decay: float
    clip: float
    proximal_mu: float


def make(
    task: Task,
    /,
    *,
    lr: Positive = 0.01,
    optimizer: Literal["sgd", "adamw"] = "sgd",
    momentum: NonNegative = 0.9,
    weight_decay: NonNegative = 0.0,
    batch_size: Count = 32,
    epochs: Positive = 1.0,
    steps: Count | None = None,
    clip: NonNegative = 0.0,
    proximal_mu: NonNegative = 0.0,
    step: Step = back_propagation,
) -> ClientApp:
    """A client that trains by back-propagation.

    Args:
        lr: learning rate; [schedule] scales it over global rounds.
        optimizer: `sgd` or `adamw`; its state starts empty in every round.
        momentum: of `sgd`.
        weight_decay: L2 term of `sgd`, decoupled decay of `adamw`.
        batch_size: samples a step; where BatchNorm cannot take a last batch of one sample, that sample joins
            the batch before.
        epochs: local epochs a round; fractions are rounded to whole steps.
        steps: exact number of local steps a round instead of `epochs`.
        clip: largest global gradient norm (0: no clipping).
        proximal_mu: weight of FedProx' µ/2·‖w − w_global‖² on the shared part (arXiv 1812.06127).
    """
    recipe = Recipe(lr, epochs, steps, batch_size, momentum, weight_decay, clip, proximal_mu)
    return client(task, recipe, optimizer, step)


def client(task: Task, recipe: Recipe, optimizer: str, step: Step) -> ClientApp:
    """A ClientApp with the actions `train` and `evaluate` around the loop; methods add actions to it."""
    app = ClientApp()
    own = [p for p in task.model.parameters() if p.requires_grad]

    def make_tool(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        decay = recipe.weight_decay
        return make_optimizer(groups, optimizer, lr=recipe.lr, momentum=recipe.momentum, weight_decay=decay)

    tool = make_tool([{"params": own}])
    local = None
    if task.local is not None:
        if step is not back_propagation:
            raise UserError('this client has a step of its own: set [local] name = "bp"')
        local = LocalClient(task, task.local, lambda groups: make_tool([{"params": own}, *groups]))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        config = messages.config_of(message)
        who = partition_of(context)
        task.load(arrays_of(message), personal_of(context))
        rows = task.data.client(who)
        started = time.perf_counter()
        _told(step, "begin", task, config)
        chosen = (tool, step) if local is None else local.begin(who, context)
        metrics = fit(
            task,
            rows,
            recipe,
            *chosen,
            lr_scale=float(config.get(messages.LR_SCALE, 1.0)),  # type: ignore[arg-type]
            proximal_mu=float(config.get("proximal-mu", recipe.proximal_mu)),  # type: ignore[arg-type]
        )
        metrics |= _told(step, "end", task) or {}
        if task.selection.personal:
            context.state[PERSONAL] = task.personal()
        metrics[messages.SECONDS] = time.perf_counter() - started
        metrics |= {messages.ROWS + name: counts for name, counts in task.row_counts(rows).items()}
        if local is not None:
            metrics |= local.end(context)
        return messages.reply(message, task.shared() if local is None else local.shared(), metrics)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        config = messages.config_of(message)
        who = partition_of(context)
        task.load(arrays_of(message), personal_of(context))
        steps = task.experiment.settings["evaluation"]["fine_tune"]
        if steps:
            own = replace(recipe, steps=steps)
            lr_scale = float(config.get(messages.LR_SCALE, 1.0))  # type: ignore[arg-type]
            chosen = (tool, step) if local is None else local.begin(who, context)
            fit(task, task.data.client(who), own, *chosen, lr_scale=lr_scale, proximal_mu=0.0)
            if local is not None:
                local.release()
        split = str(config.get("split", "test"))
        return messages.reply(message, None, task.evaluate_split(split, who))

    return app


def fit(
    task: Task,
    rows: np.ndarray,
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    step: Step,
    *,
    lr_scale: float,
    proximal_mu: float,
) -> dict[str, Any]:
    """Train the resident model on some rows of the training data.

    Args:
        rows: indices into the training arrays, int64 [n].
        lr_scale: factor on the recipe's learning rate in this round.
        proximal_mu: FedProx µ; the anchor is the shared part at entry.

    Returns:
        `num-examples` it has, `samples` that passed (epochs count), mean `loss` over them; with fp16 also the
        share of `steps_skipped`, whose gradients overflowed.
    """
    if len(rows) == 0:
        raise ValueError("this client has no training data")
    set_train_mode(task.model, training=True)
    optimizer.state.clear()
    task.scaler = task.compute.scaler()
    for group in optimizer.param_groups:
        group["lr"] = recipe.lr * lr_scale
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    anchors = _anchors(task) if proximal_mu > 0 else []
    task.anchors = [anchor for _, anchor in anchors]
    total = torch.zeros((), dtype=torch.float64, device=task.device)
    seen = steps = skipped = 0
    scale = task.scaler.get_scale()
    take = getattr(step, "batch", Task.train_batch)
    joins = _leaves_one(len(rows), recipe) and not _takes_one(task, rows, step)
    if joins:
        _check_joinable(len(rows), recipe)
    for batch in batches(len(rows), recipe, joins=joins):
        tensors = take(task, rows[batch])
        optimizer.zero_grad(set_to_none=True)
        with task.compute.autocast(), _explained():
            loss = step(task, *tensors)
        task.scaler.unscale_(optimizer)
        for parameter, anchor in anchors:
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - anchor, alpha=proximal_mu)
        if recipe.clip > 0:
            torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
        task.scaler.step(optimizer)
        task.scaler.update()
        before, scale = scale, task.scaler.get_scale()  # waits for the device, so once a step
        steps += 1
        skipped += scale < before  # it shrinks when a step was left out, and only then
        if task.constrain is not None:
            task.constrain()
        total += loss.double() * len(batch)
        seen += len(batch)
    task.anchors = []
    found = {messages.EXAMPLES: len(rows), messages.SAMPLES: seen, "loss": total.item() / seen}
    return found | {messages.SKIPPED: skipped / steps} if task.scaler.is_enabled() else found


def batches(count: int, recipe: Recipe, *, joins: bool = False) -> Iterator[np.ndarray]:
    """Positions of each batch: reshuffled every epoch by torch's generator, cut after the last step.

    Args:
        count: samples of the client.
        recipe: how many to a batch, and for how long.
        joins: a sample that an epoch leaves over joins the batch before it.
    """
    starts = list(range(0, count - joins, recipe.batch_size))
    left = _steps(recipe, len(starts))
    while left > 0:
        order = torch.randperm(count).numpy()
        for start, stop in pairwise([*starts, count]):
            if left == 0:
                return
            left -= 1
            yield order[start:stop]


def _steps(recipe: Recipe, per_epoch: int) -> int:
    return recipe.steps or max(1, round(recipe.epochs * per_epoch))


def _leaves_one(count: int, recipe: Recipe) -> bool:
    """Whether some batch has a single sample."""
    per_epoch = math.ceil(count / recipe.batch_size)
    alone = count - (per_epoch - 1) * recipe.batch_size == 1
    return alone and (_steps(recipe, per_epoch) >= per_epoch or recipe.batch_size == 1)


def _takes_one(task: Task, rows: np.ndarray, step: Step) -> bool:
    """Whether the model can train on one sample; tried without a trace."""
    take = getattr(step, "batch", Task.train_batch)
    trial = getattr(step, "trial", None) or (lambda task, inputs, *_: task.network(inputs))
    devices = [task.device] if task.device.type == "cuda" else []
    with torch.no_grad(), task.untouched(), torch.random.fork_rng(devices), task.compute.autocast():
        try:
            trial(task, *take(task, rows[:1]))
        except UserError:  # auxiliary heads say it themselves
            return False
        except ValueError as error:
            return not str(error).startswith(_ONE_VALUE)  # of anything else training itself will tell
    return True


def _check_joinable(count: int, recipe: Recipe) -> None:
    """Say that a sample joins the batch before, or that there is none.

    Raises:
        UserError: the client has a single sample, or batches of one.
    """
    if count == 1:
        raise UserError(
            "this client has 1 training sample, and BatchNorm needs 2 of them: give every client 2 or more "
            "([partition] min_samples = 2, or fewer clients), or choose a model without BatchNorm"
        )
    if recipe.batch_size == 1:
        raise UserError(
            "batch_size = 1, but this model's BatchNorm needs 2 samples a batch: set client.batch_size = 2 "
            "or more, or choose a model without BatchNorm"
        )
    warn_once(
        "where BatchNorm needs 2 samples and an epoch leaves 1 over (n mod client.batch_size = 1), that "
        "sample joins the batch before it"
    )


@contextmanager
def _explained() -> Iterator[None]:
    """Maps of one pixel leave InstanceNorm nothing to normalise, whatever the batch."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith(_ONE_PIXEL):
            raise
        raise UserError(
            f"InstanceNorm in this model gets maps of one pixel, of which nothing is left ({error}): use "
            "larger images, fewer strides, or another norm"
        ) from error


def _told(step: Step, event: str, *arguments: Any) -> Any:
    method = getattr(step, event, None)
    return None if method is None else method(*arguments)


def _anchors(task: Task) -> list[tuple[torch.nn.Parameter, Tensor]]:
    shared = {entry.name for entry in task.selection.shared}
    return [
        (p, p.detach().clone())
        for name, p in task.model.named_parameters()
        if p.requires_grad and name in shared
    ]


def partition_of(context: Context) -> int:
    """Which client this is."""
    return int(context.node_config["partition-id"])


def arrays_of(message: Message) -> ArrayRecord:
    """The shared state that an instruction carries."""
    record: Any = message.content.get(messages.ARRAYS)
    if not isinstance(record, ArrayRecord):
        raise ValueError(f"the instruction has no array record named '{messages.ARRAYS}'")
    return record


def personal_of(context: Context) -> ArrayRecord | None:
    """What this client keeps, if it keeps something."""
    record = context.state.get(PERSONAL)
    return record if isinstance(record, ArrayRecord) else None
