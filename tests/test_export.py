"""Exported models give the logits of the run's final state, in every form."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fedsim import config
from fedsim.data.sources import digits
from fedsim.errors import UserError
from fedsim.export import export, load_model
from fedsim.runs import Run
from tests.helpers import StopAt, run, tiny

CLIP = {"model": {"name": "tiny-clip"}, "tuning": {"name": "bias"}}


def test_the_exported_model_is_the_final_one(tmp_path: Path) -> None:
    result = run(tiny(), tmp_path)
    out = tmp_path / "out"
    report = export(result.run, out)
    assert report["state"] == "final state"
    assert report["notices"] == []
    assert sorted(path.name for path in out.iterdir()) == sorted(report["files"])
    arrays = digits()
    with torch.no_grad():
        predicted = load_model(out)(torch.from_numpy(arrays.test_x)).argmax(1).numpy()
    assert (predicted == arrays.test_y).mean() == pytest.approx(result.accuracy)
    assert json.loads((out / "model.json").read_text())["classes"] == list(arrays.classes)


def test_an_export_needs_neither_the_run_nor_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_exported_model.py").write_text((Path(__file__).parent / "bf16_model.py").read_text())
    np.savez(tmp_path / "d.npz", x=np.random.rand(50, 6).astype(np.float32), y=np.arange(50) % 5)
    (tmp_path / "mine.toml").write_text(
        'name = "mine"\nrounds = 1\n[data]\nname = "npz:d.npz"\n[partition]\nclients = 2\n'
        '[model]\nname = "my_exported_model:make"\n'
    )
    result = run(config.load(tmp_path / "mine.toml"), tmp_path / "runs")
    export(result.run, tmp_path / "out")
    (tmp_path / "d.npz").unlink()
    monkeypatch.delitem(sys.modules, "my_exported_model")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(tmp_path)])
    assert load_model(tmp_path / "out")(torch.zeros(3, 6)).shape == (3, 5)
    with pytest.raises(UserError, match="is no export of a run"):
        load_model(tmp_path)


def test_the_readme_of_an_export_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(run(tiny("rounds=1"), tmp_path).run, tmp_path / "out")
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path / "out")
    names: dict[str, Any] = {}
    names["images"] = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    exec(code, names)
    assert names["logits"].shape == (1, 10)


def test_an_unfinished_run_gives_its_newest_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tiny(), tmp_path, StopAt(2))
    report = export(Run.open(tmp_path / "tiny"), tmp_path / "out")
    assert report["state"] == "state after round 1"
    assert "not finished" in report["notices"][0]


def test_a_run_without_any_state(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no state yet; go on with: fedsim resume"):
        export(Run.create(tiny(), tmp_path), tmp_path / "out")


def test_personal_entries_are_named(tmp_path: Path) -> None:
    result = run(tiny("rounds=1", payload={"personal": ["head.*"]}), tmp_path)
    report = export(result.run, tmp_path / "out")
    assert "2 entries are personal" in report["notices"][0]
    assert "head." in report["notices"][0]


def test_a_damaged_state_is_said(tmp_path: Path) -> None:
    result = run(tiny("rounds=1"), tmp_path)
    (result.run.folder / "state.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="damaged"):
        export(result.run, tmp_path / "out")


def test_a_clip_is_read_by_open_clip(tmp_path: Path) -> None:
    import open_clip

    result = run(tiny("rounds=1", **CLIP), tmp_path)
    report = export(result.run, tmp_path / "out")
    assert "open_clip/" in report["files"]
    tuned = load_file(tmp_path / "out" / "model.safetensors")
    clip = open_clip.create_model(f"local-dir:{tmp_path / 'out' / 'open_clip'}")
    for name, value in clip.visual.state_dict().items():
        assert torch.equal(value, tuned[f"backbone.visual.{name}"]), name


def test_a_clip_with_new_modules_is_exported_without_an_open_clip_form(tmp_path: Path) -> None:
    result = run(tiny("rounds=1", **{**CLIP, "tuning": {"name": "adapter", "r": 4}}), tmp_path)
    report = export(result.run, tmp_path / "out")
    assert "no open_clip folder" in report["notices"][0]
    assert "open_clip/" not in report["files"]
    assert load_model(tmp_path / "out")(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
