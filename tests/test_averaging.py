"""The weighted mean: exact, ordered, and deaf to bad replies."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg, FedMedian

from fedsim.averaging import WeightedAverage, weighting_of
from fedsim.engine.simulate import simulate
from fedsim.errors import NotEnoughReplies, UserError
from fedsim.sums import TreeSum, WeightedSum
from fedsim.testing import play, toy_client_app


def leaf(rng: np.random.Generator) -> WeightedSum:
    return WeightedSum.of({"w": rng.normal(size=5).astype(np.float32)}, float(rng.integers(1, 50)))


def tree(leaves: list[WeightedSum | None]) -> WeightedSum | None:
    total = TreeSum()
    for position, item in enumerate(leaves):
        total.add(item, position)
    return total.total()


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 13])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_sums_over_aligned_blocks_give_the_same_bits(count: int, level: int) -> None:
    """A worker that sums its own block of 2^level clients changes nothing, whatever the cohort's size."""
    missing = {5}

    def leaves() -> list[WeightedSum | None]:
        rng = np.random.default_rng(7)
        made = [leaf(rng) for _ in range(count)]
        return [None if i in missing else made[i] for i in range(count)]

    whole = tree(leaves())
    blocks, size = TreeSum(), 2**level
    for start in sorted(range(0, count, size), key=lambda start: -start % 3):  # whichever comes first
        blocks.add(tree(leaves()[start : start + size]), start // size, level)
    folded = blocks.total()
    assert whole is not None
    assert folded is not None
    assert whole.weight == folded.weight
    assert whole.arrays["w"].tobytes() == folded.arrays["w"].tobytes()


@pytest.mark.parametrize(("together", "waiting"), [(16, 2**26), (4, 2**26), (16, 2**20), (2, 0)])
def test_leaves_added_in_one_pass_give_the_same_bits(
    together: int, waiting: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the layout of the arrays, with and without weights of rows, with holes; however many wait."""
    monkeypatch.setattr("fedsim.sums._TOGETHER", together)
    monkeypatch.setattr("fedsim.sums._WAITING", waiting)

    def client(number: int) -> tuple[dict[str, np.ndarray], float, dict[str, np.ndarray]]:
        rng = np.random.default_rng(number)
        values = {
            "large": rng.normal(size=(3, 40_000)).astype(np.float32),
            "fortran": np.asfortranarray(rng.normal(size=(5, 7)).astype(np.float16)),
            "strided": rng.normal(size=(6, 8))[::2],
            "scalar": np.array(rng.normal(), np.float32),
            "count": np.array(rng.integers(99)),
            "rows": rng.normal(size=(4, 2)).astype(np.float32),
        }
        return values, float(number % 4), {"rows": rng.integers(0, 3, 4).astype(float)}

    plain, inplace = TreeSum(), TreeSum()
    for position in (0, 1, 2, 3, 5, 4, 7, 8):
        values, weight, rows = client(position)
        plain.add(WeightedSum.of(values, weight, rows) if weight else None, position)
        inplace.add_leaf(values, weight, position, rows)
    one, other = plain.total(), inplace.total()
    assert one is not None
    assert other is not None
    assert one.weight == other.weight == 10
    for kind in ("arrays", "largest", "rows"):
        mine, theirs = getattr(one, kind), getattr(other, kind)
        assert {k: np.asarray(v).tobytes() for k, v in mine.items()} == {
            k: np.asarray(v).tobytes() for k, v in theirs.items()
        }


@pytest.mark.parametrize(("waiting", "clients"), [(2**26, 16), (2**25, 8), (0, 2)])
def test_leaves_that_wait_take_no_memory_and_then_that_of_their_sum(
    waiting: int, clients: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsim.sums._WAITING", waiting)
    values = {"w": np.ones(2**20, np.float32)}
    total = TreeSum()
    tracemalloc.start()
    for position in range(clients - 1):
        total.add_leaf(values, 1.0, position)
    before = tracemalloc.get_traced_memory()[1]
    total.add_leaf(values, 2.0, clients - 1)
    after = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert before < values["w"].nbytes / 8
    assert 2 * values["w"].nbytes < after < (2 + 1 / 3) * values["w"].nbytes


def test_mean_matches_float64_reference_and_casts_once() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(9, 4)).astype(np.float32)
    weights = rng.integers(1, 99, size=9).astype(float)

    def answer(client, arrays, config):  # type: ignore[no-untyped-def]
        return {"w": values[client]}, {"num-examples": int(weights[client])}

    played = play(WeightedAverage(), {"w": np.zeros(4, np.float32)}, answer, clients=9)
    expected = (values.astype(np.float64) * weights[:, None]).sum(0) / weights.sum()
    assert played.arrays["w"].dtype == np.float32
    np.testing.assert_array_equal(played.arrays["w"], expected.astype(np.float32))


def test_half_precision_mean_is_not_sloppy() -> None:
    """A thousand float16 tensors of 0.1: Flower's mean gives 0.1058, the right answer is float16(0.1)."""
    start = {"w": np.full(3, 0.1, np.float16)}
    played = play(WeightedAverage(), start, lambda c, a, k: (a, {"num-examples": 7}), clients=1000)
    assert played.arrays["w"].dtype == np.float16
    np.testing.assert_array_equal(played.arrays["w"], start["w"])


def test_integers_are_not_averaged() -> None:
    start = {"w": np.zeros(1, np.float32), "count": np.array(3)}

    def answer(client, arrays, config):  # type: ignore[no-untyped-def]
        return {**arrays, "count": np.array(3 + client)}, {"num-examples": 1}

    played = play(WeightedAverage(), start, answer, clients=3)
    assert played.arrays["count"].dtype == np.int64
    assert played.arrays["count"].shape == ()
    assert played.arrays["count"] == 5


def test_uniform_weighting_and_zero_examples() -> None:
    def answer(client, arrays, config):  # type: ignore[no-untyped-def]
        return {"w": np.full(2, float(client), np.float32)}, {"num-examples": [0, 10, 30][client]}

    start = {"w": np.zeros(2, np.float32)}
    assert play(WeightedAverage(), start, answer, clients=3).arrays["w"][0] == np.float32(70 / 40)
    assert play(WeightedAverage(weighting="uniform"), start, answer, clients=3).arrays["w"][0] == 1.0


def test_samples_seen_weighs_the_work_of_a_round_and_examples_what_a_client_has() -> None:
    def answer(client, arrays, config):  # type: ignore[no-untyped-def]
        said = {"num-examples": [100, 900][client], "samples": [64, 32][client]}
        return {"w": np.full(2, float(client), np.float32)}, said

    start = {"w": np.zeros(2, np.float32)}
    means = {
        weighting: play(WeightedAverage(weighting=weighting), start, answer, clients=2).arrays["w"][0]
        for weighting in ("examples", "samples-seen", "uniform")
    }
    assert means == {
        "examples": np.float32(0.9), "samples-seen": np.float32(32 / 96), "uniform": np.float32(0.5),
    }  # fmt: skip


def test_a_reply_that_says_nothing_of_what_it_is_weighed_by_is_named() -> None:
    def answer(client, arrays, config):  # type: ignore[no-untyped-def]
        return arrays, {"num-examples": 5} | ({"samples": 3} if client else {})

    strategy = WeightedAverage(weighting="samples-seen")
    play(strategy, {"w": np.zeros(3, np.float32)}, answer, clients=2)
    assert strategy.refused == {0: "'samples' is None, not a count"}


BAD = {
    "raises": lambda a: 1 / 0,
    "NaN": lambda a: {**a, "w": np.full_like(a["w"], np.nan)},
    "infinity": lambda a: {**a, "w": np.full_like(a["w"], np.inf)},
    "wrong names": lambda a: {"v": a["w"]},
    "missing name": lambda a: {},
    "wrong shape": lambda a: {"w": np.zeros(4, np.float32)},
    "wrong dtype": lambda a: {"w": a["w"].astype(np.float64)},
    "absurd size": lambda a: {"w": np.zeros(10**6, np.float32)},
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_replies_are_left_out_counted_and_named(kind: str) -> None:
    def answer(client, arrays, config):  # type: ignore[no-untyped-def]
        changed = BAD[kind](arrays) if client == 2 else {"w": arrays["w"] + client}
        return changed, {"num-examples": 1}

    start = {"w": np.zeros(3, np.float32)}
    strategy = WeightedAverage()
    played = play(strategy, start, answer, clients=4)
    assert played.arrays["w"].tolist() == [np.float32(4 / 3)] * 3
    assert set(strategy.refused) == {2}
    with pytest.raises(NotEnoughReplies, match="client 2"):
        play(WeightedAverage(min_replies=4), start, answer, clients=4)


@pytest.mark.parametrize("count", [None, float("nan"), -1])
def test_a_reply_without_a_usable_weight_is_refused(count: float | None) -> None:
    def answer(client, arrays, config):  # type: ignore[no-untyped-def]
        good = {"num-examples": 1}
        return arrays, good if client else ({} if count is None else {"num-examples": count})

    strategy = WeightedAverage()
    play(strategy, {"w": np.zeros(3, np.float32)}, answer, clients=2)
    assert "num-examples" in strategy.refused[0]


def test_a_missing_reply_does_not_shift_its_neighbours() -> None:
    """Leaving out client 1 equals the tree with a hole there, not the tree over three clients."""
    values = np.array([[1e16], [0.0], [1.0], [-1e16]])

    def answer(client, arrays, config):  # type: ignore[no-untyped-def]
        if client == 1:
            raise RuntimeError("gone")
        return {"w": values[client]}, {"num-examples": 1}

    played = play(WeightedAverage(), {"w": np.zeros(1)}, answer, clients=4)
    hole = tree([None if i == 1 else WeightedSum.of({"w": values[i]}, 1.0) for i in range(4)])
    assert hole is not None
    assert played.arrays["w"][0] == hole.arrays["w"][0] / 3


def test_order_of_replies_does_not_matter() -> None:
    rng = np.random.default_rng(3)
    values = rng.normal(size=(5, 6)).astype(np.float32)

    def answer(client, arrays, config):  # type: ignore[no-untyped-def]
        return {"w": values[client]}, {"num-examples": client + 1}

    results = set()
    for order in itertools.islice(itertools.permutations(range(5)), 0, 120, 17):
        played = play(
            WeightedAverage(),
            {"w": np.zeros(6, np.float32)},
            answer,
            clients=5,
            reorder=lambda r, order=order: [r[i] for i in order],
        )
        results.add(played.arrays["w"].tobytes())
    assert len(results) == 1


def test_sampling_is_a_function_of_seed_and_round() -> None:
    start = {"w": np.zeros(1, np.float32)}
    first = play(WeightedAverage(fraction=0.3), start, clients=20, rounds=4, seed=5)
    again = play(WeightedAverage(fraction=0.3), start, clients=20, rounds=4, seed=5)
    other = play(WeightedAverage(fraction=0.3), start, clients=20, rounds=4, seed=6)
    assert first.cohorts == again.cohorts
    assert first.cohorts != other.cohorts
    assert all(len(set(cohort)) == 6 for cohort in first.cohorts)
    assert len({tuple(cohort) for cohort in first.cohorts}) > 1


def test_too_few_clients_is_said_at_once() -> None:
    with pytest.raises(UserError, match="at least 5 clients but only 4"):
        play(WeightedAverage(min_clients=5), {"w": np.zeros(1, np.float32)}, clients=4)


def test_two_answers_of_one_client_count_once() -> None:
    start = {"w": np.zeros(1, np.float32)}

    def answer(client, arrays, config):  # type: ignore[no-untyped-def]
        return {"w": np.full(1, float(client), np.float32)}, {"num-examples": 1}

    strategy = WeightedAverage()
    played = play(strategy, start, answer, clients=3, reorder=lambda replies: [*replies, replies[2]])
    assert played.arrays["w"][0] == 1.0
    assert "answered twice" in strategy.refused[2]


def test_rows_that_belong_to_classes_are_averaged_over_their_owners() -> None:
    """Row 0: clients 0 and 1 by 3 : 1; row 1: client 1 alone; row 2: nobody, it stays; `b` has no rows."""
    counts = [[3, 0, 0], [1, 4, 0], [0, 0, 0]]
    start = {"w": np.full((3, 2), 7, np.float32), "b": np.zeros(2, np.float32)}

    def answer(client, arrays, config):  # type: ignore[no-untyped-def]
        moved = {k: np.full_like(v, client) for k, v in arrays.items()}
        return moved, {"num-examples": [3, 5, 2][client], "rows:w": counts[client], "loss": 1.0}

    played = play(WeightedAverage(), start, answer, clients=3)
    np.testing.assert_array_equal(played.arrays["w"], np.float32([[0.25, 0.25], [1, 1], [7, 7]]))
    np.testing.assert_array_equal(played.arrays["b"], np.float32([0.9, 0.9]))
    assert set(played.metrics[0]) == {"num-examples", "loss"}

    uniform = play(WeightedAverage(weighting="uniform"), start, answer, clients=3)
    np.testing.assert_allclose(uniform.arrays["w"][0], 0.2 / 1.2)


def test_row_weights_sum_over_blocks_like_everything_else() -> None:
    rng = np.random.default_rng(0)

    def leaves() -> list[WeightedSum]:
        rng = np.random.default_rng(1)
        return [
            WeightedSum.of(
                {"w": rng.normal(size=(4, 3)).astype(np.float32)},
                1.0,
                {"w": rng.integers(0, 3, 4).astype(float)},
            )
            for _ in range(7)
        ]

    whole, blocks = tree([*leaves()]), TreeSum()
    for index in range(4):
        blocks.add(tree([*leaves()[2 * index : 2 * index + 2]]), index, 1)
    folded = blocks.total()
    assert whole is not None
    assert folded is not None
    old = {"w": rng.normal(size=(4, 3))}
    one, other = (total.mean({"w": "float32"}, old)["w"] for total in (whole, folded))
    assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("counts", [[1, 2], [1, -1, 0], [1.0, float("nan"), 0.0], 3])
def test_bad_counts_of_rows_are_refused(counts: object) -> None:
    def answer(client, arrays, config):  # type: ignore[no-untyped-def]
        return arrays, {"num-examples": 1, "rows:w": [1, 1, 1] if client else counts}

    strategy = WeightedAverage()
    played = play(strategy, {"w": np.ones((3, 2), np.float32)}, answer, clients=3)
    assert "'rows:w' is no list of counts" in strategy.refused[0]
    np.testing.assert_array_equal(played.arrays["w"], 1)


def test_a_client_that_says_nothing_of_rows_weighs_them_alike() -> None:
    def answer(client, arrays, config):  # type: ignore[no-untyped-def]
        said = {"num-examples": 2, "rows:w": [2, 0]} if client else {"num-examples": 2}
        return {"w": np.full((2, 1), client, np.float32)}, said

    played = play(WeightedAverage(), {"w": np.zeros((2, 1), np.float32)}, answer, clients=2)
    np.testing.assert_allclose(played.arrays["w"][:, 0], [2 / 3, 0])


def test_only_strategies_that_declare_it_are_folded() -> None:
    """Whoever looks at single replies gets them; Flower's strategies, which subclass FedAvg, always do."""

    class Plain(WeightedAverage):
        pass

    class Trimmed(WeightedAverage):
        def combine(self, server_round, replies, like):  # type: ignore[no-untyped-def]
            return super().combine(server_round, replies[1:], like)

    class Weighed(WeightedAverage):
        def weight(self, client, metrics):  # type: ignore[no-untyped-def]
            return client + 1.0

    wrapped = DifferentialPrivacyServerSideFixedClipping(
        WeightedAverage(), noise_multiplier=0.0, clipping_norm=1.0, num_sampled_clients=2
    )
    assert weighting_of(Plain(weighting="uniform")) == "uniform"
    others = (Trimmed(), Weighed(), type("Grandchild", (Trimmed,), {})(), FedAvg(), FedMedian(), wrapped)
    assert [weighting_of(strategy) for strategy in others] == [None] * 6


def test_it_runs_in_flowers_own_loop_without_evaluation() -> None:
    """Flower's `start` aggregates evaluation replies even when no client was asked for any."""
    server, found = ServerApp(), []

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = WeightedAverage(fraction_evaluate=0.0)
        start = ArrayRecord([np.zeros(3, np.float32)])
        found.append(strategy.start(grid=grid, initial_arrays=start, num_rounds=2))

    simulate(server, toy_client_app(), 3)
    assert set(found[0].train_metrics_clientapp) == {1, 2}
    assert found[0].evaluate_metrics_clientapp == {}
