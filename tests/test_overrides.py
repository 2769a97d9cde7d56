"""Overrides that undo each other."""

from __future__ import annotations

import json

import pytest

from fedsim import config
from fedsim.errors import UserError
from fedsim.overrides import once


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("rounds=3", "rounds=5"),
        ("client.lr=0.1", " client.lr = 0.2"),
        ("client.lr=0.1", 'client={name="standard"}'),
        ('data={name="digits"}', "data.name=mnist-5k"),
    ],
)
def test_both_are_named(first: str, second: str) -> None:
    with pytest.raises(UserError) as caught:
        config.load("quickstart", [first, "seed=1", second])
    assert str(caught.value) == f"--set {first} and --set {second} set one key twice; keep one of them"


def test_the_same_twice_and_keys_that_look_alike_are_fine() -> None:
    given = ["rounds=3", "client.lr=0.1", "client.lr_scale=1", "rounds=3"]
    assert once(given) == given[:3]


@pytest.mark.parametrize("key", ["seed", "rounds", "partition.clients", "partition.seed", "data.size"])
def test_whole_numbers_have_64_bits(key: str) -> None:
    """Also of what `top_keys` and the platform do not know: `size` is a key of `npz:`."""
    overrides = ["data.name=npz:x.npz"] if key == "data.size" else []
    for number in (2**63, -(2**63) - 1, 99999999999999999999):
        with pytest.raises(UserError) as caught:
            config.load("quickstart", [*overrides, f"{key}={number}"])
        expected = f"--set {key}={number}: {key} = {number}: whole numbers have 64 bits at most"
        assert str(caught.value) == expected


def test_the_largest_seed_is_one(tmp_path: object) -> None:
    found = config.load("quickstart", [f"seed={2**63 - 1}"])
    assert config.from_json(found.json()).seed == 2**63 - 1
    assert json.loads(found.json())["seed"] == 2**63 - 1
