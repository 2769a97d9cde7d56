"""LoRA (arXiv 2106.09685) on the attention's queries and values: W + (alpha / r) B A, B = 0 at the start.

Projections that are layers of their own (`query`, `q_proj`, timm's fused `qkv`, ...) get it from peft; on
a fused `qkv` one A [r, d] and one B [3 d, r] serve queries, keys and values: r * 4 d values, exactly as many
as two pairs for queries and values. torch's own attention (open_clip) keeps its weights in a bare
`in_proj_weight` that peft reaches only together with the output projection, so there the two pairs are a
parametrisation of it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fedsim.errors import UserError
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
    """Low-rank updates of the attention's queries and values train (`*.lora_A*`, `*.lora_B*`).

    Args:
        r: rank of each update.
        alpha: updates are scaled by alpha / r.
        head: whether the head trains, too; by default it does unless it already classifies.

    Raises:
        UserError: the backbone is no Transformer, or its attention has no projections known here.
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
        raise UserError("tuning 'lora': keys and values of this attention have widths of their own")
    update = QueryValueUpdate(attention.embed_dim, r, alpha / r, weight.device)
    parametrize.register_parametrization(attention, "in_proj_weight", update)


def _inject(attention: nn.Module, r: int, alpha: float) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    linear = [name for name, module in attention.named_modules() if isinstance(module, nn.Linear)]
    targets = [
        name for known in (_PROJECTIONS, _FUSED) for name in linear if name.rpartition(".")[2] in known
    ]
    if not targets:
        raise UserError(
            f"tuning 'lora' finds no query and value projections in {type(attention).__name__} "
            f"({', '.join(linear) or 'no linear layers'}); choose another [tuning] name such as 'adapter'"
        )
    config = LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, bias="none")
    inject_adapter_in_model(config, attention)
