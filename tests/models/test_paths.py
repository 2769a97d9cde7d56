"""Relative paths of weights: the experiment's folder first, then the current one, on a real node, too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file

from fedsim import config
from fedsim.building import build_model
from fedsim.config import Experiment
from fedsim.errors import UserError
from fedsim.models.base import Classifier, DataInfo
from tests.models.zoo import IMAGES, TOKENS, bert_folder

Case = tuple[str, Callable[[Path, int], None], DataInfo, str]


def _bert(folder: Path, seed: int) -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    BertModel(BertConfig.from_pretrained(bert_folder(folder / "w"))).save_pretrained(folder / "w")


def _vit(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), folder / "w")


def _clip(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    clip = open_clip.create_model("ViT-S-32-alt", force_image_size=64)
    save_file(clip.state_dict(), folder / "w.safetensors")


CASES: dict[str, Case] = {
    "hf": ('name = "hf:w"', _bert, TOKENS, "backbone.encoder.embeddings.word_embeddings.weight"),
    "timm": ('name = "timm:test_vit"\nweights = "w"', _vit, IMAGES, "backbone.trunk.patch_embed.proj.weight"),
    "open_clip": (
        'name = "open_clip:ViT-S-32-alt@w.safetensors"\nimage_size = 64',
        _clip,
        IMAGES,
        "backbone.visual.conv1.weight",
    ),
}


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = CASES[request.param]
    return found


def experiment(folder: Path, model: str) -> Experiment:
    folder.mkdir(exist_ok=True)
    (folder / "x.toml").write_text(f'name = "x"\n[model]\n{model}\n[tuning]\nname = "head"\n')
    return config.load(folder / "x.toml")


def test_the_experiments_folder_wins_and_the_text_travels_as_written(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, write, info, probe = case
    home, here, node = tmp_path / "home", tmp_path / "here", tmp_path / "node"
    for seed, folder in enumerate((home, here, node)):
        write(folder, seed)

    def seen(found: Experiment) -> float:
        built: Classifier = build_model(found, info)
        return built.get_parameter(probe).sum().item()

    monkeypatch.chdir(here)
    text = experiment(home, model).json()
    assert json.loads(text)["model"]["name"] in model
    from_home = seen(config.from_json(text))
    monkeypatch.chdir(tmp_path)
    assert seen(config.from_json(text)) == from_home

    elsewhere = json.loads(text) | {"folders": ["/no/such/folder"]}  # a node on another machine
    monkeypatch.chdir(node)
    on_node = seen(config.from_json(json.dumps(elsewhere)))
    monkeypatch.chdir(here)
    from_here = seen(config.from_json(json.dumps(elsewhere)))
    assert len({from_home, on_node, from_here}) == 3


def test_an_error_names_where_it_looked(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    model, _, info, _ = case
    name = "w.safetensors" if "safetensors" in model else "w"
    with pytest.raises(UserError, match="looked for") as caught:
        build_model(experiment(tmp_path / "home", model), info)
    assert f"looked for {tmp_path}/home/{name}, {tmp_path}/{name})" in str(caught.value)
