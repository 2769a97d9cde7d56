"""LocallySupervised: a model, cut into blocks, with what trains them.

model = LocallySupervised(resnet32(), method="man++", blocks=16)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for images, labels in batches:
    loss = model.local_step(images, labels, optimizer)
plain = model.inference_model()                        # the plain network, nothing else
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsim import registry
from fedsim.errors import UserError
from fedsim.local_learning import windows
from fedsim.local_learning.chain import Chain
from fedsim.local_learning.couplings import Follower, same_mode
from fedsim.local_learning.heads import needs_two
from fedsim.local_learning.methods import Division, Method
from fedsim.local_learning.objectives import Loss, Whole
from fedsim.local_learning.plans import Plan, check_blocks, check_plan, paper_plan, uniform
from fedsim.local_learning.windows import Backward, Batch
from fedsim.models.base import Classifier

Step = Literal["joint", "window"]


def cross_entropy(network: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of a batch."""
    return functional.cross_entropy(network(inputs), labels)


class LocallySupervised(nn.Module):
    """A classifier that is trained window by window.

    Args:
        model: the classifier; it is trained in place.
        method: name of `[local]`, or a function `(division, /, **options) -> windows`.
        blocks: K; by default as many as the plan has, or 4. With 1 every method is back-propagation.
        plan: ends of the blocks; by default the papers' cuts for this net and K, or else blocks of equal
            numbers of units. `fedsim.local_learning.memory.balanced` finds one of even memory.
        sample: inputs as a batch has them, on the model's device (default: a 32x32 RGB image).
        below: so many units of the backbone are not run (see `fedsim/features.py`).
        loss: of the model's tail (default: cross-entropy).
        options: keyword arguments of the method.

    Attributes:
        model: the classifier.
        auxiliary: networks of the windows, by names that do not depend on K.
        chain, ends, windows: what it is divided into.
        own: loss of the model's tail.

    Raises:
        UserError: the model cannot be divided so.
    """

    def __init__(
        self,
        model: Classifier,
        method: str | Method = "man++",
        blocks: int | None = None,
        *,
        plan: Plan | None = None,
        sample: Tensor | None = None,
        below: int = 0,
        loss: Loss = cross_entropy,
        **options: Any,
    ) -> None:
        super().__init__()
        if not isinstance(model, Classifier):
            raise UserError(
                f"a {type(model).__name__} is no fedsim.models.base.Classifier: wrap a backbone that has "
                "`units()` and its head as Classifier(backbone, head) (docs/local_learning.md)"
            )
        where = next(model.parameters()).device
        self.model = model
        self.chain = _chain_of_images(model, where, below) if sample is None else Chain(model, sample, below)
        if blocks is None and plan is None and method != "bp":
            check_blocks(self.chain, 2)
        self.ends = default_plan(self.chain, blocks) if plan is None else check_plan(self.chain, plan)
        if blocks not in (None, len(self.ends)):
            raise UserError(f"blocks = {blocks}, but the plan has {len(self.ends)}")
        whole = len(self.ends) == 1
        build = _method("bp" if whole else method)
        with torch.device(where):
            found = build(Division(self.chain, self.ends), **({} if whole else options))
        self.windows = windows.in_order(found)
        windows.check(self.windows, len(self.chain))
        self.auxiliary = nn.ModuleDict(
            {w.key(below): w.objective for w in self.windows if w.objective is not None}
        )
        self.own = Whole(self.chain, loss)
        self._needs_two = needs_two(self.auxiliary)
        self._owners = _last_window_of(self)

    @property
    def blocks(self) -> int:
        """K."""
        return len(self.ends)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits [n, classes] of the plain network."""
        logits: Tensor = self.model(inputs)
        return logits

    def accepts(self, count: int) -> bool:
        """Whether a batch of so many samples can be trained on: BatchNorm over vectors needs two."""
        return count > 1 or not self._needs_two

    def gradients(
        self,
        inputs: Tensor,
        labels: Tensor,
        backward: Backward = torch.Tensor.backward,
        after: Callable[[int], None] = lambda number: None,
    ) -> Tensor:
        """Leave every window's gradients in the parameters.

        Args:
            inputs: as the first unit takes them, [n, ...].
            labels: int64 [n].
            backward: called with every loss; it may scale it.
            after: called with the number of every window that is done.

        Returns:
            Detached loss of the model's tail, a scalar.

        Raises:
            UserError: a batch of one sample and heads with BatchNorm over vectors.
        """
        if not self.accepts(len(inputs)):
            raise UserError(
                "a batch of 1 sample cannot be normalised by the BatchNorm1d of these heads: use at least 2 "
                'samples a batch (drop the last one), or heads without it (method "greedy")'
            )
        same_mode(self.auxiliary)
        losses = windows.run(self.chain, self.windows, self.own, Batch(inputs, labels), backward, after)
        return losses[-1]

    def local_step(
        self,
        inputs: Tensor,
        labels: Tensor,
        optimizer: torch.optim.Optimizer,
        *,
        clip: float = 0.0,
        step: Step = "joint",
    ) -> Tensor:
        """One training step.

        Args:
            inputs: images as stored, [n, ...].
            labels: int64 [n].
            optimizer: over `self.parameters()`.
            clip: largest norm of all gradients together (0: no clipping).
            step: `joint`, one optimiser step after all windows (as the papers of MAN, HPFF, InfoPro);
                `window`, a step for the parameters of every window as soon as no later one adds to their
                gradients, which are then freed (as DGL).

        Returns:
            Detached loss of the model's tail, a scalar.

        Raises:
            UserError: a batch of 1 for heads that need two; clipping of all gradients with steps in between.
        """
        if step not in get_args(Step) or clip < 0:
            raise UserError(f'step is "joint" or "window" and clip at least 0, not {step!r} and {clip}')
        if clip > 0 and step == "window":
            raise UserError('clipping over all windows needs all gradients: use step = "joint", or clip = 0')
        optimizer.zero_grad(set_to_none=True)
        if step == "joint":
            loss = self.gradients(inputs, labels)
            if clip > 0:
                nn.utils.clip_grad_norm_(self.parameters(), clip)
            optimizer.step()
            return loss
        return self.gradients(inputs, labels, after=lambda number: self._step_of(number, optimizer))

    def inference_model(self) -> Classifier:
        """A copy of the plain network in eval mode: no auxiliary part, the same keys as before."""
        return copy.deepcopy(self.model).eval()

    def trainable(self) -> list[nn.Parameter]:
        """Auxiliary parameters that train."""
        return [p for p in self.auxiliary.parameters() if p.requires_grad]

    def rebuild_followers(self) -> None:
        """Every EMA becomes the unit that it follows, as it is now."""
        for module in self.auxiliary.modules():
            if isinstance(module, Follower):
                module.rebuild()

    def _step_of(self, number: int, optimizer: torch.optim.Optimizer) -> None:
        """Step and free what window `number` is the last to touch; other gradients wait."""
        waiting = {}
        for parameter, last in self._owners.items():
            if last != number and parameter.grad is not None:
                waiting[parameter] = parameter.grad
                parameter.grad = None
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for parameter, gradient in waiting.items():
            parameter.grad = gradient


def default_plan(chain: Chain, blocks: int | None) -> Plan:
    """The papers' cuts for this net and K, or else blocks of equal numbers of units."""
    count = min(4, len(chain)) if blocks is None else blocks
    check_blocks(chain, count)
    return paper_plan(chain, count) or uniform(len(chain), count)


def _chain_of_images(model: Classifier, where: torch.device, below: int) -> Chain:
    """A chain for the usual inputs, 32x32 RGB images."""
    try:
        return Chain(model, torch.zeros(1, 3, 32, 32, dtype=torch.uint8, device=where), below)
    except (RuntimeError, ValueError, IndexError) as error:
        raise UserError(
            f"this model does not take 32x32 RGB images ({str(error).splitlines()[0]}): give "
            "LocallySupervised one of its inputs, sample=x[:1]"
        ) from error


def _method(method: str | Method) -> Method:
    return registry.resolve("local", method).target if isinstance(method, str) else method


def _last_window_of(learner: LocallySupervised) -> Mapping[nn.Parameter, int]:
    """The last window that adds to a parameter's gradient."""
    found: dict[nn.Parameter, int] = {}
    chain, model = learner.chain, learner.model
    named = dict(model.backbone.named_parameters())
    top = [p for name, p in named.items() if not any(unit.owns(name) for unit in chain.units)]
    for number, window in enumerate(learner.windows):
        units = chain.units[window.start : window.stop]
        touched = [p for name, p in named.items() if any(unit.owns(name) for unit in units)]
        if window.objective is None:
            touched += [*top, *model.head.parameters()]
        else:
            touched += window.objective.parameters()
        found |= dict.fromkeys(touched, number)
    return found
