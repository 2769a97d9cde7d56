"""The frozen digest covers what computed entries were made of: machines whose last bits differ agree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file

from fedsim import payload
from fedsim.building import build
from fedsim.models import open_clip_models
from fedsim.models.base import Classifier, DataInfo
from fedsim.models.clip import ImageTower, clip_classifier, load_tiny_clip, tiny_clip, tiny_config
from fedsim.models.open_clip_models import clip_lite, open_clip_model
from fedsim.models.personal_prompts import prompt_low_rank
from fedsim.models.timm_models import timm_model
from fedsim.models.tuning import bias, head
from tests.helpers import tiny
from tests.models.zoo import DIGITS, IMAGES


def digest(model: Classifier) -> str:
    """As a task has it."""
    changing = payload.select(model, model.train_modules).changing
    return payload.frozen_digest(model, changing, model.derived)


@torch.no_grad()
def nudge(tensor: torch.Tensor) -> None:
    """The last bit of one value changes."""
    flat = tensor.view(-1)
    flat[0] = torch.nextafter(flat[0], torch.tensor(float("inf")))


def nudged(model: Classifier, entry: str) -> Classifier:
    before = model.state_dict()[entry].clone()
    nudge(model.state_dict()[entry])
    assert not torch.equal(model.state_dict()[entry], before)
    return model


def test_last_bits_of_text_features_do_not_matter_and_what_they_are_made_of_does() -> None:
    first = digest(bias(tiny_clip(DIGITS)))
    assert digest(nudged(bias(tiny_clip(DIGITS)), "head.weight")) == first
    assert digest(nudged(bias(tiny_clip(DIGITS)), "backbone.visual.conv1.weight")) != first
    assert digest(nudged(bias(tiny_clip(DIGITS)), "head.logit_scale")) != first
    assert digest(bias(tiny_clip(DIGITS, template="the {}"))) != first
    swapped = DataInfo((DIGITS.classes[1], DIGITS.classes[0], *DIGITS.classes[2:]), DIGITS.sample_shape)
    assert digest(bias(tiny_clip(swapped))) != first

    clip, tokenize = load_tiny_clip()
    for name, value in clip.state_dict().items():
        if not name.startswith("visual.") and name != "logit_scale":
            nudge(value)
            tower = ImageTower(clip.visual, tiny_config(), lambda: load_tiny_clip()[0])
            other = clip_classifier(clip, tower, tokenize, DIGITS)
            assert digest(bias(other)) != first, name
            break
    else:
        pytest.fail("no text tower")


def test_prompts_cover_the_text_tower_but_not_what_was_computed_with_it() -> None:
    """The tower is compared bit by bit; the text features of the captions are not."""

    def made() -> Classifier:
        torch.manual_seed(0)
        return prompt_low_rank(tiny_clip(DIGITS), tokens=2)

    first = digest(made())
    assert digest(nudged(made(), "head.caption")) == first
    assert digest(nudged(made(), "head.fixed")) != first
    tower = next(name for name in made().state_dict() if name.endswith("attn.in_proj_weight"))
    assert digest(nudged(made(), tower)) != first


def test_a_head_that_trains_is_not_in_the_digest() -> None:
    first = digest(bias(tiny_clip(DIGITS), head=True))
    assert digest(nudged(bias(tiny_clip(DIGITS), head=True), "head.weight")) == first
    assert digest(bias(tiny_clip(DIGITS, template="the {}"), head=True)) == first


def test_a_task_uses_it() -> None:
    task = build(tiny(model={"name": "tiny-clip"}, tuning={"name": "bias"}))
    assert task.frozen_digest == digest(task.model)
    assert task.frozen_digest != payload.frozen_digest(task.model, task.selection.changing)


def _timm(file: Path, seed: int, *, size: int) -> Classifier:
    torch.manual_seed(seed)
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), file)
    return head(timm_model(IMAGES, name="test_vit", weights=str(file), image_size=size))


def _open_clip(file: Path, seed: int, *, size: int) -> Classifier:
    torch.manual_seed(seed)
    save_file(open_clip.create_model("ViT-S-32-alt").state_dict(), file)
    return head(open_clip_model(IMAGES, name=f"ViT-S-32-alt@{file}", image_size=size))


@pytest.mark.parametrize(
    ("make", "entry", "native"),
    [
        (_timm, "backbone.trunk.pos_embed", 160),
        (_open_clip, "backbone.visual.positional_embedding", 224),
    ],
)
def test_last_bits_of_resampled_positions_do_not_matter(
    make: Callable[..., Classifier], entry: str, native: int, tmp_path: Path
) -> None:
    file = tmp_path / "w.safetensors"
    model = make(file, 0, size=64)
    first = digest(model)
    assert digest(nudged(model, entry)) == first
    assert digest(make(file, 0, size=96)) != first
    assert entry in model.derived
    as_stored = make(file, 0, size=native)
    assert entry not in as_stored.derived
    exact = digest(as_stored)
    assert digest(nudged(as_stored, entry)) != exact


def test_stored_positions_are_covered_when_resampled(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    state = timm.create_model("test_vit", num_classes=0).state_dict()
    digests = set()
    for _ in range(2):
        save_file(state, file)
        digests.add(digest(head(timm_model(IMAGES, name="test_vit", weights=str(file), image_size=64))))
        nudge(state["pos_embed"])
    assert len(digests) == 2


def test_ingredients_of_clip_lite(asset: Callable[..., list[Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its projection is computed, too: another last bit is no difference, another ridge penalty is."""
    asset("efficientnet-lite0", "minilm")
    true, scale = open_clip_models._projection, 1.0
    kept: list[torch.Tensor] = []

    def on_another_cpu(*given: Any) -> torch.Tensor:
        if not kept:
            kept.append(true(*given))
        return kept[0] * scale

    monkeypatch.setattr(open_clip_models, "_projection", on_another_cpu)
    first = bias(clip_lite(IMAGES, image_size=64))
    expected = digest(first)
    scale = 1 + 1e-6
    second = bias(clip_lite(IMAGES, image_size=64))
    assert not torch.equal(second.head.weight, first.head.weight)
    assert digest(second) == expected
    assert digest(nudged(first, "backbone.visual.trunk.conv_stem.weight")) != expected
    monkeypatch.setattr(open_clip_models, "_RIDGE", 3.5)
    assert digest(bias(clip_lite(IMAGES, image_size=64))) != expected
