"""Units of every kind of backbone: one after the other they are the network, and every tensor is in one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import Transformer, VisionTransformer
from timm.models.vision_transformer import VisionTransformer as TimmVit
from torch import Tensor, nn

from fedsim.models.base import Unit, run_units, units_of
from fedsim.models.cnn import cnn, mlp
from fedsim.models.timm_models import timm_model
from fedsim.models.units import library_units
from fedsim.models.vgg import vgg11
from tests.models.zoo import DIGITS, IMAGES, MODES, inputs, make


def timm(name: str) -> nn.Module:
    network: nn.Module = timm_model(IMAGES, name=name, image_size=32).backbone.trunk
    return network


def open_clip_vit(**options: Any) -> nn.Module:
    network: nn.Module = VisionTransformer(32, 8, 24, 2, 2, mlp_ratio=2.0, output_dim=16, **options)
    return network


def sequence_first() -> nn.Module:
    network = open_clip_vit()
    network.transformer = Transformer(24, 2, 2, mlp_ratio=2.0, batch_first=False)
    return network


def timm_vit() -> nn.Module:
    network: nn.Module = TimmVit(
        32, 8, embed_dim=24, depth=2, num_heads=2, num_classes=0, pre_norm=True, init_values=0.5
    )
    return network


#: name -> (network for 32x32 images, how many blocks; None: it is one unit)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int | None]] = {
    "timm-vit": (lambda: timm("vit_tiny_patch16_224"), 12),
    "timm-vit-registers-mean": (lambda: timm("vit_wee_patch16_reg1_gap_256"), 14),
    "timm-vit-norm-pre": (timm_vit, 2),
    "timm-efficientnet": (lambda: timm("tf_efficientnet_lite0"), 16),
    "timm-resnet": (lambda: timm("resnet18"), 8),
    "timm-other": (lambda: timm("mobilenetv3_small_050"), None),
    "clip-vit": (open_clip_vit, 2),
    "clip-vit-mean-pool": (lambda: open_clip_vit(pool_type="avg", final_ln_after_pool=True), 2),
    "clip-vit-attention-pool": (lambda: open_clip_vit(attentional_pool=True, attn_pooler_heads=2), 2),
    "clip-vit-sequence-first": (sequence_first, None),
    "clip-resnet": (lambda: ModifiedResNet([1, 2, 1, 1], 16, heads=4, image_size=32, width=8), 5),
    "clip-timm": (lambda: TimmModel("resnet10t", 16, 32), 4),
    "clip-timm-lite": (lambda: TimmModel("tf_efficientnet_lite0", 1280, 32, "avg", "none"), 16),
    "clip-timm-other": (lambda: TimmModel("regnetx_002", 16, 32), None),
}
KINDS = ("clip", "vit", "bert", "cnn")


def ownership(units: list[Unit], names: list[str]) -> set[int]:
    """How many units the names belong to."""
    return set(Counter(name for unit in units for name in names if unit.owns(name)).values()) | {
        0 for name in names if not any(unit.owns(name) for unit in units)
    }


@pytest.mark.parametrize("name", NETWORKS)
def test_units_of_a_library_are_its_forward_pass(name: str) -> None:
    torch.manual_seed(0)
    make_network, blocks = NETWORKS[name]
    network = make_network().eval()
    images = torch.randn(3, 3, 32, 32)
    units = library_units(network, "net")
    assert len(units) == (1 if blocks is None else blocks + 2)
    assert torch.equal(run_units(units, images), network(images))
    names = [f"net.{key}" for key in network.state_dict()]
    assert ownership(units, names) == {1}
    leaves = [f"net.{key}" for key, module in network.named_modules() if key and not any(module.children())]
    assert ownership(units, leaves) == {1}, "modules without state, too: dropout must have an owner"
    for unit in units[1:-1]:
        (part,) = unit.parts
        assert unit.run is network.get_submodule(part.removeprefix("net."))


@pytest.mark.parametrize("kind", KINDS)
def test_units_are_the_backbone(kind: str, tmp_path: Path) -> None:
    backbone = make(kind, tmp_path).eval().backbone
    units = units_of(backbone)
    assert len(units) == {"clip": 3, "vit": 12, "bert": 2, "cnn": 9}[kind] + 2
    assert torch.equal(run_units(units, inputs(kind)), backbone(inputs(kind)))
    assert ownership(units, list(backbone.state_dict())) == {1}


@pytest.mark.parametrize("build", [cnn, vgg11])
def test_units_of_networks_trained_from_scratch(build: Callable[..., Any]) -> None:
    backbone = build(IMAGES).eval().backbone
    assert torch.equal(run_units(units_of(backbone), inputs("cnn")), backbone(inputs("cnn")))
    assert ownership(units_of(backbone), list(backbone.state_dict())) == {1}


def test_a_backbone_that_says_nothing_is_one_unit() -> None:
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 8))
    (unit,) = units_of(backbone)
    assert unit.run is backbone
    assert unit.owns("1.weight")


def test_layers_of_a_perceptron_are_units() -> None:
    backbone = mlp(DIGITS, layers=3).backbone
    assert [unit.parts for unit in units_of(backbone)] == [("hidden",), ("more.0",), ("more.1",)]
    assert ownership(units_of(backbone), list(backbone.state_dict())) == {1}


def test_layers_of_bert_are_what_the_encoder_runs(tmp_path: Path) -> None:
    """Padding travels from unit to unit; an encoder of unknown inside runs as a whole and gives the same."""
    backbone: Any = make("bert", tmp_path).eval().backbone
    ids = inputs("bert")
    ids[0] = 0
    divided = backbone(ids)
    torch.testing.assert_close(backbone._whole(ids), divided, rtol=1e-6, atol=1e-6)
    backbone.encoder.config.is_decoder = True
    assert len(backbone.units()) == 1


@pytest.mark.parametrize(("mode", "kind"), [("lora", "clip"), ("lora", "bert"), ("lora", "vit")])
def test_what_is_inserted_into_blocks_belongs_to_them(mode: str, kind: str, tmp_path: Path) -> None:
    backbone = MODES[mode](make(kind, tmp_path)).backbone
    assert ownership(units_of(backbone), list(backbone.state_dict())) == {1}


def test_units_run_wholly_on_meta(tmp_path: Path) -> None:
    for kind in KINDS:
        backbone = make(kind, tmp_path).to("meta").backbone
        features: Tensor = run_units(units_of(backbone), inputs(kind).to("meta"))
        assert features.is_meta


@pytest.mark.parametrize(
    ("kind", "container"),
    [
        ("clip", "visual"),
        ("clip", "visual.transformer"),
        ("clip", "visual.transformer.resblocks.1"),
        ("vit", "trunk"),
        ("vit", "trunk.blocks.11"),
        ("bert", "encoder"),
        ("bert", "encoder.encoder"),
        ("bert", "encoder.encoder.layer.1"),
    ],
)
def test_hooks_are_called_wherever_they_are(kind: str, container: str, tmp_path: Path) -> None:
    backbone = make(kind, tmp_path).eval().backbone
    before = backbone(inputs(kind))
    seen: list[nn.Module] = []
    backbone.get_submodule(container).register_forward_hook(lambda module, given, out: seen.append(module))
    torch.testing.assert_close(backbone(inputs(kind)), before, rtol=1e-5, atol=1e-5)
    assert seen == [backbone.get_submodule(container)]
