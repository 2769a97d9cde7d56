"""Clients that train window by window: the step of `[local]`, and what they keep, share and measure.

    begin   method, K and auxiliary networks of this client (its budget; context.state)
    step    forward and backward passes of all windows                       (fedsim/local_learning)
    end     auxiliary networks back into context.state or the shared state; peak bytes, seconds a step

`clients/training.py` has the loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Context
from torch import Tensor

from fedsim import messages, payload
from fedsim.local_learning.meters import peak_bytes

if TYPE_CHECKING:
    from fedsim.local_learning.federated import Local
    from fedsim.local_learning.learner import LocallySupervised
    from fedsim.task import Task

AUXILIARY = "auxiliary"  #: key of the auxiliary parameters in `context.state`
_METERED = 2  #: steps of a round that are metered: the optimiser's state is there from the second on

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
        self._measured = _Measured()

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
        self._measured = _Measured()
        return self._tools[learner], self._step

    def end(self, context: Context) -> dict[str, Any]:
        """Put the client's auxiliary parameters away; its metrics."""
        learner = self.local.learner
        self.local.end()
        kept = self.local.kept()
        if kept:
            context.state[AUXILIARY] = payload.to_record(kept, payload.entries_of(kept))
        learner.zero_grad(set_to_none=True)
        self._tools[learner].state.clear()
        return {**self._measured.metrics(), "blocks": learner.blocks, "method": self.local.method_number}

    def shared(self) -> ArrayRecord:
        """The shared state, without auxiliary parameters that this client does not have."""
        mine = {messages.OPTIONAL + name for name in self.local.owned()}
        whole = self.task.shared()
        names = [n for n in whole if not n.startswith(messages.OPTIONAL) or n in mine]
        return ArrayRecord({name: whole[name] for name in names})

    def _step(self, task: Task, inputs: Tensor, labels: Tensor) -> Tensor:
        learner, measured = self.local.learner, self._measured
        if not learner.accepts(len(inputs)):
            # the last batch may be a single sample: twice the same has the same mean loss, and sends no
            # gradient through BatchNorm over vectors
            inputs, labels = (torch.cat([x, x]) for x in (inputs, labels))
        metered = measured.steps < _METERED
        held = self._held(learner, inputs, labels) if metered else []
        began = time.perf_counter()
        with peak_bytes(held, task.device) if metered else nullcontext() as peak:
            loss = learner.gradients(inputs, labels, task.backward)
        measured.add(time.perf_counter() - began, peak.bytes if peak is not None else None)
        return loss

    def _held(self, learner: LocallySupervised, inputs: Tensor, labels: Tensor) -> list[Tensor]:
        """Everything of this client that is there before the step."""
        state = self._tools[learner].state.values()
        tensors = [v for entry in state for v in entry.values() if isinstance(v, Tensor)]
        return [*learner.parameters(), *learner.buffers(), *tensors, inputs, labels]


class _Measured:
    """Peak and time of the steps of one round."""

    def __init__(self) -> None:
        self.steps = 0
        self.peak = 0
        self.seconds = 0.0
        self.first = 0.0

    def add(self, seconds: float, peak: int | None) -> None:
        """One step; metering slows a step down, so that of others is the one to report."""
        self.steps += 1
        if peak is None:
            self.seconds += seconds
        else:
            self.peak = max(self.peak, peak)
            self.first = seconds

    def metrics(self) -> dict[str, float]:
        """`peak_bytes`, and `step_seconds` (forward and backward passes)."""
        plain = self.steps - _METERED
        return {
            "peak_bytes": self.peak,
            "step_seconds": self.seconds / plain if plain > 0 else self.first,
        }
