"""Every behaviour over every registered strategy: a new strategy is tested by the line that registers it.

Exceptions are listed with their reason; everything else must hold for all.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.serverapp.strategy import Strategy

from fedsim import registry
from fedsim._flwr import quiet
from fedsim.averaging import WeightedAverage
from fedsim.checkpoints import load, save
from fedsim.engine import ENGINES
from fedsim.strategy_state import restore, state_of
from fedsim.testing import Arrays, play
from strategies import STRATEGIES
from tests.helpers import run, tiny

CLIENTS = 7

#: constructor arguments that a strategy cannot do without
ARGUMENTS: dict[str, dict[str, Any]] = {
    "flwr-fedprox": {"proximal_mu": 0.1},
    "krum": {"num_malicious_nodes": 1},
    "multikrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 3},
    "bulyan": {"num_malicious_nodes": 1},
    "attribute-unlearning": {"leace": False},  # a phase after training, which toy clients do not know
}
#: sections that they cannot do without: what they unlearn must be in the data, clients speak their actions
TABLES: dict[str, dict[str, Any]] = {
    "unlearn": {"client": {"name": "unlearn", "base": {"lr": 0.1, "batch_size": 16}}},
    "attribute-unlearning": {"data": {"name": "tinted-digits"}, "detacher": {"attributes": ["tint"]}},
}
#: their default tuning is for CLIPs
CLIPS_ONLY: dict[str, dict[str, Any]] = {
    **{name: {"tuning": {"tokens": 4}} for name in ("promptfl", "promptfolio", "fedpgp")},
    "fedclip": {},
}
#: the server takes a step of its own, so equal replies are not simply adopted
SERVER_OPTIMISERS = {"fedadagrad", "fedadam", "fedyogi"}

START: Arrays = {
    "w": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3),
    "b.ü": np.array([0.5], dtype=np.float32),
}


def make(name: str) -> Strategy:
    with quiet():
        strategy: Strategy = registry.resolve("strategies", name).target(**ARGUMENTS.get(name, {}))
    return strategy


def noisy(client: int, arrays: Arrays, config: Any) -> tuple[Arrays, dict[str, float]]:
    rng = np.random.default_rng([client, int(config["server-round"])])
    moved = {k: v + rng.normal(0, 0.1, v.shape).astype(v.dtype) for k, v in arrays.items()}
    return moved, {"num-examples": 5 + client, "loss": 1.0}


def assert_same(name: str, left: Arrays, right: Arrays) -> None:
    """Ours to the bit; Flower's sums depend on the order of replies, so to rounding."""
    assert list(left) == list(right)
    for key in left:
        if isinstance(make(name), WeightedAverage):
            assert left[key].tobytes() == right[key].tobytes()
        else:
            np.testing.assert_allclose(left[key], right[key], atol=1e-6)


#: replays the record of a run, so it cannot play by itself (tests/strategies/test_unlearn.py)
PLAYABLE = [name for name in STRATEGIES if name != "federaser"]


@pytest.mark.parametrize("name", PLAYABLE)
class TestEveryStrategy:
    def test_is_documented_and_its_keys_can_be_listed(self, name: str) -> None:
        target = registry.resolve("strategies", name).target
        assert len(registry.summary(target)) > 10
        if issubclass(target, WeightedAverage):
            assert all(p.doc for p in registry.describe(target)), "every key has a line in Args"

    def test_equal_replies_are_adopted(self, name: str) -> None:
        goal = {k: v + np.float32(0.25) for k, v in START.items()}
        with quiet():
            played = play(make(name), START, lambda c, a, k: (goal, {"num-examples": c + 1}), clients=CLIENTS)
        for key, expected in goal.items():
            assert played.arrays[key].shape == expected.shape
            if name in SERVER_OPTIMISERS:  # a step in the same direction
                assert (played.arrays[key] > START[key]).all()
            else:
                np.testing.assert_allclose(played.arrays[key], expected, rtol=1e-6)

    def test_the_order_of_replies_changes_nothing(self, name: str) -> None:
        with quiet():
            straight = play(make(name), START, noisy, clients=CLIENTS, rounds=2)
            reverse = play(make(name), START, noisy, clients=CLIENTS, rounds=2, reorder=lambda r: r[::-1])
        assert_same(name, straight.arrays, reverse.arrays)

    def test_a_resumed_strategy_goes_on_as_if_nothing_had_happened(self, name: str, tmp_path: Path) -> None:
        with quiet():
            whole = play(make(name), START, noisy, clients=CLIENTS, rounds=4)
            first = play(make(name), START, noisy, clients=CLIENTS, rounds=2)
            save(tmp_path / "s", {"strategy": state_of(first.strategy)})
            second = make(name)
            restore(second, load(tmp_path / "s")["strategy"])
            rest = play(second, first.arrays, noisy, clients=CLIENTS, rounds=2, first_round=3)
        assert_same(name, whole.arrays, rest.arrays)

    @pytest.mark.parametrize("engine", ENGINES)
    def test_every_engine_gives_the_same(self, name: str, engine: str) -> None:
        with quiet():
            serial = play(make(name), START, noisy, clients=CLIENTS, rounds=2)
            other = play(make(name), START, noisy, clients=CLIENTS, rounds=2, engine=engine)
        assert_same(name, serial.arrays, other.arrays)
        assert [sorted(c) for c in serial.cohorts] == [sorted(c) for c in other.cohorts]

    def test_can_be_pickled(self, name: str) -> None:
        strategy = make(name)
        again = pickle.loads(pickle.dumps(strategy))
        assert state_of(again) == state_of(strategy)

    def test_runs_end_to_end_and_reproducibly(self, name: str, tmp_path: Path) -> None:
        strategy = {"name": name, **ARGUMENTS.get(name, {})}
        model = {"name": "tiny-clip"} if name in CLIPS_ONLY else {"name": "cnn", "width": 4}
        own = {**CLIPS_ONLY.get(name, {}), **TABLES.get(name, {})}
        tables = {"strategy": strategy, "model": model, **own}
        experiment = tiny("rounds=2", "partition.clients=7", **tables)
        with quiet():
            first = run(experiment, tmp_path / "a")
            second = run(experiment, tmp_path / "b")
        assert first.summary["digest"] == second.summary["digest"]
        assert first.summary["strategy"] == name
        assert np.isfinite(first.summary["loss"])


@pytest.mark.parametrize("name", [n for n in PLAYABLE if not STRATEGIES[n].startswith("flwr.")])
def test_bad_replies_are_refused(name: str) -> None:
    def answer(client: int, arrays: Arrays, config: Any) -> tuple[Arrays, dict[str, float]]:
        bad = {0: {"w": arrays["w"]}, 1: {k: v * np.nan for k, v in arrays.items()}}
        good = {k: v + 1 for k, v in arrays.items()}
        return bad.get(client, good), {"num-examples": 1}

    strategy = make(name)
    played = play(strategy, START, answer, clients=CLIENTS)
    assert set(strategy.refused) == {0, 1}  # type: ignore[attr-defined]
    np.testing.assert_allclose(played.arrays["w"], START["w"] + 1)
