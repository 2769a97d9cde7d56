"""Which worker call runs which clients: aligned blocks of positions, the largest first.

A block is a subtree of the fixed tree of sums (`fedsim/sums.py`), so that its worker may add it up. It is at
most a worker's even share of what is left when it is cut off, so that blocks get smaller and smaller: whoever
is free takes the next one, and nobody waits long for the last, though no client takes as long as it should.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_SMALLEST = 0.03  #: of a worker's even share of all work: no smaller block is needed
_FINER = (1, 2, 4, 8)  #: times that blocks are cut finer than that
_EVEN = 1.01  #: times the shortest possible time is short enough


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

    They are cut finer until the workers, each as fast as the others, would end at about the same time.

    Args:
        work: of each position, in any unit.
        workers: how many work at a time.
        highest: level that no block exceeds.
    """
    ends = np.concatenate([[0.0], np.cumsum(np.asarray(work, dtype=np.float64))])
    least = max(float(ends[-1]) / workers, float(np.max(work, initial=0.0)))
    for finer in _FINER:
        found, amounts = _cut(ends, workers * finer, highest)
        if _longest(amounts, workers) <= _EVEN * least:
            break
    return found


def _cut(ends: NDArray[np.float64], shares: int, highest: int) -> tuple[list[Block], list[float]]:
    """Blocks with at most an even share of what is left, the largest first, and their work."""
    count, total = len(ends) - 1, float(ends[-1])

    def amount(block: Block) -> float:
        places = block.positions(count)
        return float(ends[places.stop] - ends[places.start])

    found: list[Block] = []
    waiting = [Block(max(count - 1, 0).bit_length(), 0)]
    while waiting:
        block = waiting.pop()
        if block.start >= count:
            continue
        largest = max(total - ends[block.start], _SMALLEST * total) / shares
        if block.level == 0 or (block.level <= highest and amount(block) <= largest):
            found.append(block)
        else:
            waiting.extend(reversed(block.halves()))
    found.sort(key=amount, reverse=True)  # stable: equal ones in order of position
    return found, [amount(block) for block in found]


def _longest(amounts: Sequence[float], workers: int) -> float:
    """Work of the worker with the most, if whoever is free takes the next block."""
    taken = [0.0] * workers
    for amount in amounts:
        heapq.heapreplace(taken, taken[0] + amount)
    return max(taken)
