"""What a training step will take, foreseen on `meta` tensors: nothing is computed, no data are read.

    total        most bytes alive at one time: parameters, gradients, the optimiser's state, auxiliary
                 networks, activations, the batch
    activations  total less what is alive between two steps
    saved        most bytes that autograd saves for backward passes at one time

Figures are for float32. On top of them come a library's own workspaces and, in a process, Python and torch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedsim.errors import UserError
from fedsim.local_learning.chain import Chain
from fedsim.local_learning.learner import LocallySupervised, default_plan
from fedsim.local_learning.meters import LiveMeter, SavedMeter
from fedsim.local_learning.plans import Plan, check_blocks, uniform
from fedsim.local_learning.windows import Batch
from fedsim.models.base import Classifier, set_train_mode
from fedsim.optimizers import make_optimizer

if TYPE_CHECKING:
    from fedsim.config import Experiment

Optimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Footprint:
    """Bytes of one training step; see the module's docstring.

    Attributes:
        total, activations, saved: see above.
        auxiliary: of the parameters of auxiliary networks, EMAs included.
    """

    total: int
    activations: int
    saved: int
    auxiliary: int


@dataclass
class Bench:
    """A model on `meta` and the batch that it is measured with.

    Args:
        model: tuned; it is copied.
        sample: inputs of a batch [n, ...], any device: shape and dtype matter.
        optimizer: makes the client's optimiser.
        below: see `Chain`.
        anchored: the client keeps a copy of what it was sent, for a proximal term.
    """

    model: Classifier
    sample: Tensor
    optimizer: Optimizer
    below: int = 0
    anchored: bool = False
    _found: dict[Any, Footprint] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model = copy.deepcopy(self.model).to("meta")
        self.sample = torch.empty_like(self.sample, device="meta")
        self.chain = Chain(self.model, self.sample, self.below)

    def learner(self, method: str, plan: Plan, options: Mapping[str, Any]) -> LocallySupervised:
        """On `meta`, ready to train."""
        made = LocallySupervised(
            self.model, method, plan=plan, sample=self.sample, below=self.below, **options
        )
        set_train_mode(self.model, training=True)
        return made

    def measure(self, method: str, plan: Plan, options: Mapping[str, Any] | None = None) -> Footprint:
        """Of a step of a method with a plan."""
        key = (method, plan, repr(sorted((options or {}).items())))
        if key not in self._found:
            self._found[key] = self._measured(self.learner(method, plan, options or {}))
        return self._found[key]

    def _measured(self, learner: LocallySupervised) -> Footprint:
        labels = torch.empty(len(self.sample), dtype=torch.int64, device="meta")
        train = [p for p in learner.parameters() if p.requires_grad]
        tool = self.optimizer(train)
        fixed = [*learner.parameters(), *learner.buffers()]
        for parameter in train:
            parameter.grad = torch.empty_like(parameter)
        tool.step()  # the optimiser's state is there afterwards
        tool.zero_grad(set_to_none=True)
        state = [v for entry in tool.state.values() for v in entry.values() if isinstance(v, Tensor)]
        anchors = [torch.empty_like(p) for p in self.model.parameters() if p.requires_grad and self.anchored]
        with LiveMeter([*fixed, *state, *anchors, self.sample, labels]) as live, SavedMeter(fixed) as saved:
            between = live.live
            learner.local_step(self.sample, labels, tool)
        tool.zero_grad(set_to_none=True)
        auxiliary = sum(p.numel() * p.element_size() for p in learner.auxiliary.parameters())
        return Footprint(live.peak, live.peak - between, saved.peak, auxiliary)

    # ------------------------------------------------------------------------- plans of even memory

    def costs(self, method: str, options: Mapping[str, Any] | None = None) -> Costs:
        """Saved bytes of every unit and of what stands behind it, for `balanced`.

        Windows that overlap (HPFF, MLAAN) take more than their last block: for them the balance is a guide.
        """
        learner = self.learner(method, tuple(range(len(self.chain))), options or {})
        fixed = [*learner.parameters(), *learner.buffers()]
        labels = torch.empty(len(self.sample), dtype=torch.int64, device="meta")
        batch = Batch(self.sample, labels)
        behind = [0] * len(self.chain)
        inputs = []
        with SavedMeter(fixed) as meter:
            x, upto = self.sample, []
            for unit in self.chain.units:
                inputs.append(x.numel() * x.element_size())
                x = unit.run(x)
                upto.append(meter.live)
            ends = [torch.empty(len(self.sample), *shape, device="meta") for shape in self.chain.outputs]
        for window in learner.windows:
            with SavedMeter(fixed) as meter:
                end = ends[window.stop - 1].requires_grad_()
                (window.objective or learner.own).backward(end, batch, 1.0, Tensor.backward)
            behind[window.stop - 1] = max(behind[window.stop - 1], meter.peak)
        learner.zero_grad(set_to_none=True)
        units = [now - before for now, before in zip(upto, [0, *upto], strict=False)]
        return Costs(tuple(units), tuple(behind), tuple(inputs))


def bench_of(experiment: Experiment, model: Classifier, sample: Tensor, below: int) -> Bench:
    """Where steps of an experiment's clients are measured: their batch, optimiser and proximal term.

    Args:
        experiment: of the clients.
        model: tuned.
        sample: one input as a batch has it [1, ...].
        below: see `Chain`.
    """
    client = experiment["client"].options
    mu = [experiment[section].options.get("proximal_mu", 0) for section in ("client", "strategy")]

    def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        name, momentum = client.get("optimizer", "sgd"), client.get("momentum", 0.9)
        return make_optimizer(parameters, name, lr=0.1, momentum=momentum)

    size = int(client.get("batch_size", 32))
    return Bench(model, sample.expand(size, *sample.shape[1:]), optimizer, below, max(mu) > 0)


@dataclass(frozen=True)
class Costs:
    """Saved bytes, one number per unit.

    Attributes:
        units: of the unit itself.
        behind: of the network behind it, if a block ended there.
        inputs: of what goes into it.
    """

    units: tuple[int, ...]
    behind: tuple[int, ...]
    inputs: tuple[int, ...]

    def block(self, start: int, end: int) -> int:
        """Of a block from unit `start` to unit `end`."""
        return self.inputs[start] + sum(self.units[start : end + 1]) + self.behind[end]

    def largest(self, plan: Plan) -> int:
        """Of the most expensive block of a plan."""
        starts = [0, *(end + 1 for end in plan[:-1])]
        return max(self.block(start, end) for start, end in zip(starts, plan, strict=True))


def balanced(costs: Costs, blocks: int) -> Plan:
    """The plan of K blocks whose most expensive block is as cheap as it can be (dynamic programming).

    `best[k][e]` is the smallest maximum over plans of k blocks that end at unit e:
    best[k][e] = min over s of max(best[k-1][s-1], block(s, e)).
    """
    n = len(costs.units)
    best: dict[tuple[int, int], tuple[int, Plan]] = {(1, e): (costs.block(0, e), (e,)) for e in range(n)}
    for k in range(2, blocks + 1):
        for end in range(k - 1, n):
            options = [
                (max(best[k - 1, s - 1][0], costs.block(s, end)), (*best[k - 1, s - 1][1], end))
                for s in range(k - 1, end + 1)
            ]
            best[k, end] = min(options, key=lambda option: option[0])
    return best[blocks, n - 1][1]


def balanced_below(costs: Costs, limit: int) -> Plan:
    """The balanced plan of fewest blocks none of which saves more than `limit` bytes.

    Raises:
        UserError: there is none; names the smallest limit that there is one for.
    """
    plans = [balanced(costs, blocks) for blocks in range(1, len(costs.units) + 1)]
    for plan in plans:
        if costs.largest(plan) <= limit:
            return plan
    smallest = min(map(costs.largest, plans))
    raise UserError(
        f"no plan keeps every block's saved activations below {limit / 1e6:.1f} MB; the smallest possible is "
        f"{smallest / 1e6:.1f} MB"
    )


# ------------------------------------------------------------------------------------ from a budget


def plan_for(bench: Bench, kind: str, method: str, blocks: int | None, options: Mapping[str, Any]) -> Plan:
    """A plan by the name that `[local] plan` gives it."""
    n = len(bench.chain)
    if kind == "units":
        if blocks not in {None, n}:
            raise UserError(f'[local] plan = "units" makes {n} blocks here: leave out blocks = {blocks}')
        return tuple(range(n))
    if kind == "uniform":
        check_blocks(bench.chain, blocks or 1)
        return uniform(n, blocks or min(4, n))
    if kind == "balanced":
        count = min(4, n) if blocks is None else blocks
        check_blocks(bench.chain, count)
        return balanced(bench.costs(method, options), count)
    return default_plan(bench.chain, blocks)


def within(
    bench: Bench, budget: float, methods: Sequence[tuple[str, Mapping[str, Any]]], kind: str, who: str
) -> tuple[str, Plan]:
    """The first of these that a step of fits into a budget: back-propagation, then each method in turn, with
    so few blocks that one fewer would not do.

    Args:
        bench: the model and the batch.
        budget: bytes, for everything that `Footprint.total` counts.
        methods: (name, options) in order of preference.
        kind: of plan.
        who: for the error message.

    Raises:
        UserError: nothing fits; names the smallest budget that would do.
    """
    units = len(bench.chain)
    whole = bench.measure("bp", (units - 1,)).total
    if whole <= budget:
        return "bp", (units - 1,)
    tried = [(whole, "bp", 1)]
    for name, options in methods:
        plan = _fewest(bench, budget, kind, name, options, tried)
        if plan is not None:
            return name, plan
    total, name, blocks = min(tried)
    raise UserError(
        f"{who} has {budget / 1e6:.2f} MB, the smallest that this model trains in is {total / 1e6:.2f} MB "
        f"({name}, {blocks} blocks, batches of {len(bench.sample)}): raise the budget or lower "
        "client.batch_size"
    )


def _fewest(
    bench: Bench,
    budget: float,
    kind: str,
    name: str,
    options: Mapping[str, Any],
    tried: list[tuple[int, str, int]],
) -> Plan | None:
    """A plan within a budget, of which one block fewer is not (None: every K takes more).

    Args:
        bench, budget, kind: see `within`.
        name: of the method.
        options: of the method.
        tried: gets (total, name, K) of everything that was measured.
    """
    found: dict[int, tuple[int, Plan]] = {}

    def fits(blocks: int) -> bool:
        if blocks not in found:
            try:
                plan = plan_for(bench, kind, name, blocks, options)
                found[blocks] = bench.measure(name, plan, options).total, plan
            except UserError:  # it cannot be built, such as a cascade of more blocks than there are
                return False
            tried.append((found[blocks][0], name, blocks))
        return found[blocks][0] <= budget

    possible = range(2, len(bench.chain) + 1)
    blocks = next(filter(fits, [*_ladder(len(bench.chain)), *possible]), None)
    if blocks is None:
        return None
    while blocks - 1 in possible and fits(blocks - 1):
        blocks -= 1
    return found[blocks][1]


def _ladder(units: int) -> list[int]:
    """Numbers of blocks to try first, ascending: 2, 3, 4, 6, 8, 12, 16, ... and every unit for itself."""
    steps = sorted({base * 2**power for power in range(10) for base in (2, 3)})
    return [*(step for step in steps if step < units), units] if units > 1 else []
