"""InfoPro's weights: λ₁ of the reconstruction and λ₂ of the task, linear in the window's number.

    r = i / (K - 2),   λ(i) = (1 - r)·first + r·last,   i = 0 ... K-2     (the last window has its own loss)

Tables: the released configurations of InfoPro (CIFAR-10; ImageNet).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedsim.errors import UserError

if TYPE_CHECKING:
    from fedsim.local_learning.chain import Chain
    from fedsim.local_learning.plans import Plan

Range = tuple[float, float]

_R32: dict[int, tuple[Range, Range]] = {
    2: ((5, 0), (1, 0)),
    4: ((6, 1), (0, 2)),
    8: ((5, 0), (0, 2)),
    16: ((5, 0.2), (0.05, 0.5)),
}
_R110: dict[int, tuple[Range, Range]] = {
    2: ((5, 0), (0.5, 0)),
    4: ((1, 0), (0, 1)),
    8: ((5, 0), (0, 1)),
    16: ((5, 0.5), (0, 1)),
}
_IMAGENET: tuple[Range, Range] = ((5, 5), (0.75, 0.75))


def weights_of(
    chain: Chain,
    ends: Plan,
    reconstruction: Sequence[float] | None = None,
    task: Sequence[float] | None = None,
    *,
    by_stage: bool = False,
) -> list[tuple[float, float]]:
    """(λ₁, λ₂) of every window but the last.

    Args:
        chain: small images have the table of ResNet-32, or 110 (the nearest K), large ones that of ImageNet.
        ends: the plan.
        reconstruction: λ₁ of the first and the last window, instead of the table's.
        task: λ₂ likewise.
        by_stage: r is the number of the next unit's stage over K - 2, as in the released code of MAN.

    Raises:
        UserError: a list that does not have two numbers.
    """
    for name, given in (("reconstruction", reconstruction), ("task", task)):
        if given is not None and len(given) != 2:
            raise UserError(
                f"[local] {name} = {list(given)} must be two numbers: of the first and last window"
            )
    blocks = len(ends)
    one, two = _table(chain, blocks)
    one, two = tuple(reconstruction or one), tuple(task or two)  # type: ignore[assignment]
    stages = [number for number, size in enumerate(chain.stages(), start=1) for _ in range(size)]
    found = []
    for block in range(blocks - 1):
        step = (
            stages[ends[block]] if by_stage else block
        )  # the next unit is ends[block] + 1; unit 0 is the stem
        ratio = step / (blocks - 2) if blocks > 2 else 0.0
        found.append((_between(one, ratio), _between(two, ratio)))
    return found


def _table(chain: Chain, blocks: int) -> tuple[Range, Range]:
    if max(chain.inputs[1:], default=0) > 96:
        return _IMAGENET
    table = _R110 if chain.stages() == (18, 18, 18) else _R32
    return table[min(table, key=lambda k: abs(k - blocks))]


def _between(ends: Range, ratio: float) -> float:
    return (1 - ratio) * ends[0] + ratio * ends[1]
