"""Which worker call runs which clients: aligned blocks of positions, the largest first.

A call costs some three milliseconds of a busy worker, so clients go in blocks; a block is a subtree of the
fixed tree of sums (`fedsim/sums.py`), so that its worker may add it up. The big blocks go first, small ones
fill the gaps at the end, and are cut until all workers would finish together.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

_COARSE, _FINE = 1, 4  #: blocks a worker gets at least if the work were cut evenly: at first, at the end
_TAIL = 0.3  #: share of the work that is cut finely
_SLACK = 0.02  #: by which the last worker may finish later than all of them on average
_MOST = 32  #: blocks of a worker that are never exceeded for the sake of that


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
    found = largest_first(coarse[:tail] + fine)
    while len(found) < _MOST * workers:
        latest, load = _last_to_finish(found, amount, workers)
        if load <= (1 + _SLACK) * total / workers or latest.level == 0:
            break
        halves = [half for half in latest.halves() if half.start < count]
        found = largest_first([block for block in found if block != latest] + halves)
    return found


def _last_to_finish(
    found: Sequence[Block], amount: Callable[[Block], float], workers: int
) -> tuple[Block, float]:
    """The last block of the worker that finishes last if whoever is free takes the next one, and its load."""
    free = [(0.0, number) for number in range(workers)]
    last: dict[int, Block] = {}
    for block in found:
        load, number = heapq.heappop(free)
        last[number] = block
        heapq.heappush(free, (load + amount(block), number))
    load, number = max(free)
    return last[number], load
