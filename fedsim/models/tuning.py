"""How a backbone is tuned: which parameters train (and therefore travel); a function is a name of `[tuning]`.

The studies behind these modes: FedTune (bias, partial, head) and BitFit, arXiv 2106.10199 (bias).
Wherever `head` is optional, a head that already classifies (a CLIP text classifier) stays frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from fedsim.errors import UnfitTuning, UserError
from fedsim.models.base import Classifier, train_only
from fedsim.ranges import Count

#: `bias` and `norm` find these; RMS norms of timm and transformers are recognised by their names
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm)


def full(model: Classifier, /) -> Classifier:
    """Every parameter trains, in train mode (dropout on, BatchNorm statistics move); any model."""
    return train_only(model, lambda name: True, mode="full", train_modules=("",))


def head(model: Classifier, /) -> Classifier:
    """The head alone trains (linear probe); any model. Features of the frozen backbone are computed once."""
    return train_only(model, lambda name: name.startswith("head."), mode="head")


def bias(model: Classifier, /, *, head: bool | None = None) -> Classifier:
    """All biases of the backbone train; any backbone that has some (a CNN: mostly those of its norms).

    In a Transformer the fused biases of attention (`in_proj_bias`) are among them: 0.12 % of a ViT-B/16.

    Args:
        head: whether the head trains, too; by default a new head does, a CLIP text classifier does not.
    """
    return backbone_part(model, lambda name: name.rsplit(".", 1)[-1].endswith("bias"), head, "bias")


def norm(model: Classifier, /, *, head: bool | None = None) -> Classifier:
    """Scales and biases of normalisation layers train; any backbone that has some.

    Running statistics of BatchNorm stay as they are.

    Args:
        head: whether the head trains, too; by default a new head does, a CLIP text classifier does not.
    """
    layers = {name for name, module in model.named_modules() if _is_norm(module)}
    return backbone_part(model, lambda name: name.rpartition(".")[0] in layers, head, "norm")


def partial(model: Classifier, /, *, blocks: Count = 1) -> Classifier:
    """The last blocks of the backbone train, in train mode; Transformers and CNNs.

    Blocks are what the backbone repeats (Transformer blocks, bottlenecks), or else its direct children. A
    new head trains, too; a CLIP text classifier does not.

    Args:
        blocks: how many, counted from the end.

    Raises:
        UserError: the backbone has fewer blocks.
        UnfitTuning: it has none at all.
    """
    names = block_names(model.backbone)
    if not names:
        raise UnfitTuning("tuning 'partial' finds no blocks in this backbone")
    if blocks > len(names):
        raise UserError(
            f"[tuning] blocks = {blocks}, but this backbone has {len(names)} blocks "
            f'({", ".join(names)}); give at most {len(names)}, or [tuning] name = "full"'
        )
    chosen = [f"backbone.{name}" for name in names[-blocks:]]
    prefixes = tuple(f"{name}." for name in chosen)
    return backbone_part(model, lambda name: name.startswith(prefixes), None, "partial", chosen)


def block_names(backbone: nn.Module) -> list[str]:
    """Names of the backbone's blocks, first to last.

    The class that the backbone's lists of equal modules hold most of (`resblocks` of open_clip, `blocks`
    of timm, the bottlenecks of `layer1` to `layer4` of a ResNet), or else the direct children that have
    parameters.
    """
    found: dict[type[nn.Module], list[str]] = {}
    for name, module in backbone.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len({type(m) for m in module}) == 1:
            prefix = f"{name}." if name else ""
            names = [f"{prefix}{child}" for child, _ in module.named_children()]
            found.setdefault(type(module[0]), []).extend(names)
    if found:
        return max(found.values(), key=len)
    return [name for name, child in backbone.named_children() if any(True for _ in child.parameters())]


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, _NORMS) or type(module).__name__.lower().endswith("rmsnorm")


def backbone_part(
    model: Classifier,
    chosen: Callable[[str], bool],
    with_head: bool | None,
    mode: str,
    train_modules: Iterable[str] = (),
) -> Classifier:
    """Train a part of the backbone; a backbone without such a part is an error even if the head trains."""
    names = {name for name, _ in model.named_parameters() if name.startswith("backbone.") and chosen(name)}
    if names and (not model.head_is_prior if with_head is None else with_head):
        names |= {name for name, _ in model.named_parameters() if name.startswith("head.")}
    return train_only(model, names.__contains__, mode=mode, train_modules=train_modules)
