"""LoRA (arXiv 2106.09685) on the attention's queries and values: W + (alpha / r) B A, B = 0 at the start.

Projections that are layers of their own (`query`, `q_proj`, timm's fused `qkv`, ...) get it from peft; on
a fused `qkv` one A [r, d] and one B [3 d, r] serve queries, keys and values: r * 4 d values, exactly as many
as two pairs for queries and values. torch's own attention (open_clip) keeps its weights in a bare
`in_proj_weight` that peft reaches only together with the output projection, so there the two pairs are a
parametrisation of it.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fedsim.errors import UnfitTuning, UserError
from fedsim.models.base import Classifier
from fedsim.models.blocks import transformer_blocks
from fedsim.models.tuning import backbone_part
from fedsim.ranges import Count, Positive

_PROJECTIONS = ("q", "v", "q_proj", "v_proj", "q_lin", "v_lin", "query", "value", "query_proj", "value_proj")
_FUSED = ("qkv", "Wqkv", "qkv_proj", "in_proj", "query_key_value")


class QueryValueUpdate(nn.Module):
    """Fused weight [3 d, d] -> the same with low-rank updates in its query and value thirds.

    Args:
        width: d.
        r: rank.
        scale: alpha / r.
        device: of the weight.
    """

    def __init__(self, width: int, r: int, scale: float, device: torch.device) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(2, r, width, device=device))
        self.lora_B = nn.Parameter(torch.zeros(2, width, r, device=device))
        self.scale = scale
        for down in self.lora_A:
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """[3 d, d]."""
        query, value = self.scale * (self.lora_B @ self.lora_A)
        return weight + torch.cat([query, torch.zeros_like(query), value]).to(weight.dtype)


def lora(
    model: Classifier, /, *, r: Count = 8, alpha: Positive = 16.0, head: bool | None = None
) -> Classifier:
    """Low-rank updates of the attention's queries and values train; Transformers for images and text.

    What trains is named `*.lora_A*` and `*.lora_B*`.

    Args:
        r: rank of each update.
        alpha: updates are scaled by alpha / r.
        head: whether the head trains, too; by default a new head does, a CLIP text classifier does not.

    Raises:
        UnfitTuning: the backbone is no Transformer, or its attention has no projections known here.
    """
    for block in transformer_blocks(model.backbone, "lora"):
        if isinstance(block.attention, nn.MultiheadAttention):
            _parametrise(block.attention, r, alpha)
        else:
            _inject(block.attention, r, alpha)
    return backbone_part(model, lambda name: "lora_" in name, head, "lora")


def _parametrise(attention: nn.MultiheadAttention, r: int, alpha: float) -> None:
    weight = attention.in_proj_weight
    if weight is None:
        raise UnfitTuning("tuning 'lora': keys and values of this attention have widths of their own")
    update = QueryValueUpdate(attention.embed_dim, r, alpha / r, weight.device)
    parametrize.register_parametrization(attention, "in_proj_weight", update)


def _inject(attention: nn.Module, r: int, alpha: float) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    linear = [name for name, module in attention.named_modules() if isinstance(module, nn.Linear)]
    targets = [
        name for known in (_PROJECTIONS, _FUSED) for name in linear if name.rpartition(".")[2] in known
    ]
    if not targets:
        raise UnfitTuning(
            f"tuning 'lora' finds no query and value projections in {type(attention).__name__} "
            f"({', '.join(linear) or 'no linear layers'})"
        )
    config = LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, bias="none")
    inject_adapter_in_model(config, attention)


# ---------------------------------------------------------------------------------- for other programs


def peft_layers(module: nn.Module) -> dict[str, Any]:
    """The layers inside a module that peft put low-rank updates on, by name."""
    from peft.tuners.lora import LoraLayer

    return {name: layer for name, layer in module.named_modules() if isinstance(layer, LoraLayer)}


def merged(module: nn.Module) -> nn.Module:
    """A copy of the module with peft's updates, if it has any, added into its weights: plain layers again."""
    module = copy.deepcopy(module)
    for name, layer in peft_layers(module).items():
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, layer.get_base_layer())
    return module


def export_peft(model: Classifier, folder: Path) -> None:
    """Write the updates as `peft.PeftModel.from_pretrained(base, folder)` reads them.

    `base` is the untuned library model inside the backbone (the transformers encoder, the timm trunk).
    The file's form is peft's documented one: `base_model.model.` and the names of the base.

    Args:
        model: tuned by `lora`, its updates made by peft.
        folder: an existing one.

    Raises:
        UserError: the tuning trains parts of the backbone that such a folder has no place for.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    trained = [name for name, p in model.backbone.named_parameters() if p.requires_grad]
    other = [name for name in trained if "lora_" not in name]
    layers = peft_layers(model.backbone)
    if other or not layers:
        named = f"trains '{other[0]}'" if other else "made no updates of peft"
        raise UserError(f"this tuning {named}: a peft folder holds LoRA's updates alone")
    inner, _, _ = next(iter(layers)).partition(".")
    layer = next(iter(layers.values()))
    LoraConfig(
        base_model_name_or_path=getattr(model.backbone, "source", None),
        r=layer.r["default"],
        lora_alpha=layer.lora_alpha["default"],
        target_modules=[name.removeprefix(f"{inner}.") for name in layers],
        bias="none",
        inference_mode=True,
    ).save_pretrained(folder)
    updates = {
        f"base_model.model.{name.replace('.default.', '.')}": value.detach().cpu().contiguous()
        for name, value in model.backbone.get_submodule(inner).state_dict().items()
        if "lora_" in name
    }
    save_file(updates, folder / "adapter_model.safetensors")
