"""Where a chain is cut: the papers' tables, equal numbers of units, names of units.

A plan is a tuple of ends: the last unit of every block, ascending; the last of them is the chain's last unit.
Plans that balance memory need a meter: `fedsim/local_learning/memory.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedsim.errors import UserError, nearest
from fedsim.local_learning.chain import HOW_TO_DIVIDE

if TYPE_CHECKING:
    from fedsim.local_learning.chain import Chain

Plan = tuple[int, ...]

_R110_16 = ((1, (1, 4, 7, 10, 13, 16)), (2, (1, 4, 7, 11, 15)), (3, (1, 5, 9, 13)))
_R110_32_EARLY = (1, 2, 4, 5, 7, 9, 11, 13, 14, 16, 17)
_R110_32 = ((1, _R110_32_EARLY), (2, _R110_32_EARLY), (3, (1, 3, 4, 6, 7, 9, 11, 13, 15)))

#: blocks per stage -> K -> (stage, indices of the residual blocks that a cut follows), both as in the papers:
#: stages count from 1, blocks from 0. CIFAR: InfoPro, MAN, HPFF, MLAAN; ImageNet: MAN, MAN++, HPFF (code).
PAPERS: dict[tuple[int, ...], dict[int, tuple[tuple[int, tuple[int, ...]], ...]]] = {
    (5, 5, 5): {  # ResNet-32
        2: ((2, (1,)),),
        3: ((1, (4,)), (2, (4,))),
        4: ((1, (2,)), (2, (1,)), (3, (0,))),
        8: ((1, (0, 2, 4)), (2, (1, 3)), (3, (0, 2))),
    },
    (18, 18, 18): {  # ResNet-110
        2: ((2, (8,)),),
        3: ((1, (17,)), (2, (17,))),
        4: ((1, (11,)), (2, (7,)), (3, (3,))),
        8: ((1, (4, 11)), (2, (0, 7, 14)), (3, (3, 10))),
        16: _R110_16,
        32: _R110_32,
    },
    (3, 4, 23, 3): {  # ResNet-101
        2: ((2, (0,)),),
        4: ((2, (2,)), (3, (8, 16))),
        8: ((2, (0,)), (3, (1, 5, 9, 13, 17, 21))),
    },
    (3, 8, 36, 3): {  # ResNet-152
        2: ((2, (5,)),),
        4: ((2, (6,)), (3, (13, 25))),
        8: ((2, (0,)), (3, (1, 5, 9, 13, 17, 21))),
    },
}


def paper_plan(chain: Chain, blocks: int) -> Plan | None:
    """The papers' cuts for this net and K; None where they have none. All units: every unit for itself."""
    stages = chain.stages()
    if blocks == len(chain):
        return tuple(range(len(chain)))
    table = PAPERS.get(stages, {}).get(blocks)
    if table is None:
        return None
    before = [1 + sum(stages[:number]) for number in range(len(stages))]  # the stem is unit 0
    cuts = [before[stage - 1] + index for stage, indices in table for index in indices]
    return (*cuts, len(chain) - 1)


def uniform(units: int, blocks: int) -> Plan:
    """Blocks of equal numbers of units; the first ones have one more where they do not divide."""
    size, more = divmod(units, blocks)
    ends = [size * (k + 1) + min(k + 1, more) - 1 for k in range(blocks)]
    return tuple(ends)


def check_blocks(chain: Chain, blocks: int) -> None:
    """Raise UserError unless the chain can be divided into so many blocks."""
    if blocks < 1:
        raise UserError(f"[local] blocks = {blocks} must be at least 1")
    if blocks > len(chain) == 1:
        raise UserError(
            f"[local] blocks = {blocks}, but this backbone is a single unit and cannot be cut: "
            f"{HOW_TO_DIVIDE}"
        )
    if blocks > len(chain):
        raise UserError(
            f"[local] blocks = {blocks}, but this backbone has {len(chain)} units that a cut may follow "
            f"({', '.join(chain.names[:4])}, ...); give at most {len(chain)}"
        )


def check_plan(chain: Chain, plan: Plan) -> Plan:
    """The plan, if it is one of this chain: ascending ends, the last unit at the end.

    Raises:
        UserError: it is not.
    """
    last = len(chain) - 1
    if not plan or list(plan) != sorted(set(plan)) or plan[0] < 0 or plan[-1] != last:
        raise UserError(
            "a plan has the numbers of the units that blocks end at, ascending, up to the last "
            f"({last} here), not {plan}"
        )
    return plan


def by_name(chain: Chain, cuts: Sequence[str]) -> Plan:
    """A plan whose blocks end at the named units (`["blocks.4", "blocks.9"]`; the last end is given).

    Raises:
        UserError: a name is inside a unit, which may not be separated, or is unknown; names out of order.
    """
    ends = [_unit_called(chain, name) for name in cuts]
    last = len(chain) - 1
    if ends != sorted(set(ends)):
        raise UserError(f"[local] cuts = {list(cuts)} must name different units in the order of the backbone")
    return tuple(ends) if ends and ends[-1] == last else (*ends, last)


def _unit_called(chain: Chain, name: str) -> int:
    name = name.removeprefix("backbone.")
    if name in chain.names:
        return chain.names.index(name)
    for number, unit in enumerate(chain.units):
        if unit.owns(name):
            raise UserError(
                f"[local] cuts: '{name}' is inside unit {number} ({chain.names[number]}), which runs as a "
                f"whole; cut behind it: '{chain.names[number]}'"
            )
    raise UserError(f"[local] cuts: this backbone has no unit '{name}': {nearest(name, chain.names)}")
