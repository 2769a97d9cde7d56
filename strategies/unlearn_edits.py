"""What happens to a finished model before it recovers: the `edit` of the strategy `unlearn`.

An edit takes some rounds. In each of them it may ask clients something (`ask`), and it gives back the changed
state (`apply`). `EDITS` in `strategies/__init__.py` names them; a constructor's signature is the schema of
its keys.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge, Gt, Lt
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from torch import Tensor

from fedsim import messages
from fedsim.errors import NotEnoughReplies, UserError
from fedsim.ranges import Count, Natural, NonNegative, Positive
from fedsim.sums import TreeSum, WeightedSum
from fedsim.task import Task
from fedsim.unlearning import edits, graph, masks, scores

State = dict[str, Tensor]
Shapes = dict[str, tuple[tuple[int, ...], str]]


@dataclass
class Scene:
    """What an edit works on.

    Attributes:
        task: the server's.
        kind: of the request.
        targets: classes or clients to forget.
        masks: channels pruned so far, layer -> bool [channels]; an edit adds to it.
    """

    task: Task
    kind: Literal["class", "client"]
    targets: Sequence[int]
    masks: dict[str, Tensor] = field(default_factory=dict)

    def sample(self) -> Tensor:
        """One input, for tracing the model."""
        return torch.from_numpy(np.array(self.task.data.arrays.train_x[:1])).to(self.task.device)

    def layers(self) -> dict[str, graph.Layer]:
        """Prunable layers whose weights travel."""
        shared = {entry.name for entry in self.task.selection.shared}
        found = graph.prunable(self.task.model, self.sample())
        return {
            name: layer
            for name, layer in found.items()
            if masks.entries(self.task.model, layer).keys() <= shared
        }


class Edit(ABC):
    """One way to change a finished model."""

    def rounds(self, targets: Sequence[int]) -> int:
        """How many rounds it takes."""
        return 1

    def ask(
        self, step: int, scene: Scene, arrays: ArrayRecord, config: ConfigRecord, who: messages.Roster
    ) -> list[Message]:
        """Instructions of round `step` (from 0); none: the server does it alone."""
        return []

    @abstractmethod
    def apply(
        self, step: int, scene: Scene, state: State, replies: Sequence[tuple[int, Message]]
    ) -> tuple[State, dict[str, Any]]:
        """The state after round `step`, and what to note of it."""


class Prune(Edit):
    """Prune the channels that tell the class from the others (arXiv 2110.11794).

    Args:
        ratio: share of the channels that goes, for each class.
        idf: the paper's, or that of the authors' released code.
        scope: the highest scores of each layer, or of all layers together (released code).
        direction: `highest` is the paper, `lowest` the released code, `random` a control.
        min_count: classes with fewer samples among all clients are left out of the scores.
        samples: images that a client scores at most (0: all that it has).
        clip: largest L2 norm of one image's activations in a layer (0: not clipped).
        noise: standard deviation of Gaussian noise on each client's sums, as a multiple of `clip`.
    """

    def __init__(
        self,
        ratio: Annotated[float, Gt(0), Lt(1)] = 0.1,
        idf: Literal["paper", "code"] = "paper",
        scope: Literal["layer", "global"] = "layer",
        direction: Literal["highest", "lowest", "random"] = "highest",
        min_count: Count = 5,
        samples: Natural = 0,
        clip: NonNegative = 0.0,
        noise: NonNegative = 0.0,
    ) -> None:
        if noise and not clip:
            raise UserError("edit.noise is a multiple of edit.clip: set edit.clip above 0")
        self.ratio, self.idf, self.scope, self.direction = ratio, idf, scope, direction
        self.min_count, self.samples, self.clip, self.noise = min_count, samples, clip, noise

    def rounds(self, targets: Sequence[int]) -> int:
        """One for each class: the next one is scored on the model without the channels of the last."""
        return len(targets)

    def ask(
        self, step: int, scene: Scene, arrays: ArrayRecord, config: ConfigRecord, who: messages.Roster
    ) -> list[Message]:
        """Statistics from everyone, also from clients that have nothing else than the class."""
        layers = scene.layers()
        if not layers:
            raise UserError(
                "no prunable layer: the model has no convolution or hidden unit that this [tuning] trains; "
                'use [tuning] name = "full" or another method'
            )
        keys = {"layers": list(layers), "samples": self.samples, "clip": self.clip, "noise": self.noise}
        return _instructions(messages.CHANNELS, arrays, config, keys, who, who.everyone())

    def apply(
        self, step: int, scene: Scene, state: State, replies: Sequence[tuple[int, Message]]
    ) -> tuple[State, dict[str, Any]]:
        """Sum up, score, choose, put to zero."""
        layers = scene.layers()
        classes = len(scene.task.data.arrays.classes)
        like: Shapes = {"counts": ((classes,), "int64")}
        like |= {f"sums/{name}": ((classes, layer.channels), "float32") for name, layer in layers.items()}
        total = _total(replies, like)
        sums = {name: torch.from_numpy(total[f"sums/{name}"]) for name in layers}
        counts = torch.from_numpy(total["counts"])
        found = scores.scores(sums, counts, scene.targets[step], min_count=self.min_count, idf=self.idf)
        picked = scores.chosen(
            found,
            self.ratio,
            scope=self.scope,
            direction=self.direction,
            pruned=scene.masks,
            seed=scene.task.experiment.seed,
        )
        scene.masks = masks.union(scene.masks, picked)
        fills = {name: masks.entries(scene.task.model, layers[name]) for name in scene.masks}
        masks.enforce(state, fills, scene.masks)
        return state, {"pruned_channels": sum(int(mask.sum()) for mask in scene.masks.values())}


class Negate(Edit):
    """Negate the weights of the first layer (NoT, CVPR 2025; after its abstract)."""

    def apply(
        self, step: int, scene: Scene, state: State, replies: Sequence[tuple[int, Message]]
    ) -> tuple[State, dict[str, Any]]:
        """Needs neither data nor messages."""
        layer = graph.first_layer(scene.task.model, scene.sample())
        if layer is None:
            raise UserError("edit 'not' negates a convolution or linear layer; this model has none")
        return edits.negated(state, layer), {}


class HeadMask(Edit):
    """Let the head never answer the classes: a control that forgets nothing below the head."""

    def apply(
        self, step: int, scene: Scene, state: State, replies: Sequence[tuple[int, Message]]
    ) -> tuple[State, dict[str, Any]]:
        """Needs neither data nor messages."""
        return edits.head_masked(state, scene.task.model.head, scene.targets), {}


class FreshHead(Edit):
    """Give the head new rows for the classes, to see how fast they are learnt again."""

    def apply(
        self, step: int, scene: Scene, state: State, replies: Sequence[tuple[int, Message]]
    ) -> tuple[State, dict[str, Any]]:
        """Needs neither data nor messages."""
        return edits.fresh_rows(state, scene.task.model.head, scene.targets), {}


class Nothing(Edit):
    """No edit: what training without the data forgets by itself."""

    def rounds(self, targets: Sequence[int]) -> int:
        """None."""
        return 0

    def apply(
        self, step: int, scene: Scene, state: State, replies: Sequence[tuple[int, Message]]
    ) -> tuple[State, dict[str, Any]]:
        """Never called."""
        return state, {}


class Ascent(Edit):
    """Projected gradient ascent on the leaving client (arXiv 2207.05521; `fedsim.unlearning.ascent`).

    Args:
        lr: learning rate of the ascent.
        epochs: longest ascent, in epochs over the client's data.
        batch_size: samples a step.
        clip: largest gradient norm.
        far: squared distance from the client's own last model at which it ends.
        shares: of the weights that each target had in the mean of its last round, from 0 to 1;
            `fedsim forget` takes them from the run.
    """

    def __init__(
        self,
        shares: list[Annotated[float, Ge(0), Lt(1)]],
        lr: Positive = 0.01,
        epochs: Positive = 5.0,
        batch_size: Count = 128,
        clip: NonNegative = 5.0,
        far: Positive = 2.2,
    ) -> None:
        self.shares = shares
        self.keys = {"lr": lr, "epochs": epochs, "batch_size": batch_size, "clip": clip, "far": far}

    def rounds(self, targets: Sequence[int]) -> int:
        """One for each client."""
        return len(targets)

    def ask(
        self, step: int, scene: Scene, arrays: ArrayRecord, config: ConfigRecord, who: messages.Roster
    ) -> list[Message]:
        """The leaving client alone."""
        if len(self.shares) != len(scene.targets):
            raise UserError(
                f"edit.shares has {len(self.shares)} numbers for {len(scene.targets)} clients to be "
                "forgotten: give one for each target"
            )
        keys = {**self.keys, "share": self.shares[step]}
        return _instructions(messages.ASCENT, arrays, config, keys, who, [scene.targets[step]])

    def apply(
        self, step: int, scene: Scene, state: State, replies: Sequence[tuple[int, Message]]
    ) -> tuple[State, dict[str, Any]]:
        """What the leaving client hands back is the model."""
        like = {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in state.items()}
        [(client, message)] = replies
        reason = messages.complaint(message, like)
        if reason is not None:
            raise NotEnoughReplies(f"client {client}, which is to be forgotten, could not help: {reason}")
        return tensors(message.content.array_records[messages.ARRAYS]), {}


def tensors(record: ArrayRecord) -> State:
    """Private tensors of a record."""
    return {name: torch.from_numpy(np.array(values)) for name, values in messages.views_of(record).items()}


def _instructions(
    kind: str,
    arrays: ArrayRecord,
    config: ConfigRecord,
    keys: dict[str, Any],
    who: messages.Roster,
    clients: Iterable[int],
) -> list[Message]:
    content = RecordDict({messages.ARRAYS: arrays, messages.CONFIG: ConfigRecord({**config, **keys})})
    return [Message(content, message_type=kind, dst_node_id=who.node(client)) for client in clients]


def _total(replies: Sequence[tuple[int, Message]], like: Shapes) -> dict[str, np.ndarray]:
    """Sums over clients, float64. One that is missing would shift the scores unseen, so none may be."""
    tree = TreeSum()
    for position, (client, message) in enumerate(replies):
        reason = messages.complaint(message, like)
        values = {} if reason else messages.views_of(message.content.array_records[messages.ARRAYS])
        if reason is None and (values["counts"] < 0).any():
            reason = "'counts' are negative"
        if reason is not None:
            raise NotEnoughReplies(f"statistics of client {client} cannot be used: {reason.splitlines()[0]}")
        tree.add(WeightedSum.of({k: v.astype(np.float64) for k, v in values.items()}, 1.0), position)
    total = tree.total()
    if total is None:
        raise NotEnoughReplies("no client sent statistics")
    return total.arrays
