"""Where the Transformer blocks of a backbone are, and their attention and MLP: what inserted modules need.

Known by the names that libraries use, so a new backbone needs no code here: timm and open_clip ViTs
(`attn`, `mlp`), BERT-like encoders (`attention`, `output.dense`), DistilBERT (`attention`, `ffn`), ...
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fedsim.errors import UnfitTuning
from fedsim.models.tuning import block_names

_ATTENTION = ("attn", "attention", "self_attn", "self_attention")
_MLP = ("mlp", "ffn", "feed_forward", "output.dense")


@dataclass(frozen=True)
class Block:
    """One Transformer block.

    Attributes:
        attention: its self-attention.
        mlp: the module whose output [n, tokens, width] the MLP adds to the residual stream.
        width: of that output.
    """

    attention: nn.Module
    mlp: nn.Module
    width: int


def transformer_blocks(backbone: nn.Module, mode: str) -> list[Block]:
    """The Transformer blocks of a backbone, first to last.

    Args:
        backbone: any module.
        mode: the tuning mode that asks, for the error message.

    Raises:
        UnfitTuning: its blocks are not Transformer blocks.
    """
    found = []
    for name in block_names(backbone):
        block = backbone.get_submodule(name)
        attention, mlp = _first(block, _ATTENTION), _first(block, _MLP)
        linear = [m for m in mlp.modules() if isinstance(m, nn.Linear)] if mlp is not None else []
        if attention is None or mlp is None or not linear:
            raise UnfitTuning(
                f"tuning '{mode}' needs a Transformer, the blocks of this backbone are of type "
                f"{type(block).__name__}"
            )
        found.append(Block(attention, mlp, linear[-1].out_features))
    if not found:
        raise UnfitTuning(f"tuning '{mode}' needs a Transformer, this backbone has no blocks")
    return found


def _first(block: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    known = dict(block.named_modules())
    return next((known[name] for name in names if name in known), None)
