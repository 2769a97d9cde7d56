"""Small models of every kind, random weights, for the tests of tuning modes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedsim import registry
from fedsim.data.sources import DIGIT_WORDS
from fedsim.models import TUNING
from fedsim.models.base import Classifier, DataInfo
from fedsim.models.clip import CosineHead, ImageTower, tiny_clip
from fedsim.models.hf import hf_model
from fedsim.models.resnet import resnet20
from fedsim.models.timm_models import timm_model

DIGITS = DataInfo(DIGIT_WORDS, (1, 8, 8))
IMAGES = DataInfo(("cat", "dog", "frog"), (3, 32, 32))
TOKENS = DataInfo(("good", "bad"), (12,))
MODES: dict[str, Callable[..., Classifier]] = {name: registry.load(target) for name, target in TUNING.items()}
for name in ("prompt", "prompt-folio", "prompt-low-rank"):  # captions of tiny-clip have 16 tokens in all
    MODES[name] = partial(MODES[name], tokens=4)

_BERT = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 16,
}


def bert_folder(folder: Path) -> Path:
    """A folder with the configuration of a two-layer BERT."""
    from transformers import BertConfig

    BertConfig(**_BERT).save_pretrained(folder)
    return folder


def make(kind: str, folder: Path) -> Classifier:
    """`clip` (open_clip ViT), `cnn-clip`, `vit` (timm), `bert` (transformers) or `cnn` (ResNet-20)."""
    torch.manual_seed(0)
    if kind == "clip":
        return tiny_clip(DIGITS)
    if kind == "cnn-clip":
        return cnn_clip()
    if kind == "vit":
        return timm_model(IMAGES, name="vit_tiny_patch16_224", image_size=32)
    if kind == "bert":
        return hf_model(TOKENS, name=str(bert_folder(folder)), pretrained=False)
    return resnet20(IMAGES)


def cnn_clip() -> Classifier:
    """A CLIP of the kind of clip-lite: an EfficientNet of timm as image tower, any text features."""
    from open_clip.timm_model import TimmModel

    visual = TimmModel("test_efficientnet", embed_dim=256, image_size=32, pool="avg", proj="none")
    half = [0.5, 0.5, 0.5]
    tower = ImageTower(visual, {"preprocess_cfg": {"mean": half, "std": half}}, lambda: None)
    head = CosineHead(torch.randn(len(IMAGES.classes), 256), torch.zeros(()))
    return Classifier(tower, head, head_is_prior=True).eval()


def inputs(kind: str, n: int = 4) -> Tensor:
    """Inputs as stored, from a fixed seed; rows of token ids end in padding."""
    generator = torch.Generator().manual_seed(1)
    if kind == "bert":
        ids = torch.randint(1, 50, (n, 12), generator=generator, dtype=torch.int32)
        ids[:, 8:] = 0
        return ids
    shape = (1, 8, 8) if kind == "clip" else (3, 32, 32)
    return torch.randint(0, 256, (n, *shape), generator=generator, dtype=torch.uint8)


def vit_b16(*, whole: bool = False) -> Classifier:
    """CLIP ViT-B/16 on `meta` with ten classes; `whole` keeps both towers and has no head."""
    import open_clip
    from open_clip.model import CLIP

    config: dict[str, Any] = open_clip.get_model_config("ViT-B-16")
    half = [0.5, 0.5, 0.5]
    with torch.device("meta"):
        clip = CLIP(**config)
        if whole:
            return Classifier(clip, nn.Identity())
        tower = ImageTower(clip.visual, {"preprocess_cfg": {"mean": half, "std": half}}, lambda: clip)
        return Classifier(tower, CosineHead(torch.zeros(10, 512), torch.zeros(())), head_is_prior=True)


def trained(model: Classifier) -> set[str]:
    """Names of the parameters that train."""
    return {name for name, p in model.named_parameters() if p.requires_grad}


def trained_count(model: Classifier) -> int:
    """How many values train."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
