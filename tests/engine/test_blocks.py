"""Blocks cover every position once, are aligned subtrees, and leave the small ones for the end."""

from __future__ import annotations

import numpy as np
import pytest

from fedsim.engine.blocks import Block, blocks


@pytest.mark.parametrize("count", [1, 2, 5, 50, 64, 1000, 4097])
@pytest.mark.parametrize("workers", [1, 2, 7])
def test_every_position_is_in_one_block(count: int, workers: int) -> None:
    work = np.random.default_rng(count).exponential(size=count).tolist()
    cut = blocks(work, workers)
    assert sorted(p for block in cut for p in block.positions(count)) == list(range(count))
    assert all(block.start % 2**block.level == 0 for block in cut)
    assert len(cut) <= 64 * workers


def test_a_round_takes_a_dozen_calls_however_many_clients_there_are() -> None:
    for count in (50, 1000, 100_000):
        assert 6 <= len(blocks([1.0] * count, 2)) <= 16


def test_blocks_of_heavy_clients_are_pairs() -> None:
    assert max(block.level for block in blocks([1.0] * 50, 2, highest=1)) == 1


def test_workers_finish_together() -> None:
    """Whoever is free takes the next block: no worker does 2 % more than its share."""
    rng = np.random.default_rng(0)
    for work, slack in (([1.0] * 50, 1.02), (rng.exponential(size=200).tolist(), 1.02)):
        load = [0.0, 0.0]
        for block in blocks(work, 2):
            places = block.positions(len(work))
            load[int(np.argmin(load))] += sum(work[places.start : places.stop])
        assert max(load) <= slack * sum(work) / 2


def test_few_uneven_clients_are_cut_finer() -> None:
    """Ten clients of a Dirichlet split: an even share each leaves a worker 3 % behind, single clients 1 %."""
    work = [144.0, 96.0, 145.0, 144.0, 120.0, 129.0, 145.0, 142.0, 144.0, 94.0]
    load = [0.0, 0.0]
    for block in blocks(work, 2):
        places = block.positions(len(work))
        load[int(np.argmin(load))] += sum(work[places.start : places.stop])
    assert max(load) <= 1.01 * sum(work) / 2


def test_a_large_client_goes_first() -> None:
    work = [1.0] * 32
    work[21] = 30.0
    assert blocks(work, 2)[0] == Block(0, 21)
