"""Adapters (arXiv 1902.00751): a bottleneck after the MLP of every Transformer block, the rest frozen.

mlp(x) ─> h ─> h + scale * up(relu(down(h))) ─> residual stream;  up = 0 at the start: nothing changes
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from fedsim.models.base import Classifier
from fedsim.models.blocks import transformer_blocks
from fedsim.models.tuning import backbone_part
from fedsim.ranges import Count, Positive


class Adapter(nn.Module):
    """h [..., width] -> h + scale * up(relu(down(h))).

    Args:
        width: of what comes in and goes out.
        r: units of the bottleneck.
        scale: factor on what is added.
    """

    def __init__(self, width: int, r: int, scale: float) -> None:
        super().__init__()
        self.down = nn.Linear(width, r)
        self.up = nn.Linear(r, width)
        self.scale = scale
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, h: Tensor) -> Tensor:
        """Same shape as h."""
        added: Tensor = self.up(functional.relu(self.down(h)))
        return h + self.scale * added

    def after(self, module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        """Forward hook: what `module` puts out goes through the adapter."""
        adapted: Tensor = self(output)
        return adapted


def adapter(
    model: Classifier, /, *, r: Count = 64, scale: Positive = 1.0, head: bool | None = None
) -> Classifier:
    """A bottleneck after the MLP of every block trains; Transformers for images and text.

    The bottlenecks are `backbone.adapters.*`; names of the backbone stay as they are.

    Args:
        r: units of each bottleneck.
        scale: factor on what the bottleneck adds.
        head: whether the head trains, too; by default a new head does, a CLIP text classifier does not.

    Raises:
        UnfitTuning: the backbone is no Transformer.
    """
    blocks = transformer_blocks(model.backbone, "adapter")
    device = next(model.backbone.parameters()).device
    adapters = [Adapter(block.width, r, scale).to(device) for block in blocks]
    model.backbone.adapters = nn.ModuleList(adapters)
    for block, inserted in zip(blocks, adapters, strict=True):
        block.mlp.register_forward_hook(inserted.after)
    return backbone_part(model, lambda name: name.startswith("backbone.adapters."), head, "adapter")
