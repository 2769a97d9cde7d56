"""Units of the networks that come from timm and open_clip (see `fedsim.models.base.Unit`).

Each function repeats the forward pass of one class of a library, cut after its stem and after every block;
subclasses, whose forward pass may be another one, all other networks, and those whose containers have hooks
(which running the units would miss) are one unit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from fedsim.models.base import Unit, hooked_around

_LAYERS = ("layer1", "layer2", "layer3", "layer4")  #: where residual networks keep their blocks


def library_units(network: nn.Module, at: str) -> list[Unit]:
    """Units of a network that maps prepared images [n, 3, h, w] to features [n, d].

    Args:
        network: a timm model without classifier or an open_clip visual tower.
        at: its name in the backbone, for the units' parts.
    """
    find = _known().get(type(network))
    units = find(network) if find is not None else None
    if units is None or hooked_around(network, units):
        return [Unit((at,), lambda x: _features(network(x)))]
    return [Unit(tuple(f"{at}.{part}" for part in unit.parts), unit.run) for unit in units]


def _known() -> Mapping[type[nn.Module], Callable[[Any], list[Unit] | None]]:
    """Class -> its units; None where an instance was built with what is not repeated here."""
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer as OpenClipVit
    from timm.models.efficientnet import EfficientNet
    from timm.models.resnet import ResNet
    from timm.models.vision_transformer import VisionTransformer

    return {
        VisionTransformer: _vit,
        EfficientNet: _efficientnet,
        ResNet: _resnet,
        TimmModel: _open_clip_timm,
        OpenClipVit: _open_clip_vit,
        ModifiedResNet: _open_clip_resnet,
    }


def _features(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """What a network puts out; CoCa's image tower gives its tokens, too, behind the features."""
    return output[0] if isinstance(output, tuple) else output


def _blocks(network: nn.Module, *containers: str) -> list[Unit]:
    """The children of some containers, one unit each."""
    return [
        Unit((f"{container}.{name}",), block)
        for container in containers
        for name, block in network.get_submodule(container).named_children()
    ]


def _vit(vit: Any) -> list[Unit]:
    def embed(x: Tensor) -> Tensor:
        tokens: Tensor = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(x))))
        return tokens

    def top(x: Tensor) -> Tensor:
        features: Tensor = vit.forward_head(vit.norm(x))
        return features

    below = ("patch_embed", "cls_token", "reg_token", "pos_embed", "pos_drop", "patch_drop", "norm_pre")
    above = ("norm", "attn_pool", "fc_norm", "head_drop", "head")
    return [Unit(below, embed), *_blocks(vit, "blocks"), Unit(above, top)]


def _efficientnet(net: Any) -> list[Unit]:
    def stem(x: Tensor) -> Tensor:
        activations: Tensor = net.bn1(net.conv_stem(x))
        return activations

    def top(x: Tensor) -> Tensor:
        features: Tensor = net.forward_head(net.bn2(net.conv_head(x)))
        return features

    stages = [f"blocks.{number}" for number, _ in enumerate(net.blocks)]
    above = ("conv_head", "bn2", "global_pool", "classifier")
    return [Unit(("conv_stem", "bn1"), stem), *_blocks(net, *stages), Unit(above, top)]


def _resnet(net: Any) -> list[Unit]:
    def stem(x: Tensor) -> Tensor:
        activations: Tensor = net.maxpool(net.act1(net.bn1(net.conv1(x))))
        return activations

    below = ("conv1", "bn1", "act1", "maxpool")
    above = ("global_pool", "fc")
    return [Unit(below, stem), *_blocks(net, *_LAYERS), Unit(above, net.forward_head)]


def _open_clip_timm(tower: Any) -> list[Unit]:
    *others, last = library_units(tower.trunk, "trunk")

    def top(x: Tensor) -> Tensor:
        features: Tensor = tower.head(last.run(x))
        return features

    return [*others, Unit((*last.parts, "head"), top)]


def _open_clip_vit(vit: Any) -> list[Unit] | None:
    if vit.output_tokens or not vit.transformer.batch_first:
        return None

    def top(x: Tensor) -> Tensor:
        pooled: Tensor = vit._pool(x)[0]
        return pooled if vit.proj is None else pooled @ vit.proj

    below = ("conv1", "class_embedding", "positional_embedding", "patch_dropout", "ln_pre")
    above = ("ln_post", "attn_pool", "attn_pool_contrastive", "proj")
    return [Unit(below, vit._embeds), *_blocks(vit, "transformer.resblocks"), Unit(above, top)]


def _open_clip_resnet(net: Any) -> list[Unit]:
    below = tuple(f"{part}{number}" for number in (1, 2, 3) for part in ("conv", "bn", "act"))
    return [Unit((*below, "avgpool"), net.stem), *_blocks(net, *_LAYERS), Unit(("attnpool",), net.attnpool)]
