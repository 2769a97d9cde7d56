"""Attribute unlearning: representations that keep the task and lose an attribute, trained by a federation.

After "Efficient Attribute Unlearning" (Guo et al., arXiv 2202.13295), reconstructed from its abstract; the
schedule, LEACE and the audit are ours.

    rounds      phase         server sends             clients answer
    1 ... T     train         w, λ(t)                  w_k ← steps on CE + λ(t) · penalty(h, z)
    T+1         erase         w                        moments of h and z; server sets the eraser (LEACE)
    T+2 ...     head          w                        steps on CE, above the cut alone
    then        standardise   w                        moments of what is released, r(h)
    ...         audit         w, attackers             attackers trained on r(h); what they guess right

λ(t) is 0 for `warmup` rounds, then rises linearly over `ramp` rounds to `strength`: without, the task
collapses before it is learnt. All of it happens within the experiment's `rounds`: T is what the other phases
leave. What trains, where the cut is and which term is used stand in `[detacher]`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from fedsim import messages, payload
from fedsim.averaging import WeightedAverage
from fedsim.errors import UserError
from fedsim.ranges import Count, Fraction, Natural, NonNegative, Share
from fedsim.sums import TreeSum, WeightedSum, Weighting
from fedsim.task import Task
from fedsim.unlearning import audit
from fedsim.unlearning.cut import Detachable
from fedsim.unlearning.leace import leace
from fedsim.unlearning.moments import Moments, shapes

log = logging.getLogger("fedsim")

_ADDED = ("eraser.", "detacher.", "statistics.")  #: entries that unlearning adds to a model


class AttributeUnlearning(WeightedAverage):
    """Average models trained with a detacher, then erase (LEACE) and audit (after arXiv 2202.13295).

    Args:
        strength: weight λ of the detacher's term at the end.
        warmup: rounds without it.
        ramp: rounds over which it rises to `strength`.
        leace: erase what is linearly left at the cut, in closed form from the clients' moments.
        head_rounds: rounds that train what is above the cut after that.
        audit_rounds: exchanges of a federated audit with fresh attackers (0: none; the server measures the
            leak on its own data in any case).
        origin: file with the final state of a run, to start from; erasing may then be all there is to do.
        digest: of that state.
    """

    defaults: ClassVar[dict[str, dict[str, Any]]] = {
        "client": {"name": "attribute-unlearning"},
        "detacher": {"name": "mmd"},
        "evaluation": {"where": "server"},
    }
    reduction = "weighted-mean"
    transient = ("_round", "_task")

    def __init__(
        self,
        strength: NonNegative = 2.0,
        warmup: Natural = 3,
        ramp: Natural = 5,
        leace: bool = True,
        head_rounds: Natural = 1,
        audit_rounds: Natural = 0,
        origin: str | None = None,
        digest: str = "",
        fraction: Share = 1.0,
        min_clients: Count = 1,
        min_replies: Count = 1,
        fraction_evaluate: Fraction = 1.0,
        weighting: Weighting = "examples",
    ) -> None:
        super().__init__(fraction, min_clients, min_replies, fraction_evaluate, weighting)
        self.strength = strength
        self.warmup = warmup
        self.ramp = ramp
        self.leace = leace
        self.head_rounds = head_rounds
        self.audit_rounds = audit_rounds
        self.origin = origin
        self.digest = digest
        self.probes: dict[str, NDArray[Any]] = {}
        self.findings: dict[str, float] = {}
        self._task: Task | None = None

    # ----------------------------------------------------------------------------------- phases

    #: LEACE and the audit are the last rounds
    counts_rounds: ClassVar[bool] = True

    def begin(self, task: Task) -> ArrayRecord | None:
        """See what is to be unlearned, and how many rounds there are; the origin's state, if there is one.

        Raises:
            UserError: no attribute is named, the phases leave no round for training, or the origin does not
                fit.
        """
        if not isinstance(task.model, Detachable):
            raise UserError(
                '[strategy] "attribute-unlearning" needs attributes: set detacher.attributes = ["NAME"]; '
                f"the data have: {', '.join(a.name for a in task.data.arrays.attributes) or 'none'}"
            )
        self._task = task
        rounds = task.experiment.rounds
        if len(self._closing()) + (self.origin is None) > rounds:
            raise UserError(
                f"rounds = {rounds} leaves no round for training: LEACE, head and audit take "
                f"{len(self._closing())}; raise rounds, or lower strategy.head_rounds or audit_rounds"
            )
        self._warn_of_idle_terms(task, rounds - len(self._closing()))
        return None if self.origin is None else _start(task, self.origin, self.digest)

    def _warn_of_idle_terms(self, task: Task, training: int) -> None:
        """Say where the term will do less than its keys promise."""
        if task.experiment["detacher"].name == "none" or not self.strength or training <= 0:
            return
        reached = self.strength_at(training)
        if reached < self.strength:
            log.warning(
                "the detacher's strength reaches %g of %g: %d rounds of training are fewer than "
                "strategy.warmup + strategy.ramp = %d",
                reached, self.strength, training, self.warmup + self.ramp,
            )  # fmt: skip
        if not any(parameter.requires_grad for parameter in task.model.backbone.parameters()):
            log.warning("nothing below the cut is trained: the detacher changes nothing (LEACE erases)")

    def phase(self, server_round: int) -> str:
        """`train`, `erase`, `head`, `standardise` or `audit`.

        Raises:
            UserError: the loop is not fedsim's and there are phases after training.
        """
        closing = self._closing()
        if not closing:
            return "train"
        if self._task is None:
            raise UserError(
                "LEACE and the audit follow the last round of training, and this loop does not say which it "
                "is: set leace = false and audit_rounds = 0, or run it by fedsim"
            )
        after = server_round - 1 - (self._task.experiment.rounds - len(closing))
        return "train" if after < 0 else closing[after]

    def _closing(self) -> list[str]:
        """Phases after training, one a round."""
        erasing = ["erase", *["head"] * self.head_rounds] if self.leace else []
        auditing = ["standardise", *["audit"] * self.audit_rounds] if self.audit_rounds else []
        return erasing + auditing

    def strength_at(self, server_round: int) -> float:
        """λ in a round (1-based)."""
        risen = server_round - self.warmup
        if risen <= 0:
            return 0.0
        return self.strength * min(1.0, risen / self.ramp) if self.ramp else self.strength

    # ------------------------------------------------------------------------- Flower's Strategy

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Ask for what the round's phase is about."""
        phase = self.phase(server_round)
        if phase in ("train", "head"):
            config[messages.STRENGTH] = self.strength_at(server_round)
            config[messages.HEAD_ONLY] = phase == "head"
            return super().configure_train(server_round, arrays, config, grid)
        config[messages.RELEASED] = phase != "erase"
        kind = messages.AUDIT if phase == "audit" else messages.SECOND_MOMENTS
        out = self._configure(kind, server_round, arrays, config, grid, 1.0)
        if phase == "audit":
            out[0].content[messages.PROBES] = messages.arrays_of(self.probes)  # one content for all clients
        return out

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The mean of the models, or what the phase makes of the answers."""
        phase = self.phase(server_round)
        if phase in ("train", "head"):
            arrays, metrics = super().aggregate_train(server_round, replies)
            if metrics is not None:
                metrics["strength"] = self.strength_at(server_round) if phase == "train" else 0.0
            return arrays, metrics
        if phase == "audit":
            return None, self._audited(server_round, replies)
        moments = self._moments(server_round, replies)
        if phase == "erase":
            return self._erased(moments), MetricRecord({"moments": moments.count})
        self.probes = audit.new_probes(self._model().attributes, moments, seed=server_round)
        return None, MetricRecord({"moments": moments.count})

    # ---------------------------------------------------------------------------------- internals

    def _moments(self, server_round: int, replies: Iterable[Message]) -> Moments:
        """The sum of the clients' moments."""
        model = self._model()
        columns = sum(attribute.columns for attribute in model.attributes)
        like = {name: (shape, "float64") for name, shape in shapes(model.width, columns).items()}
        total, _ = self._sums(server_round, replies, like)
        return Moments.from_arrays(total)

    def _erased(self, moments: Moments) -> ArrayRecord:
        """The shared state with the eraser of these moments."""
        erasure = leace(moments)
        if erasure.shrinkage:
            log.warning(
                "LEACE: %d samples for %d features, so the covariance is shrunk by %.2f; more samples, or a "
                "cut with fewer features, would keep representations closer to what they were",
                moments.count, self._model().width, erasure.shrinkage,
            )  # fmt: skip
        self.findings["leace_shrinkage"] = erasure.shrinkage
        values = dict(messages.views_of(self._current().arrays))
        for part in ("mean", "left", "right", "keep"):
            values[f"eraser.{part}"] = getattr(erasure, part).astype(np.float32)
        return messages.arrays_of(values)

    def _audited(self, server_round: int, replies: Iterable[Message]) -> MetricRecord:
        """Average the attackers; the counts judge those that were sent out."""
        like = audit.shapes_of(self.probes)
        total, weighted = self._sums(server_round, replies, like)
        for name, attack in audit.attacks_of(total).items():
            key = name.replace("/", "_")
            self.findings[f"audit_{key}"] = attack.accuracy
            self.findings[f"audit_{key}_error"] = attack.error
        if weighted is not None:
            self.probes = weighted.mean({name: str(values.dtype) for name, values in self.probes.items()})
        return MetricRecord({k: v for k, v in self.findings.items() if k.startswith("audit_")})

    def _sums(
        self,
        server_round: int,
        replies: Iterable[Message],
        like: dict[str, tuple[tuple[int, ...], str]],
    ) -> tuple[dict[str, NDArray[Any]], WeightedSum | None]:
        """Sums of the replies' arrays, plain and weighted by samples (None: nobody has any)."""
        position = {client: i for i, client in enumerate(self._current().cohort)}
        plain, weighted = TreeSum(), TreeSum()
        for client, message in self._counted(self._valid(replies, like, server_round), server_round):
            values = messages.views_of(message.content.array_records[messages.ARRAYS])
            plain.add(WeightedSum.of(values, 1.0), position[client])
            weight = self.weight(client, message.content.metric_records[messages.METRICS])
            weighted.add(WeightedSum.of(values, weight) if weight > 0 else None, position[client])
        total = plain.total()
        assert total is not None  # `_valid` refuses a round without replies
        return total.arrays, weighted.total()

    def _counted(
        self, replies: Iterable[tuple[int, Message]], server_round: int
    ) -> list[tuple[int, Message]]:
        """Replies whose counts are none below 0; the others are refused."""
        good = []
        for client, message in replies:
            values = messages.views_of(message.content.array_records[messages.ARRAYS])
            if any((v < 0).any() for k, v in values.items() if k.rpartition("/")[2] in ("count", "counts")):
                self._current().refused[client] = "its counts are negative"
            else:
                good.append((client, message))
        self._require(server_round, [client for client, _ in good])
        return good

    def _model(self) -> Detachable:
        if self._task is None or not isinstance(self._task.model, Detachable):
            raise UserError("this phase was not begun by fedsim's loop")
        return self._task.model


def _start(task: Task, origin: str, digest: str) -> ArrayRecord:
    """The shared state of a run as the start of another one, without erasers and detachers of its own.

    Args:
        task: of the new run.
        origin: a safetensors file.
        digest: of its arrays; "" is not compared.

    Raises:
        UserError: it is not there, another one, or does not fit.
    """
    try:
        values = load_file(origin)
    except (OSError, SafetensorError) as error:
        raise UserError(f"[strategy] origin: cannot read '{origin}' ({error})") from error
    if digest and payload.digest(values) != digest:
        raise UserError(f"{origin} is not the state that this run is to begin with; start a new one")
    new = messages.views_of(task.initial_payload())
    kept = {name: array for name, array in values.items() if not name.startswith(_ADDED)}
    kept |= {name: array for name, array in new.items() if name.startswith(_ADDED)}
    record = messages.arrays_of(kept)
    try:
        payload.check(record, task.selection.shared)
    except ValueError as error:
        raise UserError(f"{origin} does not fit the model: {error}") from error
    return record
