"""Unlearning: edit a finished model, then let the run's own strategy recover it without the forgotten data.

    score, edit   rounds of the edit (`unlearn_edits`): statistics of channels, or the server alone
    recover       the run's own strategy on what is left; pruned channels are put back to zero by every
                  client after every step, and here after every aggregation
    done          forgetting *and* retained accuracy held for `patience` evaluations in a row

The first recovery rounds can bring a pruned class back (its features re-form, its logit is not suppressed
any more), so a single good evaluation ends nothing. Both accuracies are of the validation split; without one,
and where a client is forgotten, all rounds are run. Clients without anything left to train on are not asked.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from fedsim import messages, payload, registry
from fedsim.data.classes import positions_of
from fedsim.errors import NotEnoughReplies, UserError, nearest
from fedsim.ranges import Fraction, Natural
from fedsim.rounds import lr_scale
from fedsim.server_step import ServerStep
from fedsim.task import Task
from fedsim.unlearning import graph, masks
from strategies.unlearn_edits import Edit, Scene, State, tensors


class Unlearn(Strategy):
    """Edit a finished model and recover it without the forgotten data (written by `fedsim forget`).

    Args:
        origin: file with the state to start from; none: an untrained model.
        digest: of that state.
        kind: what is forgotten.
        targets: classes, written as in [forget] classes, or clients.
        edit: `name` and keys of an edit.
        recover: [strategy] of the run, its `name` among the keys.
        masks: file with channels that were pruned before and stay so.
        patience: evaluations in a row that must be good before the run ends by itself (0: it does not).
        tolerance: how far below the original the retained accuracy may be.
        forgotten: largest accuracy on forgotten classes.
        first_round: rounds that the start state has behind it, for the learning rate's schedule.
    """

    #: recovery ends when it is done, and `fedsim forget` compares methods by their rounds
    counts_rounds: ClassVar[bool] = True
    #: of one round only, or made anew by `begin`
    transient: ClassVar[tuple[str, ...]] = (
        "_edit",
        "_scene",
        "_fills",
        "_sent",
        "_asked",
        "_who",
        "_refused",
        "_around",
    )
    #: an edit changes statistics as well as parameters; what recovers may be a server optimiser
    whole_state: ClassVar[bool] = True
    #: clients that know masks and statistics
    defaults: ClassVar[dict[str, dict[str, Any]]] = {"client": {"name": "unlearn"}}

    def __init__(
        self,
        origin: str | None = None,
        digest: str = "",
        kind: Literal["class", "client"] = "class",
        targets: list[int | str] | None = None,
        edit: dict[str, Any] | None = None,
        recover: dict[str, Any] | None = None,
        masks: str | None = None,
        patience: Natural = 3,
        tolerance: Fraction = 0.01,
        forgotten: Fraction = 0.02,
        first_round: Natural = 0,
    ) -> None:
        self.origin, self.digest = origin, digest
        strange = [target for target in targets or [] if kind == "client" and isinstance(target, str)]
        if strange:
            raise UserError(f"[strategy] targets: '{strange[0]}' is no client; clients are numbers from 0")
        self.kind = kind
        self.targets: list[Any] = list(targets or [])  #: positions of classes once `begin` knows their names
        self.edit, self.recover, self.masks = edit, recover, masks
        self.patience, self.tolerance, self.forgotten = patience, tolerance, forgotten
        self.first_round = first_round
        self.inner: Strategy = _named("strategies", recover or {"name": "fedavg"}, "recover")
        self.pruned: dict[str, NDArray[np.bool_]] = {}
        self.step = 0
        self.reference: float | None = None
        self.sustained = 0
        self._edit: Edit = _named("edits", edit or {"name": "none"}, "edit")
        self._scene: Scene | None = None
        self._fills: dict[str, dict[str, float]] = {}
        self._sent = ArrayRecord()
        self._asked: set[int] = set()
        self._who: messages.Roster | None = None
        self._refused: dict[int, str] | None = None
        self._around: ServerStep | None = None

    # ------------------------------------------------------------------- what the round loop calls

    def begin(self, task: Task) -> ArrayRecord | None:
        """The state to start from; also looks at the model.

        Raises:
            UserError: the state is not there, is another one, or does not fit.
        """
        if task.selection.personal:
            raise UserError(
                "parts of this model stay with the clients ([payload] personal); unlearning reaches only "
                "what travels"
            )
        if self.kind == "class":
            self.targets = positions_of(self.targets, task.data.arrays.classes, "[strategy] targets")
        self._scene = Scene(task, self.kind, self.targets)
        if self.masks is not None and not self.pruned:
            self.pruned = {name: values > 0 for name, values in _arrays(self.masks, "masks").items()}
        layers = graph.prunable(task.model, self._scene.sample())
        self._fills = {name: masks.entries(task.model, layer) for name, layer in layers.items()}
        if self.origin is None:
            return None
        values = _arrays(self.origin, "origin")
        if self.digest and payload.digest(values) != self.digest:
            raise UserError(f"{self.origin} is not the state that this run began with; start a new one")
        record = messages.arrays_of(values)
        try:
            payload.check(record, task.selection.shared)
        except ValueError as error:
            raise UserError(f"{self.origin} does not fit the model: {error}") from error
        return payload.conform(record, task.selection.shared)

    @property
    def editing(self) -> bool:
        """Whether the next round belongs to the edit."""
        return self.step < self._edit.rounds(self.targets)

    @property
    def alone(self) -> bool:
        """Whether this round asks nobody: the server edits by itself."""
        return self.editing

    def observe(self, metrics: dict[str, float]) -> None:
        """Count evaluations in a row at which the class is gone and the others are back."""
        retained, lost = metrics.get("validation_accuracy"), metrics.get("validation_forget_accuracy")
        if retained is None or lost is None:  # no split, or a client, of whom the server holds nothing back
            return
        if self.reference is None:
            self.reference = retained
            return
        back = retained >= self.reference - self.tolerance
        good = not self.editing and back and lost <= self.forgotten
        self.sustained = self.sustained + 1 if good else 0

    def done(self) -> bool:
        """Forgotten and recovered, and it stays so."""
        return bool(self.patience) and self.sustained >= self.patience

    @property
    def refused(self) -> dict[int, str]:
        """Clients whose last reply could not be used, and why."""
        if self._refused is not None:
            return self._refused
        found: dict[int, str] = getattr(self.inner, "refused", {})
        return found

    # ------------------------------------------------------------------------- Flower's Strategy

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Instructions of the edit, or those of the run's own strategy with the masks."""
        self._sent, self._who = arrays, messages.roster(grid)
        if self.editing:
            out = self._edit.ask(self.step, self._place(), arrays, config, self._who)
            self._asked = {self._who.client(message.metadata.dst_node_id) for message in out}
            return out
        self._scale(server_round, config)
        statistics = frozenset() if self._scene is None else self._scene.task.selection.shared_statistics
        self._around = ServerStep(self.inner, statistics)
        out = self._around.configure_train(server_round, arrays, config, grid)
        if self.pruned:
            record = messages.arrays_of(self.pruned)
            for message in out:
                message.content[messages.MASKS] = record
        return out

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The edited state, or the aggregate with the masks enforced."""
        if self.editing:
            return self._apply(replies)
        self._refused = None
        assert self._around is not None
        assert self._who is not None
        arrays, metrics = self._around.aggregate_train(server_round, replies, self._who)
        if arrays is None or not self.pruned:
            return arrays, metrics
        state = tensors(arrays)
        masks.enforce(state, self._fills, self._masks())
        return _record(state), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As the run's own strategy does."""
        return self.inner.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """As the run's own strategy does."""
        return self.inner.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        """Flower calls this before its own loop; fedsim prints its own header."""

    # ------------------------------------------------------------------------------- internals

    def _apply(self, replies: Iterable[Message]) -> tuple[ArrayRecord, MetricRecord]:
        scene = self._place()
        assert self._who is not None
        scene.masks = self._masks()
        found = {client: m for client, m in messages.by_client(replies, self._who) if client in self._asked}
        silent = sorted(self._asked - found.keys())
        if silent:
            raise NotEnoughReplies(f"the edit needs every client that it asks; no answer from {silent[:10]}")
        state, notes = self._edit.apply(self.step, scene, tensors(self._sent), list(found.items()))
        self.pruned = {name: mask.numpy() for name, mask in scene.masks.items()}
        self.step += 1
        self._refused = {}
        return _record(state), MetricRecord(notes)

    def _masks(self) -> dict[str, Any]:
        import torch

        return {name: torch.from_numpy(np.array(mask)) for name, mask in self.pruned.items()}

    def _place(self) -> Scene:
        if self._scene is None:
            raise UserError("strategy 'unlearn' runs in fedsim's own loop, which calls its begin() first")
        return self._scene

    def _scale(self, server_round: int, config: ConfigRecord) -> None:
        """The schedule runs over the recovery rounds (and those that the start state has behind it)."""
        if self._scene is None:
            return
        experiment, before = self._scene.task.experiment, self._edit.rounds(self.targets) - self.first_round
        rounds = experiment.rounds - before
        config[messages.LR_SCALE] = lr_scale(experiment.settings["schedule"], server_round - before, rounds)


def _record(state: State) -> ArrayRecord:
    return messages.arrays_of({name: tensor.numpy() for name, tensor in state.items()})


def _arrays(path: str, key: str) -> dict[str, NDArray[Any]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not Path(path).is_file():
        raise UserError(f"strategy.{key}: there is no '{path}'; fedsim forget writes this key")
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise UserError(f"{path}: damaged or unreadable ({error})") from error


def _named(kind: str, table: dict[str, Any], section: str) -> Any:
    """The object that a nested table names, with its other keys checked against the signature."""
    from pydantic import ValidationError

    keys = {key: value for key, value in table.items() if key != "name"}
    if not isinstance(table.get("name"), str):
        raise UserError(f"[strategy.{section}] name is missing")
    target = registry.resolve(kind, table["name"]).target
    model = registry.schema(target)
    for key in keys:
        if key not in model.model_fields:
            raise UserError(f"[strategy.{section}] unknown key '{key}': {nearest(key, model.model_fields)}")
    try:
        model.model_validate(keys)
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(
            f"[strategy.{section}] {problem['loc'][0]}: {problem['msg']} (got {problem.get('input')!r})"
        ) from error
    return target(**keys)
