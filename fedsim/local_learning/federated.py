"""What every client of a federation trains with: method and K by its memory budget, its auxiliary networks.

    [local] name, blocks, ...   ─┐
    [local] budgets (client i)   ├─> choice(i) = (method, plan) ─> learner: auxiliary networks over the one
    node config memory-budget   ─┘                                 resident model, one set per choice

The backbone's state does not know of any of this: its keys depend neither on K nor on the method. Auxiliary
parameters are `personal` (kept by the client), `shared` (averaged over the clients that have them) or
`reinit` (new in every round). Decoders have seen raw images and never leave a client; BatchNorm statistics of
copies are used by nothing. An EMA is the unit that it follows, as the server sent it, at the start of a round
(`rebuild`), or goes on from where the other auxiliary parameters come from (`carry`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fedsim.errors import UserError
from fedsim.local_learning.couplings import begin_as_live
from fedsim.local_learning.learner import LocallySupervised
from fedsim.local_learning.memory import bench_of, plan_for, within
from fedsim.local_learning.objectives import Loss
from fedsim.local_learning.plans import Plan, by_name, check_blocks
from fedsim.models.base import Classifier

if TYPE_CHECKING:
    from fedsim.config import Experiment

FALLBACKS = ("dgl", "greedy")  #: methods of smaller and smaller auxiliary networks
_MEGABYTE = 1e6


@dataclass(frozen=True)
class Choice:
    """How one client trains.

    Attributes:
        method: name of `[local]`.
        plan: ends of its blocks.
    """

    method: str
    plan: Plan


class Local:
    """Choices and learners of the clients of one experiment, over one resident model.

    Args:
        experiment: its `[local]` is not plain back-propagation.
        model: the resident model.
        sample: one input as a batch has it [1, ...], on the model's device.
        below: see `Chain`.
        loss: of the task.

    Attributes:
        store: shared auxiliary parameters by name, of all choices; nothing unless they are shared.

    Raises:
        UserError: the model cannot be divided so, or a client's budget is too small for it.
    """

    def __init__(
        self, experiment: Experiment, model: Classifier, sample: Tensor, below: int, loss: Loss
    ) -> None:
        section = experiment["local"]
        self.keys = section.common
        self.seed = experiment.seed
        self.model = model
        self.sample = sample
        self.below = below
        self.loss = loss
        fallbacks = self.keys.get("fallbacks", FALLBACKS)
        self.methods = list(dict.fromkeys([section.name, *fallbacks]))
        self.options = {name: section.options if name == section.name else {} for name in self.methods}
        budgets = self.keys.get("budgets", [])
        if budgets and self.keys.keys() & {"blocks", "cuts"}:
            raise UserError("[local] budgets decide how many blocks a client has: leave out blocks and cuts")
        self.bench = bench_of(experiment, model, sample, below)
        known = enumerate(budgets[: experiment.clients])
        self._choices = [self._affordable(mb, f"client {client}") for client, mb in known] or [self._fixed()]
        # all of them now: copies are of the units as they are before any training, in every process
        self._learners = {choice: self._made(choice) for choice in self._choices}
        self._start = {choice: _clone(made.auxiliary) for choice, made in self._learners.items()}
        self.store: dict[str, Tensor] = {}
        for choice in reversed(self._choices):
            self._now = choice
            if self.keys["auxiliary"] == "shared":
                self.store |= {name: value.clone() for name, value in self._travelling().items()}

    @property
    def differs(self) -> bool:
        """Whether clients share different parts of their auxiliary networks."""
        return bool(self.store) and len(set(self._choices)) > 1

    # ------------------------------------------------------------------------------------ choices

    def choice(self, client: int) -> Choice:
        """Method and plan of a client."""
        return self._choices[client % len(self._choices)]

    def _fixed(self) -> Choice:
        """The choice of all clients where nobody has a budget."""
        name = self.methods[0]
        blocks, kind = self.keys.get("blocks"), self.keys["plan"]
        if name == "bp":  # only to be measured
            return Choice(name, (len(self.bench.chain) - 1,))
        check_blocks(self.bench.chain, blocks or 2)
        if "cuts" in self.keys:
            plan = by_name(self.bench.chain, self.keys["cuts"])
            if blocks not in {None, len(plan)}:
                raise UserError(f"[local] cuts make {len(plan)} blocks: leave out blocks = {blocks}")
            return Choice(name, plan)
        return Choice(name, plan_for(self.bench, kind, name, blocks, self.options[name]))

    def _affordable(self, megabytes: float, who: str) -> Choice:
        methods = [(name, self.options[name]) for name in self.methods]
        return Choice(*within(self.bench, megabytes * _MEGABYTE, methods, self.keys["plan"], who))

    # ----------------------------------------------------------------------------------- learners

    def _made(self, choice: Choice) -> LocallySupervised:
        """The learner of a choice; its random weights follow from the experiment's seed."""
        devices = [self.sample.device] if self.sample.is_cuda else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.seed)
            return LocallySupervised(
                self.model,
                choice.method,
                plan=choice.plan,
                sample=self.sample,
                below=self.below,
                loss=self.loss,
                **self.options.get(choice.method, {}),  # nothing for "bp", where all fits a budget
            )

    def begin(self, client: int, kept: Mapping[str, Tensor]) -> LocallySupervised:
        """Make `learner` that of a client; the resident model holds what the server sent.

        Args:
            client: which.
            kept: what `kept` returned after its last round; what its present choice has no use for is left
                aside.
        """
        self._now = self.choice(client)
        self.learner.auxiliary.train()
        self.learner.auxiliary.load_state_dict(self._start[self._now])
        mine = self._parameters()
        if self.keys["auxiliary"] != "shared" and not mine.keys() & kept.keys():
            begin_as_live(self.learner.auxiliary)  # new, perhaps after many rounds: not the units of round 0
        with torch.no_grad():
            for source in (kept, self.store):
                for name in mine.keys() & source.keys():
                    mine[name].copy_(source[name])
        if self.keys["ema"] == "rebuild":
            self.learner.rebuild_followers()
        return self.learner

    @property
    def learner(self) -> LocallySupervised:
        """That of the client that trains."""
        return self._learners[self._now]

    @property
    def method_number(self) -> int:
        """0: back-propagation, 1: the method of `[local]`, 2 ...: its fallbacks."""
        name = self._now.method
        return 0 if name == "bp" else 1 + self.methods.index(name)

    def end(self) -> None:
        """Put what the client shares of its auxiliary parameters into the store."""
        mine = self._travelling()
        for name in self.owned():
            self.store[name].copy_(mine[name])

    def owned(self) -> set[str]:
        """Names in the store that the present client trains."""
        return self.store.keys() & self._travelling().keys()

    def kept(self) -> dict[str, Tensor]:
        """What the present client keeps until its next round."""
        mine = self._parameters()
        if self.keys["auxiliary"] == "personal":
            return {name: value for name, value in mine.items() if self._carried(name)}
        if self.keys["auxiliary"] == "shared":
            return {name: value for name, value in mine.items() if _private(name)}
        return {}

    def _parameters(self) -> dict[str, Tensor]:
        """Of the present client's auxiliary networks; those of two methods have nothing in common."""
        named = self.learner.auxiliary.named_parameters()
        return {f"{self._now.method}.{name}": parameter.detach() for name, parameter in named}

    def _carried(self, name: str) -> bool:
        return self.keys["ema"] == "carry" or not _of_ema(name)

    def _travelling(self) -> dict[str, Tensor]:
        mine = self._parameters()
        return {n: value for n, value in mine.items() if self._carried(n) and not _private(n)}


def _clone(networks: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in networks.state_dict().items()}


def _of_ema(name: str) -> bool:
    """Parameters of a `Follower`."""
    return ".ema." in name or ".emas." in name


def _private(name: str) -> bool:
    """Parameters that have seen raw inputs as targets."""
    return ".decoder." in name
