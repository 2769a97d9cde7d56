"""Prunable layers are found without code per model; masked channels are silent and can be taken out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from fedsim.models.base import Classifier, DataInfo
from fedsim.models.cnn import cnn, mlp
from fedsim.models.resnet import resnet20
from fedsim.models.timm_models import timm_model
from fedsim.models.vgg import vgg_small
from fedsim.unlearning.compact import compact, size_of
from fedsim.unlearning.graph import first_layer, prunable
from fedsim.unlearning.masks import enforce, entries, union

NAMES = tuple("abcdefghij")
IMAGES = DataInfo(NAMES, (3, 16, 16))


class Padded(nn.Module):
    """A residual block whose shortcut is padded with zero channels (option A of arXiv 1512.03385)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = x.float() / 255
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(y + functional.pad(x, (0, 0, 0, 0, 0, 3))).flatten(1)


MODELS: dict[str, Callable[[], Classifier]] = {
    "vgg": lambda: vgg_small(IMAGES),
    "resnet": lambda: resnet20(IMAGES),
    "padded": lambda: Classifier(Padded(), nn.Linear(6 * 256, 10)),
    "cnn": lambda: cnn(IMAGES),
    "no norm": lambda: cnn(IMAGES, norm="none"),
    "mlp": lambda: mlp(IMAGES),
    "vit": lambda: timm_model(IMAGES, name="vit_tiny_patch16_224", image_size=16),
}


def _model(kind: str) -> tuple[Classifier, Tensor]:
    """A model whose norms are not at their start, and images."""
    torch.manual_seed(0)
    model = MODELS[kind]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                assert tensor is not None
                tensor.uniform_(0.2, 1.0)
    return model.eval(), torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)


def test_layers_of_a_residual_network() -> None:
    model, images = _model("resnet")
    layers = prunable(model, images[:1])
    assert sum(layer.channels for layer in layers.values()) == 688  # no 1x1 shortcut among them
    assert len(layers) == 19
    removable = [name for name, layer in layers.items() if layer.removable]
    assert removable == [f"backbone.blocks.{n}.conv1" for n in range(9)]
    first = layers["backbone.blocks.3.conv1"]
    assert (first.norm, first.consumers) == ("backbone.blocks.3.bn1", {"backbone.blocks.3.conv2": 1})
    assert first_layer(model, images[:1]) == "backbone.stem.conv"


def test_layers_of_a_chain_reach_the_head() -> None:
    layers = prunable(*_pair("vgg"))
    assert [layer.channels for layer in layers.values()] == [32, 32, 64, 64, 128]
    assert all(layer.removable for layer in layers.values())
    assert layers["backbone.blocks.4.conv"].consumers == {"head": 1}


def _pair(kind: str) -> tuple[Classifier, Tensor]:
    model, images = _model(kind)
    return model, images[:1]


def test_hidden_units_of_transformers_and_perceptrons() -> None:
    layers = prunable(*_pair("vit"))
    assert all(name.endswith("mlp.fc1") and layer.removable for name, layer in layers.items())
    assert len(layers) == 12
    assert list(prunable(*_pair("mlp"))) == ["backbone.hidden"]


def test_group_norm_and_grouped_convolutions_are_not_taken_out() -> None:
    torch.manual_seed(0)
    layers = prunable(cnn(IMAGES, norm="group"), torch.zeros(1, 3, 16, 16))
    assert len(layers) == 4
    assert not any(layer.removable for layer in layers.values())
    depthwise = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(), nn.Flatten()
    )
    found = prunable(Classifier(depthwise, nn.Linear(6 * 144, 10)), torch.zeros(1, 3, 16, 16))
    assert list(found) == ["backbone.0"]
    assert not found["backbone.0"].removable


@pytest.mark.parametrize("kind", MODELS)
def test_compact_puts_out_the_same_and_costs_less(kind: str) -> None:
    model, images = _model(kind)
    layers = prunable(model, images[:1])
    generator = torch.Generator().manual_seed(1)
    masks = {name: torch.rand(layer.channels, generator=generator) < 0.3 for name, layer in layers.items()}
    fills = {name: entries(model, layer) for name, layer in layers.items()}
    state = dict(model.state_dict())
    enforce(state, fills, masks)
    with torch.no_grad():
        masked = model(images)
        small = compact(model, layers, masks)
        torch.testing.assert_close(small(images), masked, rtol=0, atol=1e-5)
    before, after = size_of(model, images[:1]), size_of(small, images[:1])
    assert after.parameters < before.parameters
    assert after.flops < before.flops


def test_a_masked_channel_puts_out_nothing() -> None:
    model, images = _model("vgg")
    layer = prunable(model, images[:1])["backbone.blocks.1.conv"]
    mask = torch.zeros(32, dtype=torch.bool)
    mask[[3, 17]] = True
    fills = entries(model, layer)
    bn = "backbone.blocks.1.bn"
    assert fills == {
        "backbone.blocks.1.conv.weight": 0.0,
        f"{bn}.weight": 0.0,
        f"{bn}.bias": 0.0,
        f"{bn}.running_mean": 0.0,
        f"{bn}.running_var": 1.0,
    }
    outputs: list[Tensor] = []
    model.get_submodule(bn).register_forward_hook(lambda module, inputs, out: outputs.append(out))
    with torch.no_grad():
        enforce(dict(model.state_dict()), {layer.name: fills}, {layer.name: mask})
        model(images)
    assert (outputs[0][:, mask] == 0).all()
    assert (outputs[0][:, ~mask] != 0).any(dim=0).all()


def test_union_of_masks() -> None:
    one = {"a": torch.tensor([True, False, False])}
    two = {"a": torch.tensor([False, False, True]), "b": torch.tensor([True])}
    both = union(one, two)
    assert both["a"].tolist() == [True, False, True]
    assert both["b"].tolist() == [True]
    assert one["a"].tolist() == [True, False, False]


def test_masks_are_enforced_on_meta_tensors() -> None:
    state = {"w": torch.empty(3, 2, device="meta"), "v": torch.empty(3, device="meta")}
    mask = torch.empty(3, dtype=torch.bool, device="meta")
    enforce(state, {"l": {"w": 0.0, "v": 1.0}}, {"l": mask})
    assert state["w"].is_meta


def test_masks_of_the_cpu_are_enforced_on_a_gpu() -> None:
    """As they come from a file; a fake tensor refuses, like a real one, to meet another device's."""
    with FakeTensorMode():
        state = {"w": torch.ones(3, 2, device="cuda"), "v": torch.ones(3, device="cuda")}
        mask = torch.tensor([True, False, True])
        enforce(state, {"l": {"w": 0.0, "v": 1.0}}, {"l": mask})
        assert state["w"].is_cuda
