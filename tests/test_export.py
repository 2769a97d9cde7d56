"""Exported models give the logits of the run's final state, in every form."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fedsim import config
from fedsim.data.sources import digits
from fedsim.errors import UserError
from fedsim.export import export, load_model
from fedsim.finish import Result
from fedsim.runs import Run
from tests.helpers import StopAt, run, tiny
from tests.models.zoo import bert_folder, inputs

IDS = inputs("bert")
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


# ------------------------------------------------------------- text encoders, and LoRA made by peft


def text_run(folder: Path, mode: str, **model: Any) -> Result:
    """One round of a two-layer BERT that lies in `folder`/base with pooler and tokenizer."""
    from tokenizers import Tokenizer, models
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    base = bert_folder(folder / "base")
    torch.manual_seed(0)
    BertModel(BertConfig.from_pretrained(base)).save_pretrained(base)
    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "good": 2, "bad": 3}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]").save_pretrained(base)
    rng = np.random.default_rng(0)
    np.savez(folder / "d.npz", x=rng.integers(1, 50, (60, 12)).astype(np.uint8), y=np.arange(60) % 2)
    experiment = tiny(
        "rounds=1",
        data={"name": f"npz:{folder / 'd.npz'}"},
        model={"name": f"hf:{base}", **model},
        tuning={"name": mode},
    )
    return run(experiment, folder / "runs")


def text_logits(encoder: torch.nn.Module, folder: Path) -> torch.Tensor:
    """What another program computes: mean over tokens, then the exported head."""
    head = load_file(folder / "head.safetensors")
    with torch.no_grad():
        hidden = encoder(input_ids=IDS.long(), attention_mask=(IDS != 0).long()).last_hidden_state
    mask = (IDS != 0).float().unsqueeze(-1)
    return (hidden * mask).sum(1) / mask.sum(1) @ head["weight"].T + head["bias"]


@pytest.mark.parametrize("mode", ["bias", "head", "full", "lora"])
def test_a_text_encoder_is_read_by_transformers(mode: str, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    result = text_run(tmp_path, mode)
    out = tmp_path / "out"
    report = export(result.run, out)
    assert report["notices"] == []
    assert ("peft/" in report["files"]) == (mode == "lora")
    assert sorted(path.name for path in out.iterdir()) == sorted(name.rstrip("/") for name in report["files"])
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in (out / "hf").iterdir()}
    base, stored = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out/hf"))
    assert stored.keys() == base.keys()
    moved = {name for name in stored if not torch.equal(stored[name], base[name])}
    assert bool(moved) == (mode != "head")
    assert not any("pooler" in name for name in moved)
    encoder = AutoModel.from_pretrained(out / "hf").eval()
    with torch.no_grad():
        expected = load_model(out)(IDS)
    torch.testing.assert_close(text_logits(encoder, out / "hf"), expected, rtol=1e-4, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(out / "hf")
    assert tokenizer("good")["input_ids"] == [2]


def test_lora_is_read_by_peft(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModel

    result = text_run(tmp_path, "lora")
    out = tmp_path / "out"
    export(result.run, out)
    about = json.loads((out / "peft" / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str(tmp_path / "base")
    base = AutoModel.from_pretrained(tmp_path / "base").eval()
    untuned = text_logits(base, out / "peft")
    tuned = PeftModel.from_pretrained(base, out / "peft").eval()
    with torch.no_grad():
        expected = load_model(out)(IDS)
    torch.testing.assert_close(text_logits(tuned, out / "peft"), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(untuned, expected, atol=1e-4)
    updates = load_file(out / "peft" / "adapter_model.safetensors")
    assert len(updates) == 2 * 2 * 2  # blocks, queries and values, A and B
    assert sum(value.numel() for value in updates.values()) == 2 * 2 * 2 * 8 * 32


def test_lora_of_a_timm_model_is_read_by_peft(tmp_path: Path) -> None:
    import timm
    from peft import PeftModel

    torch.manual_seed(0)
    trunk = timm.create_model("test_vit", num_classes=0).eval()
    save_file(trunk.state_dict(), tmp_path / "w.safetensors")
    model = {"name": "timm:test_vit", "weights": str(tmp_path / "w.safetensors")}
    data = {"name": "digits"}
    result = run(tiny("rounds=1", data=data, model=model, tuning={"name": "lora"}), tmp_path / "runs")
    out = tmp_path / "out"
    report = export(result.run, out)
    assert report["files"][3:-1] == ["peft/"]
    ours = load_model(out)
    images = torch.from_numpy(digits().test_x[:8])
    with torch.no_grad():
        expected, prepared = ours.backbone(images), ours.backbone.prepare(images)
        untuned = trunk(prepared)
        tuned = PeftModel.from_pretrained(trunk, out / "peft").eval()
        torch.testing.assert_close(tuned(prepared), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(untuned, expected, atol=1e-4)


def test_an_encoder_with_new_modules_is_exported_without_a_transformers_form(tmp_path: Path) -> None:
    report = export(text_run(tmp_path, "adapter").run, tmp_path / "out")
    assert "no hf folder: this tuning added 'adapters.0" in report["notices"][0]
    assert report["files"] == ["model.safetensors", "model.json", "experiment.toml", "README.md"]
    assert load_model(tmp_path / "out")(IDS).shape == (4, 2)


def test_an_export_replaces_an_older_one(tmp_path: Path) -> None:
    result = text_run(tmp_path, "lora")
    export(result.run, tmp_path / "out")
    (tmp_path / "out" / "hf" / "left.txt").touch()
    export(result.run, tmp_path / "out")
    assert not (tmp_path / "out" / "hf" / "left.txt").exists()
