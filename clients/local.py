"""Clients that train window by window: the step of `[local]`, and what they keep, share and measure.

    begin   method, K and auxiliary networks of this client (its budget; context.state)
    step    forward and backward passes of all windows                       (fedsim/local_learning)
    end     auxiliary networks back into context.state or the shared state; peak bytes, seconds a step

`clients/training.py` has the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Context
from torch import Tensor

from fedsim import messages, payload
from fedsim.local_learning.meters import StepMeter

if TYPE_CHECKING:
    from fedsim.local_learning.federated import Local
    from fedsim.local_learning.learner import LocallySupervised
    from fedsim.task import Task

AUXILIARY = "auxiliary"  #: key of the auxiliary parameters in `context.state`

Tool = torch.optim.Optimizer
Step = Callable[["Task", Tensor, Tensor], Tensor]


class LocalClient:
    """What the training loop needs of a client that is locally supervised.

    Args:
        task: of the process.
        local: its choices and learners.
        make_tool: optimiser of the backbone and of further groups.
    """

    def __init__(self, task: Task, local: Local, make_tool: Callable[[list[dict[str, Any]]], Tool]) -> None:
        self.task = task
        self.local = local
        self.make_tool = make_tool
        self._tools: dict[LocallySupervised, Tool] = {}
        self._meter = StepMeter(task.device)

    def begin(self, client: int, context: Context) -> tuple[Tool, Step]:
        """Optimiser and step of a client; the task holds what the server sent."""
        record = context.state.get(AUXILIARY)
        kept = messages.views_of(record) if isinstance(record, ArrayRecord) else {}
        learner = self.local.begin(client, {n: torch.from_numpy(np.array(v)) for n, v in kept.items()})
        if learner not in self._tools:
            scales = [p for n, p in learner.auxiliary.named_parameters() if n.endswith(".scale")]
            known = {id(p) for p in scales}
            others = [p for p in learner.trainable() if id(p) not in known]
            groups: list[dict[str, Any]] = [{"params": others}, {"params": scales, "weight_decay": 0.0}]
            self._tools[learner] = self.make_tool([group for group in groups if group["params"]])
        self._meter = StepMeter(self.task.device)
        return self._tools[learner], WindowStep(learner, self._tools[learner], self._meter)

    def end(self, context: Context) -> dict[str, Any]:
        """Put the client's auxiliary parameters away; its metrics."""
        learner = self.local.learner
        self.local.end()
        kept = self.local.kept()
        if kept:
            context.state[AUXILIARY] = payload.to_record(kept, payload.entries_of(kept))
        self.release()
        return {**self._meter.metrics(), "blocks": learner.blocks, "method": self.local.method_number}

    def release(self) -> None:
        """Let go of gradients and the optimiser's state; nothing else of the training is kept."""
        learner = self.local.learner
        learner.zero_grad(set_to_none=True)
        self._tools[learner].state.clear()

    def shared(self) -> ArrayRecord:
        """The shared state, without auxiliary parameters that this client does not have."""
        mine = {messages.OPTIONAL + name for name in self.local.owned()}
        whole = self.task.shared()
        names = [n for n in whole if not n.startswith(messages.OPTIONAL) or n in mine]
        return ArrayRecord({name: whole[name] for name in names})


@dataclass(frozen=True)
class WindowStep:
    """The step of a client that trains window by window."""

    learner: LocallySupervised
    tool: Tool
    meter: StepMeter

    def __call__(self, task: Task, inputs: Tensor, labels: Tensor) -> Tensor:
        """See `training.Step`."""
        with self.meter.step(lambda: self._held(task, inputs, labels)):
            return self.learner.gradients(inputs, labels, task.backward)

    def trial(self, task: Task, inputs: Tensor, labels: Tensor) -> None:
        """Forward passes of all windows; copies that follow the model are put back."""
        before = {name: value.clone() for name, value in self.learner.auxiliary.state_dict().items()}
        try:
            self.learner.gradients(inputs, labels, lambda loss: None)
        finally:
            self.learner.auxiliary.load_state_dict(before)

    def _held(self, task: Task, inputs: Tensor, labels: Tensor) -> list[Tensor]:
        """Everything of this client that is there before the step."""
        state = self.tool.state.values()
        tensors = [v for entry in state for v in entry.values() if isinstance(v, Tensor)]
        return [*self.learner.parameters(), *self.learner.buffers(), *tensors, *task.anchors, inputs, labels]
