"""The round loop around any Flower Strategy: evaluate, log, checkpoint, stop, resume.

    round 0    evaluate the initial state, checkpoint
    round r    strategy.configure_train -> grid -> strategy.aggregate_train -> evaluate -> hooks -> checkpoint

Flower's own `Strategy.start` has no resume, no early stop and no phases, so it is not used. A strategy
may have

    begin(task) -> state       called first, also on resume: the state to start from (None: the model's own)
    observe(metrics)           told every evaluation
    done() -> bool             ends the run by itself
    alone                      true in a round that asks no client: the server changes the state by itself
    refused                    client -> reason, after aggregate_train
    reply_shapes(message)      what arrays a reply to this train message must have, name -> (shape, dtype), or
                               None for any; without it: those of the message
    findings                   name -> number, what it found out: goes into the summary
    counts_rounds              true where a round depends on how many there are in all: none can be added
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp.strategy import Strategy

from fedsim import diagnosis, messages, payload
from fedsim.averaging import weighting_of
from fedsim.checkpoints import Unstorable
from fedsim.config import Experiment
from fedsim.data import pixels
from fedsim.data.attributes import to_json
from fedsim.engine.grid import BaseGrid
from fedsim.errors import NotEnoughReplies, UserError
from fedsim.evaluation import NO_TESTS, over_clients, server_metrics
from fedsim.hooks import Hook, Round
from fedsim.intake import Intake, averaged_by_flower
from fedsim.messages import Replies
from fedsim.runs import Run
from fedsim.server_step import ServerStep
from fedsim.strategy_state import require_clients, restore, state_of
from fedsim.task import Task
from fedsim.version import code_digest
from fedsim.wire import WireGrid

_DIVERGED = 10.0  #: a loss so many times the one before training (and above 10) is no progress
#: keys that say how large steps are, by section: ours and Flower's
_RATES = {"client": ("lr",), "strategy": ("server_learning_rate", "eta", "eta_l")}


@dataclass
class Progress:
    """Everything about a run that changes from round to round (and is checkpointed)."""

    server_round: int
    arrays: ArrayRecord
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    best: float = math.inf
    stale: int = 0
    start: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)


class Loop:
    """One run of a strategy on a grid.

    Args:
        strategy: any Flower strategy.
        grid: one of ours, whose client states are checkpointed too, or a stranger's inside a WireGrid.
        task: the server's task.
        run: folder for checkpoints.
        hooks: watchers.
    """

    def __init__(
        self,
        strategy: Strategy,
        grid: BaseGrid | WireGrid,
        task: Task,
        run: Run,
        hooks: Sequence[Hook],
    ) -> None:
        self.strategy = strategy
        self.grid = grid
        self.task = task
        self.run = run
        self.hooks = hooks
        self.experiment = task.experiment
        self.who = grid.roster
        self.server_step = ServerStep(strategy, task.selection.shared_statistics)
        if isinstance(grid, BaseGrid):
            grid.work = task.data.partition.sizes().tolist()
        if task.data.forgotten is not None:
            idle = frozenset(np.flatnonzero(task.data.partition.sizes() == 0).tolist())
            self.who = grid.roster = replace(grid.roster, absent=idle)
        if task.local is not None and task.local.differs and averaged_by_flower(strategy):
            raise UserError(
                f"Flower's {type(strategy).__name__} averages replies that all have the same entries, but "
                "with these [local] budgets clients share different auxiliary networks: set "
                'auxiliary = "personal", or [strategy] name = "fedavg"'
            )
        self.intake = Intake(self.server_step, self.who, self.notice)
        self.resumable = True
        self.diverged = False
        self._odd: set[int] = set()  #: clients whose loss was no number
        self.recording = task.experiment.settings["checkpoints"]["record_updates"]
        evaluation = self.experiment.settings["evaluation"]
        where = evaluation["where"]
        if where == "auto":
            where = "clients" if task.selection.personal or evaluation["fine_tune"] else "server"
        self.on_clients = where == "clients"
        if self.on_clients and evaluation["patience"]:
            raise UserError(
                "[evaluation] patience needs the validation split, which the server measures: "
                'set evaluation.where = "server" or patience = 0'
            )
        if evaluation["fine_tune"] and not self.on_clients:
            raise UserError(
                '[evaluation] fine_tune is done by clients: set evaluation.where = "clients" or leave it out'
            )
        if evaluation["patience"] and not len(task.data.validation):
            raise UserError("[evaluation] patience needs a validation split: set evaluation.validation = 0.1")

    # ---------------------------------------------------------------------------- the loop

    def execute(self) -> Progress:
        """Run to the end, from the newest checkpoint if the folder has one; returns the final progress."""
        require_clients(self.strategy, len(self.who.clients()))
        progress = self._begin()
        self._tell("start", self.experiment, progress.server_round + 1)
        if self.task.data.arrays.notes:
            self._tell("data", self.task.data.arrays.card())
        if progress.server_round < 0:
            progress.server_round = 0
            started = time.perf_counter()
            record = self._evaluate(progress, 0)
            progress.start = dict(progress.last)
            self._close(progress, record, started, due=True)
        rounds = self.experiment.rounds
        while progress.server_round < rounds and not self._stopped(progress):
            started = time.perf_counter()
            number = progress.server_round + 1
            record = self._train(progress, number)
            progress.server_round = number
            last = number == rounds or self._done()
            if last or number % self.experiment.settings["evaluation"]["every"] == 0:
                self._evaluate(progress, number, record)
            last = last or self._stopped(progress)
            self._watch_loss(progress, record)
            due = last or number % self.experiment.settings["checkpoints"]["every"] == 0
            self._close(progress, record, started, due=due)
        return progress

    def _train(self, progress: Progress, number: int) -> Round:
        config = self._config(number)
        out = self.server_step.configure_train(number, progress.arrays, config, self.grid)
        if not out and not getattr(self.strategy, "alone", False):
            raise UserError(
                f"round {number}: the strategy asks no client to train; check its fraction of clients"
            )
        received = self._exchange("train", number, out, progress)
        failed = {self._who(m): m.error.reason or "" for m in received if m.has_error()}
        if out and len(failed) == received.answered:
            reason = next(iter(failed.values()), None) or "no reply arrived in time"
            said = f"round {number}: no client could train; the first says: {_first_line(reason)}"
            raise NotEnoughReplies(said) from RuntimeError(reason)  # --debug shows the client's traceback
        replies = self.intake.admitted(number, out, received)
        if self.recording and out:
            self.run.save_updates(number, out[0].content, messages.by_client(replies, self.who))
        arrays, metrics = self.intake.trained(number, replies)
        if arrays is not None:
            progress.arrays = payload.conform(arrays, self.task.selection.shared)
        refused = {**failed, **(replies.refused or {}), **getattr(self.strategy, "refused", {})}
        for client, reason in sorted(refused.items()):
            self._tell("notice", f"round {number}: reply of client {client} not used: {_first_line(reason)}")
        record = Round(number, clients=received.answered - len(refused), refused=len(refused))
        self._diagnose(record, diagnosis.used_metrics(replies, refused, self.who))
        for key, value in (metrics or {}).items():
            if key == "loss" and not isinstance(value, list):
                record.train_loss = float(value)
            elif key not in (messages.EXAMPLES, messages.SECONDS, messages.SAMPLES):
                record.extra[f"train_{key}"] = value
        return record

    def _diagnose(self, record: Round, metrics: Mapping[int, Mapping[str, Any]]) -> None:
        """Count losses that are no numbers; name every client that says one once."""
        odd = diagnosis.odd_losses(metrics)
        new = [client for client in odd if client not in self._odd]
        self._odd.update(new)
        if odd:
            record.extra["odd_losses"] = len(odd)
        if new:
            self._tell("notice", diagnosis.of_losses(record.number, new, metrics))

    def _evaluate(self, progress: Progress, number: int, record: Round | None = None) -> Round:
        record = record or Round(number)
        metrics = self._client_metrics(progress, number) if self.on_clients else self.server_metrics(progress)
        record.accuracy, record.loss = metrics.pop("accuracy"), metrics.pop("loss")
        record.extra.update(metrics)
        progress.last = {"accuracy": record.accuracy, "loss": record.loss, **metrics}
        observe = getattr(self.strategy, "observe", None)
        if observe is not None:
            observe(progress.last)
        validation = metrics.get("validation_loss")
        if validation is not None:
            if validation < progress.best:
                progress.best, progress.stale = validation, 0
                self.run.save_best({"round": number, "arrays": progress.arrays, "loss": validation})
            else:
                progress.stale += 1
        return record

    def _watch_loss(self, progress: Progress, record: Round) -> None:
        """Say once that training diverges, and what to turn down."""
        loss = record.loss if record.loss is not None else record.train_loss
        start = progress.start.get("loss")
        if loss is None or start is None or self.diverged or not loss > _DIVERGED * max(1.0, start):
            return
        self.diverged = True
        rates = [
            f"{section}.{key} = {self.experiment[section].options[key]}"
            for section, keys in _RATES.items()
            for key in keys
            if key in self.experiment[section].options
        ]
        fix = f"lower {' or '.join(rates)}" if rates else "train in smaller steps"
        text = f"round {record.number}: the loss is {loss:,.6g} ({start:.3g} before training)"
        self._tell("notice", f"{text}: training diverges; {fix}")

    def server_metrics(self, progress: Progress) -> dict[str, float]:
        """The shared state on the test set, on every client's local part of it, on the validation split."""
        self.task.load(progress.arrays)
        found = server_metrics(self.task)
        if any(key.endswith(messages.UNMEASURED) for key in found):
            data = self.task.data
            count = {c: len(data.local_test(c)) for c in range(self.experiment.clients)}
            untested: dict[int, dict[str, Any]] = {c: {} for c, tests in count.items() if not tests}
            self.intake.name_left_out(progress.server_round, untested, lambda row: [NO_TESTS])
        return found

    def _client_metrics(self, progress: Progress, number: int) -> dict[str, float]:
        config = self._config(number)
        config["split"] = self.experiment.settings["evaluation"]["split"]
        out = list(self.strategy.configure_evaluate(number, progress.arrays, config, self.grid))
        if not out:
            raise UserError(
                "clients are to evaluate but the strategy asks none; set strategy.fraction_evaluate above 0 "
                'or evaluation.where = "server"'
            )
        replies = self.intake.admitted(number, out, self._exchange("evaluate", number, out, progress))
        for client, reason in (replies.refused or {}).items():
            self._tell("notice", f"round {number}: client {client} not evaluated: {_first_line(reason)}")
        # every client counts once: the field reports the mean over clients, in a fixed order
        found = over_clients(self.intake.evaluated(number, replies))
        for key in ("accuracy", "loss"):
            if key not in found:
                raise NotEnoughReplies(f"round {number}: no client reported its {key}")
        return found

    def _exchange(self, phase: str, number: int, out: Sequence[Message], progress: Progress) -> Replies:
        """Send messages, count their bytes, tell the hooks of every reply as it arrives."""
        self._tell("sent", number, phase, len(out))
        sizes: dict[int, int] = {}
        for message in out:
            content: RecordDict = message.content
            if id(content) not in sizes:
                sizes[id(content)] = messages.nbytes(content, self.task.half)
            progress.bytes_down += sizes[id(content)]

        def arrived(message: Message) -> None:
            if message.has_content():
                progress.bytes_up += messages.nbytes(message.content, self.task.half)
            self._tell("reply", number, phase, self._who(message), message)

        self.grid.on_reply = arrived
        if isinstance(self.grid, BaseGrid):
            # entries with weights of their own are the one mean that an engine cannot take
            folds = phase == messages.TRAIN and not self.task.own_weights and not self.recording
            self.grid.folding = weighting_of(self.strategy) if folds else None
        try:
            received = self.grid.send_and_receive(out)
            return received if isinstance(received, Replies) else Replies(received)
        finally:
            self.grid.on_reply = None

    def _who(self, message: Message) -> int:
        return self.who.client(message.metadata.src_node_id)

    def _config(self, number: int) -> ConfigRecord:
        arrays = self.task.data.arrays
        said = {messages.ATTRIBUTES: to_json(arrays.attributes)} if self.task.attributes else {}
        if arrays.ranges:
            said[messages.RANGES] = pixels.to_json(arrays.ranges)
        return ConfigRecord(
            {
                **said,
                messages.CLASSES: list(arrays.classes),  # a node's own data may have them in another order
                messages.ROUND: number,
                messages.SEED: self.experiment.seed,
                # before the first round, clients may fine-tune: at its rate
                messages.LR_SCALE: lr_scale(
                    self.experiment.settings["schedule"], max(number, 1), self.experiment.rounds
                ),
                messages.EXPERIMENT: self.experiment.json(),
                messages.FROZEN: self.task.frozen_digest,
                messages.CODE: code_digest(),
            }
        )

    def _stopped(self, progress: Progress) -> bool:
        patience = self.experiment.settings["evaluation"]["patience"]
        return self._done() or bool(patience and progress.stale >= patience)

    def _done(self) -> bool:
        done = getattr(self.strategy, "done", None)
        return bool(done()) if done is not None else False

    def notice(self, text: str) -> None:
        """Tell the hooks something that the user should know."""
        self._tell("notice", text)

    def _tell(self, event: str, *arguments: Any) -> None:
        for hook in self.hooks:
            getattr(hook, event)(*arguments)

    # -------------------------------------------------------------------- begin, checkpoint

    def _begin(self) -> Progress:
        begin = getattr(self.strategy, "begin", None)
        start: ArrayRecord | None = begin(self.task) if begin is not None else None
        tree, notices = self.run.latest_checkpoint()
        for text in notices:
            self._tell("notice", text)
        if tree is not None:
            progress = self._resume(tree)
            self.run.truncate(progress.server_round)
        else:
            progress = Progress(server_round=-1, arrays=start or self.task.initial_payload())
            if self.recording:
                self.run.save_start(progress.arrays)
            if self.run.history():
                self._tell("notice", "no checkpoint to resume from: starting again at round 0")
                self.run.truncate(-1)
        return progress

    def _resume(self, tree: dict[str, Any]) -> Progress:
        found = tree.get("identity", {})
        # rounds may have been added since (`fedsim.extending`)
        planned = replace(self.experiment, rounds=tree.get("rounds", self.experiment.rounds))
        changed = [what for what, digest in self._identity(planned).items() if found.get(what) != digest]
        if changed:
            raise UserError(
                f"{self.run.folder}: the checkpoint belongs to another experiment: {', '.join(changed)} "
                "changed since; start a new run"
            )
        restore(self.strategy, tree["strategy"])
        if isinstance(self.grid, BaseGrid):
            self.grid.states = dict(tree["clients"])
        python, numpy_state = tree["random"]
        random.setstate(python)
        np.random.set_state(numpy_state)
        return Progress(**tree["progress"])

    def _identity(self, experiment: Experiment) -> dict[str, str]:
        """What a checkpoint must agree with."""
        return {
            "the experiment": experiment.digest(),
            "the data": self.task.data.arrays.digest,
            "the frozen part of the model": self.task.frozen_digest,
        }

    def _close(self, progress: Progress, record: Round, started: float, *, due: bool) -> None:
        """Finish a round: tell the hooks, then checkpoint (a crash in between loses a line, no state)."""
        record.seconds = time.perf_counter() - started
        progress.seconds += record.seconds
        record.bytes_up, record.bytes_down = progress.bytes_up, progress.bytes_down
        self._tell("round", record)
        if due and self.resumable:
            self._checkpoint(progress)

    def _checkpoint(self, progress: Progress) -> None:
        tree = {
            "identity": self._identity(self.experiment),
            "rounds": self.experiment.rounds,
            "strategy": state_of(self.strategy),
            "clients": getattr(self.grid, "states", {}),
            "random": (random.getstate(), np.random.get_state()),
            "progress": vars(progress),
        }
        try:
            self.run.save_checkpoint(
                progress.server_round, tree, self.experiment.settings["checkpoints"]["keep"]
            )
        except Unstorable as error:
            self.resumable = False
            self._tell("notice", f"not resumable: attribute {error} cannot be stored in a checkpoint")


def lr_scale(schedule: dict[str, Any] | Any, server_round: int, rounds: int) -> float:
    """Factor on the client's learning rate in a round (1-based), a function of the global round alone."""
    warmup = schedule["warmup"]
    if server_round <= warmup:
        return float(server_round / (warmup + 1))
    done = (server_round - 1 - warmup) / max(1, rounds - warmup)  # 0 in the first round after warm-up
    final = schedule["final"]
    kind = schedule["kind"]
    if kind == "cosine":
        return float(final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done)))
    if kind == "linear":
        return float(final + (1 - final) * (1 - done))
    if kind == "step":
        return float(schedule["step_factor"] ** ((server_round - 1 - warmup) // schedule["step_every"]))
    return 1.0


def _first_line(text: str) -> str:
    return text.splitlines()[0] if text else text
