"""What the server holds back and what a client sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedsim.data.federated import FederatedData, draw_split, load, split_lines


def loaded(**keys: object) -> FederatedData:
    options = {"clients": 6, "seed": 0, **keys}
    return load("digits", {}, "dirichlet", {"alpha": 0.3}, **options)  # type: ignore[arg-type]


def test_validation_is_stratified_and_belongs_to_no_client() -> None:
    data = loaded(validation=0.2)
    labels = np.asarray(data.arrays.train_y)
    assert not set(data.validation) & set(data.partition.indices)
    assert len(data.validation) + len(data.partition.indices) == len(labels)
    held, everything = np.bincount(labels[data.validation]), np.bincount(labels)
    np.testing.assert_allclose(held / everything, 0.2, atol=0.01)
    assert len(loaded().validation) == 0


def test_local_test_has_the_clients_class_mix() -> None:
    data = loaded()
    counts = data.class_counts()
    for client in range(6):
        rows = data.local_test(client)
        mix = np.bincount(np.asarray(data.arrays.test_y)[rows], minlength=10)
        wanted = counts[client] / counts[client].sum()
        assert len(np.unique(rows)) == len(rows)
        # as close as whole samples allow: off by less than one sample a class
        assert np.abs(mix - wanted * mix.sum()).max() <= 1.5
        np.testing.assert_array_equal(rows, data.local_test(client))


def test_counts_add_up() -> None:
    data = loaded(shots=3)
    counts = data.class_counts()
    assert counts.shape == (6, 10)
    assert counts.sum() == len(data.partition.indices)
    assert counts.max() == 3


@pytest.mark.parametrize("clients", [3, 500])
def test_pictures_of_a_split(clients: int, tmp_path: Path) -> None:
    counts = np.random.default_rng(0).integers(0, 9, (clients, 10))
    lines = split_lines(counts, [f"class{i}" for i in range(10)])
    assert max(map(len, lines)) <= 100
    assert len(lines) < 60
    assert f"{clients} clients, {counts.sum()} samples" in "\n".join(lines)
    draw_split(counts, [f"class{i}" for i in range(10)], tmp_path / "split.png")
    assert (tmp_path / "split.png").read_bytes().startswith(b"\x89PNG")
