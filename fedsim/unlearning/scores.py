"""How much of a class is in a channel: TF-IDF over channels (arXiv 2110.11794, section 3).

A[u, j] is the mean over all images of class u, of all clients, of what channel j puts out: the mean over
pixels of ReLU(layer output before its norm). For the class u that is to be forgotten, layer by layer,

    TF[j]  = A[u, j] / Σ_j A[u, j]
    df[j]  = #{ i : A[i, j] ≥ mean_j A[i, :] }                 classes in which the channel occurs
    IDF[j] = log( (1 + |U|) / (1 + df[j]) )
    score  = TF · IDF

and the channels with the **highest** scores are pruned. The authors' released code differs in three places,
kept here as ablations: `idf = "code"` (a channel occurs where it exceeds its own mean over classes, and
log(|U| / (1 + df))), `scope = "global"` (one threshold over all layers) and `direction = "lowest"`.

Clients send Σ A and the number of images by class, so the sum over clients is the pooled one, whatever their
shares of the classes are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from fedsim.errors import UserError

Idf = Literal["paper", "code"]
Scope = Literal["layer", "global"]
Direction = Literal["highest", "lowest", "random"]


# ------------------------------------------------------------------------------------- the client


@contextmanager
def activations(model: nn.Module, layers: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """What the named layers put out in the latest forward pass inside: name -> mean ReLU [n, channels]."""
    found: dict[str, Tensor] = {}

    def keep(name: str, out: Tensor) -> None:
        out = torch.relu(out.detach())
        # [n, channels, h, w] of a convolution, [n, ..., channels] of a linear layer
        found[name] = (
            out.mean((2, 3)) if out.dim() == 4 else out.flatten(1, -2).mean(1) if out.dim() > 2 else out
        )

    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, out, name=name: keep(name, out)
        )
        for name in layers
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def channel_sums(
    network: nn.Module,
    layers: Mapping[str, int],
    batches: Iterable[tuple[Tensor, Tensor]],
    classes: int,
    *,
    clip: float = 0.0,
    model: nn.Module | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Σ of activations and number of samples, by class.

    Args:
        network: maps a batch's inputs to logits, in eval mode.
        layers: name -> channels.
        batches: inputs [n, ...] and labels int64 [n], on one device.
        classes: number of classes |U|.
        clip: largest L2 norm of one sample's activations in one layer (0: not clipped); what bounds the
            influence of a sample when noise is added to the sums.
        model: where the layers' names are looked up (default: the network).

    Returns:
        name -> float64 [classes, channels], and float64 [classes].
    """
    sums: dict[str, Tensor] = {}
    counts = torch.zeros(0)
    with activations(model or network, layers) as found:
        for inputs, labels in batches:
            network(inputs)
            if not sums:
                counts = torch.zeros(classes, dtype=torch.float64, device=labels.device)
                sums = {name: counts.new_zeros(classes, channels) for name, channels in layers.items()}
            counts.index_add_(0, labels, torch.ones_like(labels, dtype=torch.float64))
            for name, values in found.items():
                values = values.double()
                if clip:
                    norms = values.norm(dim=1, keepdim=True).clamp_min(clip)
                    values = values * (clip / norms)
                sums[name].index_add_(0, labels, values)
    return sums, counts


# ------------------------------------------------------------------------------------- the server


def score(means: Tensor, target: int, present: Tensor, idf: Idf = "paper") -> Tensor:
    """TF-IDF of the channels of one layer for one class.

    Args:
        means: A, float64 [classes, channels], not negative.
        target: the class u.
        present: bool [classes]: classes with enough samples to count; the others are no part of U.
        idf: the paper's, or that of the released code.

    Returns:
        float64 [channels]; all 0 where the class leaves no trace in the layer.
    """
    total = means[target].sum()
    if total <= 0:
        return torch.zeros_like(means[target])
    rows = means[present & (means.sum(1) > 0)]
    size = len(rows)
    if idf == "paper":
        df = (rows >= rows.mean(1, keepdim=True)).sum(0)
        weight = torch.log((1 + size) / (1 + df.double()))
    else:
        df = (rows >= rows.mean(0, keepdim=True)).sum(0)
        weight = torch.log(size / (1 + df.double()))
    return means[target] / total * weight


def scores(
    sums: Mapping[str, Tensor], counts: Tensor, target: int, *, min_count: int = 1, idf: Idf = "paper"
) -> dict[str, Tensor]:
    """Scores of all layers.

    Args:
        sums: name -> Σ over all clients, [classes, channels]; noise may have made some of it negative.
        counts: samples of each class [classes].
        target: the class.
        min_count: classes with fewer samples are no part of U.
        idf: see `score`.

    Raises:
        UserError: the class has fewer than `min_count` samples.
    """
    present = counts >= max(min_count, 1)
    if not present[target]:
        raise UserError(
            f"class {target} has {int(counts[target])} samples in all, fewer than edit.min_count = "
            f"{min_count}, so nothing can be said about its channels: lower it"
        )
    shares = counts.clamp_min(1)[:, None]
    return {name: score(total.clamp_min(0) / shares, target, present, idf) for name, total in sums.items()}


def chosen(
    found: Mapping[str, Tensor],
    ratio: float,
    *,
    scope: Scope = "layer",
    direction: Direction = "highest",
    pruned: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Which channels to prune.

    Args:
        found: layer -> scores [channels].
        ratio: share of the channels, of each layer or (`scope = "global"`) of all.
        scope: see above.
        direction: the highest scores (the paper), the lowest, or any.
        pruned: layer -> bool [channels]: already gone, not chosen again.
        seed: of `random`.

    Returns:
        layer -> bool [channels], True where a channel goes; layers that lose none are left out.

    Raises:
        UserError: nothing is chosen, or a layer would lose its last channel.
    """
    gone = {name: _gone(name, values, pruned) for name, values in found.items()}
    keys = {
        name: _keys(values, gone[name], direction, seed + n) for n, (name, values) in enumerate(found.items())
    }
    if scope == "layer":
        picked = {name: _top(values, round(ratio * len(values))) for name, values in keys.items()}
    else:
        flat = torch.cat(list(keys.values()))
        parts = torch.split(_top(flat, round(ratio * len(flat))), [len(values) for values in keys.values()])
        picked = dict(zip(keys, parts, strict=True))
    for name, mask in picked.items():
        if bool((mask | gone[name]).all()):
            raise UserError(
                f"pruning {ratio:g} ({scope}, {direction}) leaves layer '{name}' without a channel "
                f"({len(mask)} in all); lower edit.ratio"
            )
    picked = {name: mask for name, mask in picked.items() if bool(mask.any())}
    if not picked:
        sizes = ", ".join(f"{name} {len(values)}" for name, values in list(found.items())[:4])
        raise UserError(
            f"edit.ratio = {ratio:g} prunes no channel of layers as small as these: {sizes}; raise it"
        )
    return picked


def _gone(name: str, values: Tensor, pruned: Mapping[str, Tensor] | None) -> Tensor:
    return (pruned or {}).get(name, torch.zeros(len(values), dtype=torch.bool))


def _keys(values: Tensor, gone: Tensor, direction: Direction, seed: int) -> Tensor:
    """What is sorted: the channels to prune first have the highest key; -inf is never pruned."""
    if direction == "random":
        keys = torch.rand(len(values), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    elif direction == "lowest":
        keys = -values
    else:
        keys = torch.where(values > 0, values, -torch.inf)
    return keys.masked_fill(gone, -torch.inf)


def _top(keys: Tensor, count: int) -> Tensor:
    """The `count` highest keys above -inf, bool [len(keys)]; of equal ones the first."""
    order = torch.sort(keys, descending=True, stable=True).indices[:count]
    mask = torch.zeros(len(keys), dtype=torch.bool)
    mask[order] = True
    return mask & (keys > -torch.inf)
