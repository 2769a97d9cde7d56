"""Locally supervised clients in a federation: what travels, what stays, and who has how many blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsim import messages, payload
from fedsim.averaging import WeightedAverage
from fedsim.building import build
from fedsim.errors import UserError
from fedsim.local_learning import METHODS
from fedsim.local_learning.federated import Local
from fedsim.task import Task
from fedsim.testing import play
from tests.helpers import StopAt, run, tiny

MODEL = {"name": "mlp", "hidden": 16, "layers": 4}


def federation(*overrides: str, **local: Any) -> Any:
    return tiny("rounds=2", *overrides, model=MODEL, local={"name": "man++", "blocks": 3, **local})


def local_of(task: Task) -> Local:
    assert task.local is not None
    return task.local


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"infopro"}))
def test_the_backbone_alone_travels(method: str, tmp_path: Path) -> None:
    """By default the shared state is that of a plain run, whatever the method."""
    plain = build(tiny(model=MODEL))
    task = build(federation(name=method))
    assert task.selection == plain.selection
    assert payload.digest(messages.views_of(task.initial_payload())) == payload.digest(
        messages.views_of(plain.initial_payload())
    )
    summary = run(federation(name=method), tmp_path).summary
    assert summary["bytes_up"] == 2 * 4 * sum(e.nbytes for e in plain.selection.shared)


def test_checkpointed_clients_end_where_plain_ones_end(tmp_path: Path) -> None:
    plain = run(tiny("rounds=2", model=MODEL), tmp_path / "a").summary
    again = run(federation(name="checkpointed-bp"), tmp_path / "b").summary
    assert again["digest"] == plain["digest"]


@pytest.mark.parametrize("auxiliary", ["personal", "shared", "reinit"])
@pytest.mark.parametrize("ema", ["rebuild", "carry"])
def test_runs_are_reproducible_and_can_be_resumed(auxiliary: str, ema: str, tmp_path: Path) -> None:
    from fedsim.finish import resume

    experiment = federation("rounds=3", auxiliary=auxiliary, ema=ema)
    whole = run(experiment, tmp_path / "a").summary
    with pytest.raises(KeyboardInterrupt):
        run(experiment, tmp_path / "b", StopAt(2))
    resumed = resume(tmp_path / "b" / "tiny").summary
    assert resumed["digest"] == whole["digest"]
    assert resumed.get("digest_personal") == whole.get("digest_personal")
    kept = bool(whole.get("digest_personal") not in (None, payload.digest({})))
    assert kept == (auxiliary == "personal")


def test_where_auxiliary_networks_live_matters(tmp_path: Path) -> None:
    digests = {
        (auxiliary, ema): run(federation(auxiliary=auxiliary, ema=ema), tmp_path / auxiliary / ema).summary[
            "digest"
        ]
        for auxiliary in ("personal", "shared", "reinit")
        for ema in ("rebuild", "carry")
    }
    assert len(set(digests.values())) >= 5  # without anything kept, carrying on begins anew, too


def test_a_client_begins_with_what_it_kept_and_a_rebuilt_ema() -> None:
    task = build(federation())
    local = local_of(task)
    learner = local.begin(0, {})
    coupling = learner.auxiliary["u0"].coupling
    fresh = coupling.bias[0].weight.clone()
    with torch.no_grad():
        coupling.bias[0].weight.add_(1.0)
        coupling.ema.copy[0].weight.add_(1.0)
    kept = {name: value.clone() for name, value in local.kept().items()}
    assert "man++.u0.coupling.bias.0.weight" in kept
    assert not any(".ema." in name for name in kept)
    with torch.no_grad():
        task.model.backbone.more[0][0].weight.mul_(2.0)
    local.begin(1, {})
    assert torch.equal(coupling.bias[0].weight, 2.0 * fresh), "a new client's copy is the unit as it is now"
    assert torch.equal(coupling.ema.copy[0].weight, task.model.backbone.more[0][0].weight)
    local.begin(0, kept)
    assert torch.equal(coupling.bias[0].weight, fresh + 1.0)


def test_scales_are_not_decayed_and_emas_are_in_no_optimiser() -> None:
    from flwr.app import Context, RecordDict

    from clients.local import LocalClient

    task = build(federation())
    tools: list[Any] = []

    def make(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        tools.append(groups)
        return torch.optim.SGD(groups, lr=0.1, weight_decay=0.5)

    client = LocalClient(task, local_of(task), make)
    client.begin(0, Context(0, 0, {"partition-id": 0}, RecordDict(), {}))
    named = {id(p): n for n, p in local_of(task).learner.auxiliary.named_parameters()}
    others, scales = ([named[id(p)] for p in group["params"]] for group in tools[0])
    assert scales == ["u0.coupling.scale", "u1.coupling.scale"]
    assert tools[0][1]["weight_decay"] == 0
    assert not any(".ema." in name or name.endswith(".scale") for name in others)


# ----------------------------------------------------------------------------------------- shared


def test_shared_auxiliary_parameters_travel_beside_the_backbone() -> None:
    task = build(federation(auxiliary="shared"))
    names = [entry.name for entry in task.selection.shared if entry.name.startswith(messages.OPTIONAL)]
    assert "auxiliary.man++.u0.coupling.scale" in names
    assert not any(".ema." in name for name in names)
    carried = build(federation(auxiliary="shared", ema="carry"))
    assert any(".ema." in entry.name for entry in carried.selection.shared)


def test_decoders_never_leave_a_client() -> None:
    experiment = tiny(
        model={"name": "cnn", "width": 4}, local={"name": "infopro", "blocks": 2, "auxiliary": "shared"}
    )
    task = build(experiment)
    assert any(".head." in entry.name for entry in task.selection.shared)
    assert not any(".decoder." in entry.name for entry in task.selection.shared)
    local = local_of(task)
    local.begin(0, {})
    assert all(".decoder." in name for name in local.kept())
    assert local.kept()


def test_entries_that_some_clients_lack_are_averaged_over_the_others() -> None:
    """Σ n_k x_k / Σ n_k over the clients that sent x; nobody: it stays."""
    start = {
        "w": np.zeros(2, np.float32),
        "auxiliary.both": np.zeros(3, np.float32),
        "auxiliary.one": np.zeros((2, 2), np.float32),
        "auxiliary.none": np.full(1, 7, np.float32),
    }

    def answer(client: int, arrays: Any, config: Any) -> Any:
        sent = {"w": arrays["w"] + client, "auxiliary.both": arrays["auxiliary.both"] + 10 * client}
        if client == 2:
            sent["auxiliary.one"] = arrays["auxiliary.one"] + 5
        return sent, {"num-examples": client + 1}

    arrays = play(WeightedAverage(), start, answer, clients=3).arrays
    np.testing.assert_allclose(arrays["w"], (0 * 1 + 1 * 2 + 2 * 3) / 6)
    np.testing.assert_allclose(arrays["auxiliary.both"], 10 * (2 + 6) / 6, rtol=1e-6)
    np.testing.assert_array_equal(arrays["auxiliary.one"], 5)
    np.testing.assert_array_equal(arrays["auxiliary.none"], 7)


def test_clients_with_different_networks_share_what_they_have_in_common(tmp_path: Path) -> None:
    """A small budget has more blocks; all auxiliary parameters travel down, each client's own travel up."""
    model = {"name": "cnn", "width": 8}
    local = {"name": "dgl", "auxiliary": "shared", "budgets": [0.40, 0.265]}
    experiment = tiny("rounds=2", model=model, local=local)
    task = build(experiment)
    shared = {e.name: e.nbytes for e in task.selection.shared}
    mine = sum(size for name, size in shared.items() if name.startswith(messages.OPTIONAL))
    assert mine > 0
    result = run(experiment, tmp_path)
    rows = [row for row in _lines(result.run.folder / "clients.jsonl") if row["phase"] == "train"]
    for row in rows:
        assert row["bytes_up"] == sum(shared.values()) - (mine if row["blocks"] == 1 else 0)
    assert {row["blocks"] for row in rows} == {1, 2}
    before = messages.views_of(task.initial_payload())
    moved = [n for n in shared if n.startswith(messages.OPTIONAL) and (result.state()[n] != before[n]).any()]
    assert len(moved) > 5


@pytest.mark.parametrize("local", [{"blocks": 3}, {"blocks": 3, "auxiliary": "shared"}])
def test_every_engine_gives_the_same(local: dict[str, Any], tmp_path: Path) -> None:
    experiment = tiny("rounds=2", model=MODEL, local={"name": "man++", **local})
    serial = run(experiment, tmp_path / "a").summary
    other = run(experiment.replace("engine.name=ray", "engine.workers=2"), tmp_path / "b").summary
    assert other["digest"] == serial["digest"]
    assert other.get("digest_personal") == serial.get("digest_personal")


def test_back_propagation_is_measured_where_that_is_asked_for(tmp_path: Path) -> None:
    """Bit for bit the plain run, with its bytes and seconds a step in metrics and summary."""
    plain, measured, local = (
        run(tiny("rounds=2", f"name={name}", model=MODEL, local=keys), tmp_path)
        for name, keys in (
            ("plain", {"name": "bp"}),
            ("measured", {"name": "bp", "blocks": 1}),
            ("local", {"name": "greedy", "blocks": 3}),
        )
    )
    assert measured.summary["digest"] == plain.summary["digest"] != local.summary["digest"]
    assert "peak_bytes" not in plain.summary
    assert 0 < local.summary["peak_bytes"] != measured.summary["peak_bytes"] > 0
    assert measured.summary["step_seconds"] > 0
    assert {row["method"] for row in _lines(measured.run.folder / "clients.jsonl") if "method" in row} == {0}
    assert {row["method"] for row in _lines(local.run.folder / "clients.jsonl") if "method" in row} == {1}


# ---------------------------------------------------------------------------------------- budgets


def test_clients_choose_by_their_budget_and_stay_below_it(tmp_path: Path) -> None:
    model = {"name": "cnn", "width": 8}
    common = {"model": model, "client": {"lr": 0.1, "batch_size": 16, "epochs": 3}}
    experiment = tiny("rounds=1", local={"name": "dgl", "budgets": [0.40, 0.265]}, **common)
    result = run(experiment, tmp_path)
    rows = [row for row in _lines(result.run.folder / "clients.jsonl") if "peak_bytes" in row]
    assert len(rows) == 4
    for row in rows:
        assert row["peak_bytes"] <= [0.40e6, 0.265e6][row["client"] % 2]
    assert {row["client"] % 2: row["blocks"] for row in rows} == {0: 1, 1: 2}


def _lines(path: Path) -> list[dict[str, Any]]:
    import json

    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_proximal_term_is_part_of_what_a_client_holds(tmp_path: Path) -> None:
    """Foreseen and measured."""
    rows = {}
    for mu in (0.0, 0.1):
        experiment = federation("rounds=1", f"client.proximal_mu={mu}", f"name=mu{mu:.0f}{mu * 10:.0f}")
        folder = run(experiment, tmp_path).run.folder
        row = next(row for row in _lines(folder / "clients.jsonl") if row["phase"] == "train")
        local = local_of(build(experiment))
        rows[mu] = row["peak_bytes"], local.bench.measure("man++", local.choice(0).plan).total
    trained = sum(4 * p.numel() for p in build(federation()).model.parameters())
    assert [b - a for a, b in zip(rows[0.0], rows[0.1], strict=True)] == [trained, trained]


def test_fine_tuning_before_evaluation_takes_the_same_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that cannot afford back-propagation does not have to when it is measured."""
    from clients import training

    def refuse(*_: Any) -> None:
        raise AssertionError("back-propagation")

    monkeypatch.setattr(training.back_propagation, "__code__", refuse.__code__)
    result = run(federation("evaluation.fine_tune=2"), tmp_path / "a")
    assert np.isfinite(result.summary["loss"])
    monkeypatch.undo()
    assert (
        result.summary["digest"]
        == run(federation("evaluation.where=clients"), tmp_path / "b").summary["digest"]
    )


def test_a_real_nodes_own_budget_decides() -> None:
    """Whatever the experiment says of blocks and of other clients' budgets."""
    from fedsim.app import with_budget

    for local in ({"blocks": 2}, {"cuts": ["block1"]}, {"budgets": [0.40]}):
        experiment = tiny(model={"name": "cnn", "width": 8}, local={"name": "dgl", **local})
        small, large = (local_of(build(with_budget(experiment, mb))) for mb in (0.265, 0.40))
        assert [(c.method, len(c.plan)) for c in (small.choice(3), large.choice(3))] == [
            ("dgl", 2),
            ("bp", 1),
        ]


def test_a_budget_that_is_too_small_is_refused_at_the_start(tmp_path: Path) -> None:
    experiment = tiny(model=MODEL, local={"name": "dgl", "budgets": [5.0, 0.001]})
    with pytest.raises(UserError, match=r"client 1 has 0\.00 MB, the smallest that this model trains in is"):
        build(experiment)


@pytest.mark.parametrize(
    ("local", "tuning", "message"),
    [
        ({"name": "bp", "budgets": [1.0]}, "full", "budgets need a method that saves memory"),
        ({"name": "dgl", "blocks": 9}, "full", "give at most 3"),
        ({"name": "dgl"}, "head", "nothing of this backbone trains"),
        ({"name": "dgl", "cuts": ["more.7"]}, "full", "no unit 'more.7'"),
        ({"name": "dgl", "cuts": ["more.0"], "blocks": 3}, "full", "cuts make 2 blocks"),
        ({"name": "dgl", "blocks": 2, "budgets": [1.0]}, "full", "leave out blocks and cuts"),
        ({"name": "dgl", "blocks": 2, "plan": "units"}, "full", 'plan = "units" makes 3 blocks here'),
    ],
)
def test_mistakes(local: dict[str, Any], tuning: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(tiny(model=MODEL, local=local, tuning={"name": tuning}))


def test_flowers_strategies_cannot_average_networks_that_some_clients_lack(tmp_path: Path) -> None:
    local = {"name": "dgl", "auxiliary": "shared", "budgets": [0.40, 0.265]}
    experiment = tiny(
        "rounds=1", model={"name": "cnn", "width": 8}, local=local, strategy={"name": "fedmedian"}
    )
    with pytest.raises(UserError, match="Flower's FedMedian averages replies that all have the same entries"):
        run(experiment, tmp_path)


def test_a_backbone_of_one_unit_is_not_trained_by_back_propagation_in_silence() -> None:
    with pytest.raises(UserError, match="single unit"):
        build(tiny(model={"name": "mlp", "hidden": 16, "layers": 2}, local={"name": "dgl"}))


def test_a_last_batch_of_one_sample_trains(tmp_path: Path) -> None:
    """BatchNorm over vectors needs two samples."""
    experiment = federation("client.batch_size=3", "partition.shots=1", name="dgl")
    assert np.isfinite(run(experiment, tmp_path).summary["loss"])


def test_local_learning_composes_with_bias_tuning_of_a_pre_trained_clip(tmp_path: Path) -> None:
    """Biases travel as ever; windows train them."""
    tables: dict[str, Any] = {"model": {"name": "tiny-clip"}, "tuning": {"name": "bias"}}
    task = build(tiny(local={"name": "dgl", "blocks": 2}, **tables))
    assert all(entry.name.endswith("bias") for entry in task.selection.shared)
    plain = run(tiny(**tables), tmp_path / "a").summary
    local = run(tiny(local={"name": "dgl", "blocks": 2}, **tables), tmp_path / "b").summary
    assert local["bytes_up"] == plain["bytes_up"]
    assert local["digest"] != plain["digest"]
