"""Visual prompt tuning (arXiv 2203.12119): p learned tokens beside the patches of a frozen ViT.

    shallow   [cls; P; patches] enters the first block
    deep      P_l takes the place of the p prompt tokens before every block l

After the last block the prompts leave, so that norms and pooling see the tokens they know.
Initialisation U(-v, v), v = sqrt(6 / (3 * patch² + width)).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from fedsim.errors import UnfitTuning
from fedsim.models.base import Classifier
from fedsim.models.tuning import backbone_part
from fedsim.ranges import Count


@dataclass(frozen=True)
class Vit:
    """What prompts must know of a ViT: blocks [n, tokens, width] -> same, patch area, tokens before P."""

    blocks: list[nn.Module]
    width: int
    patch_area: int
    before: int  #: 1 where a class token comes first, else 0


class Prompts(nn.Module):
    """Prompt tokens, `tokens` [layers, p, width]: 1 layer is shallow, as many as blocks is deep.

    Args:
        vit: where they go in.
        count: p.
        layers: how many blocks get prompts of their own.
        device: of the tokens.
    """

    def __init__(self, vit: Vit, count: int, layers: int, device: torch.device) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(layers, count, vit.width, device=device))
        bound = math.sqrt(6 / (3 * vit.patch_area + vit.width))
        nn.init.uniform_(self.tokens, -bound, bound)
        self.before = vit.before
        for layer in range(layers):
            vit.blocks[layer].register_forward_pre_hook(partial(self.enter, layer))
        vit.blocks[-1].register_forward_hook(self.leave)

    def enter(self, layer: int, block: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Forward pre-hook: insert the layer's prompts, replacing those of the layer below."""
        x = inputs[0]
        rest = self.before + (self.tokens.shape[1] if layer else 0)
        prompts = self.tokens[layer].expand(len(x), -1, -1).to(x.dtype)
        return torch.cat([x[:, : self.before], prompts, x[:, rest:]], dim=1), *inputs[1:]

    def leave(self, block: nn.Module, inputs: object, output: Tensor) -> Tensor:
        """Forward hook: take the prompts out again."""
        rest = self.before + self.tokens.shape[1]
        return torch.cat([output[:, : self.before], output[:, rest:]], dim=1)


def vpt_shallow(model: Classifier, /, *, prompts: Count = 10, head: bool | None = None) -> Classifier:
    """Prompt tokens in front of the first block train; Vision Transformers of timm and open_clip.

    The tokens are `backbone.prompts.tokens`.

    Args:
        prompts: how many.
        head: whether the head trains, too; by default a new head does, a CLIP text classifier does not.

    Raises:
        UnfitTuning: the backbone is no plain Vision Transformer.
    """
    return _vpt(model, "vpt-shallow", prompts, head, deep=False)


def vpt_deep(model: Classifier, /, *, prompts: Count = 10, head: bool | None = None) -> Classifier:
    """Prompt tokens in front of every block train; Vision Transformers of timm and open_clip.

    The tokens are `backbone.prompts.tokens`.

    Args:
        prompts: how many in each block.
        head: whether the head trains, too; by default a new head does, a CLIP text classifier does not.

    Raises:
        UnfitTuning: the backbone is no plain Vision Transformer.
    """
    return _vpt(model, "vpt-deep", prompts, head, deep=True)


def _vpt(model: Classifier, mode: str, count: int, head: bool | None, *, deep: bool) -> Classifier:
    vit = find_vit(model.backbone)
    if vit is None:
        raise UnfitTuning(
            f"tuning '{mode}' puts tokens beside image patches, this backbone is no plain Vision "
            "Transformer of timm or open_clip"
        )
    device = next(model.backbone.parameters()).device
    model.backbone.prompts = Prompts(vit, count, len(vit.blocks) if deep else 1, device)
    return backbone_part(model, lambda name: name.startswith("backbone.prompts."), head, mode)


def find_vit(backbone: nn.Module) -> Vit | None:
    """The Vision Transformer in a backbone, if there is one."""
    from open_clip.transformer import VisionTransformer as OpenClipVit
    from timm.models.vision_transformer import VisionTransformer as TimmVit

    for module in backbone.modules():
        if isinstance(module, TimmVit):
            area = math.prod(module.patch_embed.patch_size)
            return Vit(list(module.blocks), module.embed_dim, area, int(module.cls_token is not None))
        if isinstance(module, OpenClipVit) and module.transformer.batch_first:
            area = math.prod(module.patch_size)
            return Vit(list(module.transformer.resblocks), module.transformer.width, area, 1)
    return None
