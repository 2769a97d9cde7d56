"""The prompt family in whole runs: what travels, what stays, what it costs, and that it learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import RecordDict
from torch.nn import functional

from clients.training import back_propagation
from fedsim import messages, payload
from fedsim.building import build
from fedsim.export import export, load_model
from fedsim.finish import resume
from fedsim.hooks import Hook
from fedsim.models.clip import tiny_clip
from fedsim.models.personal_prompts import FolioHead, LowRankHead
from fedsim.models.prompt import PromptHead
from tests.helpers import StopAt, run, tiny

TOKENS, WIDTH = 4, 64
PERSONAL = {
    "promptfl": set(),
    "promptfolio": {"head.own"},
    "fedpgp": {"head.left", "head.right"},
}


def experiment(strategy: str, *overrides: str, **tables: Any) -> Any:
    data = {"name": "digits", "rotate": 25.0, "noise": 0.1}
    client = {"lr": 0.5, "batch_size": 16}
    tables = {"data": data, "tuning": {"tokens": TOKENS}, "client": client, **tables}
    return tiny(*overrides, strategy={"name": strategy}, model={"name": "tiny-clip"}, **tables)


class Wire(Hook):
    """Names that travelled up, and the largest reply as it would be packed."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.largest = 0

    def reply(self, server_round: int, phase: str, client: int, message: Any) -> None:
        content = RecordDict(dict(message.content))
        for key, record in message.content.array_records.items():
            self.names |= set(record)  # the values may have been summed up already: zeros take as many bytes
            content[key] = messages.arrays_of({k: np.zeros(a.shape, a.dtype) for k, a in record.items()})
        packed = payload.pack(content)
        size = sum(len(a.data) for r in packed.array_records.values() for a in r.values())
        layout = packed.get(payload.LAYOUT)
        size += 0 if layout is None else sum(len(v) for v in layout.values())
        self.largest = max(self.largest, size)


@pytest.mark.parametrize("strategy", PERSONAL)
def test_one_context_travels_and_the_rest_stays(strategy: str, tmp_path: Path) -> None:
    wire = Wire()
    result = run(experiment(strategy), tmp_path, wire)
    assert wire.names == {"head.context"}
    values = 4 * TOKENS * WIDTH
    assert result.summary["bytes_up"] == 3 * 4 * values
    assert values <= wire.largest <= values + 1024
    task = build(experiment(strategy))
    assert {entry.name for entry in task.selection.personal} == PERSONAL[strategy]
    assert ("digest_personal" in result.summary) == bool(PERSONAL[strategy])


@pytest.mark.parametrize("strategy", PERSONAL)
def test_a_resumed_run_ends_like_an_uninterrupted_one(strategy: str, tmp_path: Path) -> None:
    whole = run(experiment(strategy, "rounds=4"), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(experiment(strategy, "rounds=4"), tmp_path / "cut", StopAt(2, during=True))
    again = resume(tmp_path / "cut" / "tiny")
    for key in ("digest", "digest_personal", "accuracy", "loss"):
        assert again.summary.get(key) == whole.summary.get(key)


def test_it_learns_and_the_export_is_the_result(tmp_path: Path) -> None:
    tables = {"partition": {"name": "iid", "clients": 4, "shots": 16}}
    result = run(experiment("promptfl", "rounds=8", "client.momentum=0.0", **tables), tmp_path)
    assert result.accuracy >= result.summary["accuracy_start"] + 0.05
    export(result.run, tmp_path / "out")
    model = load_model(tmp_path / "out")
    data = build(experiment("promptfl")).data.arrays
    with torch.no_grad():
        predicted = model(torch.from_numpy(data.test_x.copy())).argmax(1).numpy()
    assert (predicted == data.test_y).mean() == pytest.approx(result.accuracy)
    from safetensors.torch import load_file

    head = load_file(tmp_path / "out" / "open_clip" / "head.safetensors")
    assert head["weight"].shape == (10, 64)


def copies(file: Path, clients: int) -> dict[str, Any]:
    """Data whose natural owners all have the same 40 digits."""
    from fedsim.data.store import load_arrays

    digits = load_arrays("digits", {"rotate": 25.0})
    rows = np.tile(np.arange(40), clients)
    np.savez(
        file,
        x_train=digits.train_x[rows],
        y_train=digits.train_y[rows],
        x_test=digits.test_x,
        y_test=digits.test_y,
        classes=np.array(digits.classes),
        groups=np.repeat(np.arange(clients), 40),
    )
    return {"data": {"name": f"npz:{file}"}, "partition": {"name": "natural", "clients": clients}}


@pytest.mark.parametrize("strategy", ["promptfl", "fedclip"])
def test_clients_with_equal_data_are_one_client(strategy: str, tmp_path: Path) -> None:
    """Batches are whole, so that the order of samples, which is a client's own, is no difference."""
    tuning = {"tokens": TOKENS} if strategy == "promptfl" else {}
    states = []
    for clients in (1, 3):
        tables = copies(tmp_path / f"{clients}.npz", clients)
        client = {"lr": 0.5 if strategy == "promptfl" else 0.003, "batch_size": 40, "epochs": 3}
        states.append(run(experiment(strategy, client=client, tuning=tuning, **tables), tmp_path).state())
    for name, value in states[0].items():
        np.testing.assert_allclose(states[1][name], value, rtol=1e-4, atol=1e-5)
    start = build(experiment(strategy, tuning=tuning)).initial_payload()
    assert any(np.abs(states[0][name] - array.numpy()).max() > 1e-3 for name, array in start.items())


DISJOINT = {"name": "pathological", "clients": 5, "overlap": False, "shots": 16}


def test_averaging_beats_training_alone_when_nobody_has_all_classes(tmp_path: Path) -> None:
    """Global test, mean over three seeds; without sharing a client's prompt forgets the others' classes."""
    together, alone = [], []
    for seed in range(3):
        changes = [f"seed={seed}", "rounds=5", "client.momentum=0.0", 'baselines=["local-only"]']
        summary = run(experiment("promptfl", *changes, partition=DISJOINT), tmp_path / str(seed)).summary
        together.append(summary["accuracy"])
        alone.append(summary["accuracy_local_only"])
    assert np.mean(together) > np.mean(alone) + 0.03


def test_local_coop_fedprox_and_fine_tuning_are_settings(tmp_path: Path) -> None:
    """The rows of the table beside PromptFL: one key each, and each does what it is called."""
    skewed = {"partition": DISJOINT, "evaluation": {"split": "both", "every": 3}}
    plain = run(experiment("promptfl", **skewed), tmp_path / "plain")
    held = run(experiment("promptfl", "client.proximal_mu=50.0", "client.clip=1.0", **skewed), tmp_path / "p")
    tuned = run(experiment("promptfl", "evaluation.fine_tune=5", **skewed), tmp_path / "tuned")
    local = run(experiment("local-only", "tuning.name=prompt", **skewed), tmp_path / "local")
    start = build(experiment("promptfl", **skewed)).initial_payload()["head.context"].numpy()

    def moved(result: Any) -> float:
        return float(np.linalg.norm(result.state()["head.context"] - start))

    assert 0 < moved(held) < moved(plain)
    assert tuned.summary["digest"] == plain.summary["digest"]
    assert tuned.summary["local_accuracy"] > plain.summary["local_accuracy"]
    assert local.summary["bytes_up"] == 0
    assert local.summary["local_accuracy"] > local.summary["local_accuracy_start"]
    for result in (plain, held, tuned, local):
        assert {"local_accuracy_worst", "local_accuracy_spread"} <= result.summary.keys()


def test_a_prompt_of_base_classes_reads_new_names(tmp_path: Path) -> None:
    """Base-to-new: base classes gain, and new ones are still read off their names."""
    given = experiment("promptfl", "rounds=8", "partition.new_classes=4", "client.momentum=0.0")
    summary = run(given.replace("partition.shots=16"), tmp_path).summary
    assert summary["base_accuracy"] > summary["base_accuracy_start"] + 0.03
    assert summary["new_accuracy"] > 1.5 / 4
    assert 0 < summary["harmonic_accuracy"] < 1


def test_a_cached_run_is_the_same(tmp_path: Path) -> None:
    cached = run(experiment("promptfl"), tmp_path / "a")
    plain = run(experiment("promptfl", "features.cache=false"), tmp_path / "b")
    assert build(experiment("promptfl")).network is not build(experiment("promptfl")).model
    np.testing.assert_allclose(cached.state()["head.context"], plain.state()["head.context"], atol=1e-4)


def test_text_features_are_computed_once_an_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    task = build(experiment("promptfl", "evaluation.batch_size=16"))
    calls: list[int] = []
    features = PromptHead.text_features

    def counted(self: PromptHead, context: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return features(self, context)

    monkeypatch.setattr(PromptHead, "text_features", counted)
    task.evaluate_split("test")
    assert len(calls) == 1
    rows = task.data.client(0)
    back_propagation(task, *task.train_batch(rows[:8]))
    assert len(calls) == 2


def test_a_client_with_another_text_tower_or_other_names_is_noticed() -> None:
    task = build(experiment("promptfl"))
    digest = task.frozen_digest
    assert digest == build(experiment("promptfl")).frozen_digest
    weight = next(p for n, p in task.model.named_parameters() if n.startswith("head.tower.") and p.dim() == 2)
    with torch.no_grad():
        weight[0, 0] += 1
    assert payload.frozen_digest(task.model, task.selection.changing) != digest
    with torch.no_grad():
        weight[0, 0] -= 1
        task.model.head.fixed[0] += 1  # type: ignore[index, operator]
    assert payload.frozen_digest(task.model, task.selection.changing) != digest


def test_rows_of_classes_are_averaged_over_their_owners(tmp_path: Path) -> None:
    """Disjoint classes: no client's context of a class is diluted by one without the class."""
    tables = {"tuning": {"tokens": TOKENS, "class_specific": True}, "partition": {"name": "pathological"}}
    tables["partition"] |= {"clients": 5, "classes_per_client": 2, "shots": 4}
    given = experiment("promptfl", "rounds=1", **tables)
    result = run(given, tmp_path)
    task = build(given)
    counts = task.data.class_counts()
    kept: dict[int, Any] = {}

    class Keep(Hook):
        def reply(self, server_round: int, phase: str, client: int, message: Any) -> None:
            kept[client] = messages.views_of(message.content["arrays"])["head.context"].copy()

    run(given, tmp_path / "again", Keep())
    weights = counts / counts.sum(0, keepdims=True).clip(1)
    expected = np.einsum("kc,kcmd->cmd", weights, np.stack([kept[k] for k in range(5)]).astype(np.float64))
    np.testing.assert_array_equal(result.state()["head.context"], expected.astype(np.float32))
    rows = [json.loads(line) for line in (result.run.folder / "clients.jsonl").read_text().splitlines()]
    assert rows[0]["rows:head.context"] == counts[0].tolist()


def test_the_mixture_of_promptfolio() -> None:
    head = build(experiment("promptfolio")).model.head
    assert isinstance(head, FolioHead)
    own, shared = (functional.normalize(head.text_features(c), dim=-1) for c in (head.own, head.context))
    assert not torch.allclose(own, shared, atol=1e-3)
    torch.testing.assert_close(head.class_features(), 0.6 * shared + 0.4 * own)


@pytest.mark.parametrize(
    ("template", "overrides"),
    [
        ("a photo of a {}", ()),
        ("a photo of a {}", ("seed=7",)),
        ("a photo of a {}", ("tuning.tokens=2", "tuning.init=the number")),
        ("the {}", ("model.template=the {}",)),
    ],
)
def test_the_positive_of_fedpgp_is_the_text_of_the_fixed_caption(
    template: str, overrides: tuple[str, ...]
) -> None:
    """Whatever the prompt starts from."""
    task = build(experiment("fedpgp", *overrides))
    head = task.model.head
    assert isinstance(head, LowRankHead)
    assert torch.equal(head.caption, tiny_clip(task.data.info, template=template).head.weight)
    untrained = head.text_features(head.context)
    assert functional.cosine_similarity(untrained, head.caption).min() < 0.999
    assert "head.caption" not in task.initial_payload()


def test_the_loss_of_fedpgp() -> None:
    task = build(experiment("fedpgp", "tuning.mu=0.5"))
    head = task.model.head
    assert isinstance(head, LowRankHead)
    with torch.no_grad():
        head.context += 0.1 * torch.randn_like(head.context)
        head.left += torch.randn_like(head.left)
    a, b, c = (
        functional.normalize(x, dim=-1)
        for x in (
            head.text_features(head.context),
            head.caption,
            head.text_features(head.context + head.left @ head.right),
        )
    )
    near, far = ((a * b).sum(-1) / 0.5).exp(), ((a * c).sum(-1) / 0.5).exp()
    expected = 0.5 * -(near / (near + far)).log().mean()
    inputs, labels = task.train_batch(task.data.client(0))
    plain = functional.cross_entropy(head(inputs), labels)
    torch.testing.assert_close(task.loss(task.network, inputs, labels), plain + expected)
