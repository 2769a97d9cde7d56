"""The strategy's phases, end to end on tinted digits."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from fedsim import config
from fedsim.compare import comparison
from fedsim.errors import UserError
from fedsim.runs import Run
from fedsim.terminal import closing_table
from strategies.attribute_unlearning import AttributeUnlearning
from tests.helpers import StopAt, run, tiny

TABLES: dict[str, Any] = {
    "data": {"name": "tinted-digits"},
    "partition": {"name": "iid", "clients": 3},
    "model": {"name": "cnn", "width": 8, "norm": "batch"},
    "detacher": {"attributes": ["tint"]},
    "strategy": {"name": "attribute-unlearning", "warmup": 1, "ramp": 1},
    "client": {"optimizer": "adamw", "lr": 0.003, "batch_size": 32},
}


def test_the_strength_rises_after_the_warm_up() -> None:
    strategy = AttributeUnlearning(strength=2.0, warmup=3, ramp=4)
    assert [strategy.strength_at(r) for r in range(1, 10)] == [0, 0, 0, 0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert [AttributeUnlearning(strength=2.0, warmup=1, ramp=0).strength_at(r) for r in (1, 2)] == [0, 2.0]


def test_no_strength_is_plain_averaging_to_the_bit(tmp_path: Path) -> None:
    never = {"name": "attribute-unlearning", "strength": 0.0, "leace": False}
    ours = run(tiny("rounds=2", **{**TABLES, "strategy": never}), tmp_path / "a")
    plain = {**TABLES, "strategy": {"name": "fedavg"}}
    plain.pop("detacher")
    theirs = run(tiny("rounds=2", **plain), tmp_path / "b").state()
    state = ours.state()
    assert set(state) - set(theirs) == {f"eraser.{part}" for part in ("mean", "left", "right", "keep")}
    for name, values in theirs.items():
        assert state[name].tobytes() == values.tobytes()


@pytest.mark.parametrize("engine", ["serial", "ray"])
def test_phases_follow_training_and_erase_what_is_linear(engine: str, tmp_path: Path) -> None:
    experiment = tiny("rounds=9", "strategy.audit_rounds=3", f"engine.name={engine}", **TABLES)
    result = run(experiment, tmp_path)
    rows = result.run.history()
    said = [
        "moments" if "train_moments" in row else "audit" if "train_audit_tint_mlp" in row else "model"
        for row in rows[1:]
    ]
    assert said == ["model"] * 3 + ["moments", "model", "moments"] + ["audit"] * 3
    assert [row.get("train_strength") for row in rows[1:6]] == [0.0, 2.0, 2.0, None, 0.0]
    summary = result.summary
    assert abs(summary["attack_linear_tint"] - 0.5) < 3 * summary["attack_linear_tint_error"]
    assert summary["chance_tint"] == 0.5
    assert abs(summary["audit_tint_linear"] - 0.5) < 3 * summary["audit_tint_linear_error"]
    state = result.state()
    assert np.abs(state["eraser.left"]).max() > 0
    lines = [
        row for row in (tmp_path / "tiny" / "clients.jsonl").read_text().splitlines() if '"round": 4' in row
    ]
    assert len(lines) == 3
    # d = 16, q = 1: n + h + hh + z + zz + hz in float64
    assert all(f'"bytes_up": {8 * (1 + 16 + 256 + 1 + 1 + 16)}' in line for line in lines)


def test_an_audit_sees_what_plain_training_leaves(tmp_path: Path) -> None:
    """The same attackers, nothing unlearned: they must find the tint, or finding nothing says nothing."""
    strategy = {"name": "attribute-unlearning", "strength": 0.0, "leace": False, "audit_rounds": 5}
    tables = {
        **TABLES,
        "data": {"name": "tinted-digits", "tint": 0.5},
        "strategy": strategy,
        "detacher": {"name": "none", "attributes": ["tint"]},
    }
    summary = run(tiny("rounds=8", **tables), tmp_path).summary
    for kind in ("linear", "mlp"):
        assert summary[f"audit_tint_{kind}"] > 0.65
        assert summary[f"attack_{kind}_tint"] > 0.7


def test_the_experiment_reaches_its_figures() -> None:
    """Bars on means of three seeds; what plain training leaves shows that the attack has power."""
    path = config.shipped_folder() / "results" / "attribute_digits.json"
    found: dict[tuple[str, bool], list[dict[str, float]]] = {}
    for result in json.loads(path.read_text("utf-8")):
        key = result["cell"]["detacher.name"], result["cell"]["strategy.leace"]
        found.setdefault(key, []).append(result["summary"])

    def mean(key: tuple[str, bool], name: str) -> float:
        assert len(found[key]) == 3
        return sum(summary[name] for summary in found[key]) / 3

    plain, mmd, erased = ("none", False), ("mmd", False), ("mmd", True)
    assert mean(plain, "attack_mlp_tint") >= 0.75
    assert mean(mmd, "attack_mlp_tint") <= 0.60
    assert mean(mmd, "accuracy") >= mean(plain, "accuracy") - 0.015
    assert mean(erased, "attack_mlp_tint") <= 0.60
    assert mean(erased, "accuracy") >= mean(mmd, "accuracy") - 0.005
    for key in (erased, ("none", True)):
        assert abs(mean(key, "attack_linear_tint") - 0.5) < 2 * mean(key, "attack_linear_tint_error")


def test_a_short_version_of_the_experiment(tmp_path: Path) -> None:
    """Fourteen rounds, one seed: the attacker loses a quarter of what it knows, the task next to nothing."""
    short = ["rounds=14", "evaluation.every=14", "strategy.leace=false"]
    mmd = run(config.load("attribute_digits", short), tmp_path / "mmd").summary
    plain = run(config.load("attribute_digits", [*short, "detacher.name=none"]), tmp_path / "plain").summary
    assert plain["attack_mlp_tint"] > 0.72
    assert mmd["attack_mlp_tint"] - 0.5 < 0.75 * (plain["attack_mlp_tint"] - 0.5)
    assert mmd["accuracy"] > plain["accuracy"] - 0.03


def test_a_resumed_run_ends_like_an_uninterrupted_one(tmp_path: Path) -> None:
    """Stopped in the middle of an audit: its attackers are part of the checkpoint."""
    from fedsim.finish import resume

    experiment = tiny("rounds=7", "strategy.audit_rounds=2", **TABLES)
    whole = run(experiment, tmp_path / "whole").summary
    with pytest.raises(KeyboardInterrupt):
        run(experiment, tmp_path / "cut", StopAt(6))
    rest = resume(Run.open(tmp_path / "cut" / "tiny").folder).summary
    for key in (
        "digest",
        "accuracy",
        "audit_tint_mlp",
        "audit_tint_linear",
        "attack_mlp_tint",
        "leace_shrinkage",
    ):
        assert rest[key] == whole[key]


def test_few_samples_for_many_features_are_shrunk_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    experiment = tiny("rounds=3", "model.width=32", "partition.shots=1", **TABLES)
    summary = run(experiment, tmp_path).summary
    assert summary["leace_shrinkage"] == pytest.approx(64 / (64 + 30))
    assert "LEACE: 30 samples for 64 features" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rounds=2"], "rounds = 2 leaves no round for training: LEACE, head and audit take 2"),
        (["detacher.attributes=[]"], "attributes is missing: name what to unlearn; the data have: tint"),
        (["detacher.name=none", "detacher.attributes=[]", "client.name=standard"], "needs attributes"),
        (["client.name=standard"], "needs clients that use it"),
    ],
)
def test_what_cannot_work_is_said_before_the_first_round(
    overrides: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        run(tiny("rounds=5", *overrides, **TABLES), tmp_path)


def test_a_strategy_that_sends_no_strength_is_an_error(tmp_path: Path) -> None:
    keys = {"strategy": {"name": "fedavg"}, "client": {"name": "attribute-unlearning", "lr": 0.01}}
    with pytest.raises(UserError, match="the strategy says nothing of the detacher's strength"):
        run(tiny("rounds=2", **{**TABLES, **keys}), tmp_path)


def test_a_term_that_does_less_than_its_keys_say_is_noted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tables = {**TABLES, "strategy": {"name": "attribute-unlearning", "warmup": 1, "ramp": 4, "leace": False}}
    run(tiny("rounds=3", "partition.shots=2", "tuning.name=head", **tables), tmp_path)
    assert "the detacher's strength reaches 1 of 2: 3 rounds of training are fewer than" in caplog.text
    assert "nothing below the cut is trained: the detacher changes nothing" in caplog.text


def test_the_closing_table_and_the_comparison_say_what_attackers_read(tmp_path: Path) -> None:
    results = [
        run(tiny("rounds=5", f"name=r{number}", "partition.shots=4", *more, **TABLES), tmp_path)
        for number, more in enumerate([["strategy.leace=false"], ["strategy.audit_rounds=1"]])
    ]
    console = Console(width=120, record=True)
    console.print(closing_table(results[1].summary, results[1].run.history()))
    console.print(comparison([result.run for result in results]))
    shown = console.export_text()
    linear, audit = (results[1].summary[key] for key in ("attack_linear_tint", "audit_tint_mlp"))
    start = results[1].run.history()[0]["attack_linear_tint"]
    assert re.search(rf"attack linear tint +{start:.3f} → {linear:.3f} .*chance 0\.500", shown)
    assert re.search(rf"audit tint mlp +{audit:.3f} +chance 0\.500", shown)
    other = results[0].summary["attack_linear_tint"]
    assert re.search(rf"attack linear tint +{other:.3f} +{linear:.3f} +0\.500", shown)
    assert re.search(rf"audit tint mlp +– +{audit:.3f} +0\.500", shown)


def test_an_attribute_that_is_the_label_is_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    y = np.arange(60) % 2
    np.savez(tmp_path / "a.npz", x=rng.random((60, 5)), y=y, z_copy=1 - y)
    tables = {**TABLES, "data": {"name": f"npz:{tmp_path / 'a.npz'}"}, "model": {"name": "mlp"}}
    with pytest.raises(UserError, match="'copy' determines the task's label"):
        run(tiny('detacher.attributes=["copy"]', "rounds=5", **tables), tmp_path)
