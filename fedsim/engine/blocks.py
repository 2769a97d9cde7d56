"""Which worker call runs which clients: aligned blocks of positions, the largest first.

A call costs half a millisecond, and some five where all cores are busy training, so clients go in blocks;
a block is a subtree of the fixed tree of sums (`fedsim/sums.py`), so that its worker may add it up. The big
blocks go first and small ones fill the gaps at the end, so that all workers finish together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_COARSE, _FINE = 2, 8  #: blocks a worker gets at least if the work were cut evenly: at first, at the end
_TAIL = 1 / 3  #: share of the work that is cut finely


@dataclass(frozen=True)
class Block:
    """Positions index·2^level up to (index + 1)·2^level, as far as there are any."""

    level: int
    index: int

    @property
    def start(self) -> int:
        """Its first position."""
        return self.index << self.level

    def positions(self, count: int) -> range:
        """Its positions when there are `count` in all."""
        return range(self.start, min(count, (self.index + 1) << self.level))

    def halves(self) -> tuple[Block, Block]:
        """The two subtrees of a block of level 1 or more."""
        return Block(self.level - 1, 2 * self.index), Block(self.level - 1, 2 * self.index + 1)


def blocks(work: Sequence[float], workers: int, highest: int = 64) -> list[Block]:
    """Cut positions 0 … n-1 into blocks, in the order in which they should start.

    Args:
        work: of each position, in any unit.
        workers: how many work at a time.
        highest: level that no block exceeds.
    """
    count = len(work)
    ends = np.concatenate([[0.0], np.cumsum(np.asarray(work, dtype=np.float64))])
    total = float(ends[-1])

    def amount(block: Block) -> float:
        places = block.positions(count)
        return float(ends[places.stop] - ends[places.start])

    def cut(block: Block, largest: float) -> list[Block]:
        if block.start >= count:
            return []
        if block.level == 0 or (block.level <= highest and amount(block) <= largest):
            return [block]
        return [part for half in block.halves() for part in cut(half, largest)]

    def largest_first(some: list[Block]) -> list[Block]:
        return sorted(some, key=amount, reverse=True)  # stable: equal ones in order of position

    whole = Block(max(count - 1, 0).bit_length(), 0)
    coarse = largest_first(cut(whole, total / (_COARSE * workers)))
    tail, left = len(coarse), total * _TAIL
    while tail > 0 and left > 0:
        tail -= 1
        left -= amount(coarse[tail])
    fine = [part for block in coarse[tail:] for part in cut(block, total / (_FINE * workers))]
    return coarse[:tail] + largest_first(fine)
