"""Prompts of which a part stays with the client: PromptFolio and FedPGP. Shared is `head.context` alone.

    prompt-folio     text feature = (1 - share) T(context) + share T(own)           own [M, D] is personal
    prompt-low-rank  prompt = context + U V                             U [M, b] and V [b, D] are personal
                     and a term of the loss: T(context) near T(caption), far from T(context + U V)

T gives normalised text features; the caption is the model's (`template`) and never trains. `[payload]
personal` says what stays (the strategies `promptfolio` and `fedpgp` bring it along). Equations as in the
methods' public code; the papers' text was not at hand.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedsim.models.base import Classifier, directions, train_only
from fedsim.models.clip import CosineHead
from fedsim.models.prompt import Position, PromptHead, PromptStart, prompt_start
from fedsim.ranges import Count, Fraction, NonNegative, Positive


class FolioHead(PromptHead):
    """Mixes the text features of a shared and of a personal prompt.

    Args:
        start: tower and captions.
        share: of the personal prompt.
    """

    def __init__(self, start: PromptStart, share: float) -> None:
        super().__init__(start, start.context())
        self.own = nn.Parameter(start.context())
        self.share = share

    def class_features(self) -> Tensor:
        """[classes, d]."""
        shared, own = (directions(self.text_features(context)) for context in (self.context, self.own))
        return (1 - self.share) * shared + self.share * own


class LowRankHead(PromptHead):
    """Adds a personal low-rank change to a shared prompt.

    Args:
        start: tower and captions.
        caption: text features [classes, d] of the model's fixed captions.
        rank: b.
        mu: weight of the contrastive term.
        temperature: of the contrastive term.
    """

    caption: Tensor

    def __init__(self, start: PromptStart, caption: Tensor, rank: int, mu: float, temperature: float) -> None:
        context = start.context()
        super().__init__(start, context)
        count, width = context.shape
        self.left = nn.Parameter(0.02 * torch.randn(count, rank, device=context.device))
        self.right = nn.Parameter(0.02 * torch.randn(rank, width, device=context.device))
        self.mu, self.temperature = mu, temperature
        self.register_buffer("caption", caption.detach().clone())

    def class_features(self) -> Tensor:
        """[classes, d]."""
        return self.text_features(self.context + self.left @ self.right)

    def penalty(self) -> Tensor:
        """mu times the contrastive term: shared text features stay near those of the captions, away from the
        client's own; mean over classes of -log softmax(cosines / temperature) at the former.
        """
        shared, own = (directions(x) for x in (self.text_features(self.context), self.class_features()))
        near, far = (shared * directions(self.caption)).sum(-1), (shared * own).sum(-1)
        pairs = torch.stack([near, far], dim=-1) / self.temperature
        return -self.mu * pairs.log_softmax(dim=-1)[:, 0].mean()


def prompt_folio(
    model: Classifier,
    /,
    *,
    tokens: Count | None = None,
    init: str = "normal",
    position: Position = "end",
    share: Fraction = 0.4,
) -> Classifier:
    """A shared prompt (`head.context`) and the client's own (`head.own`), text features mixed; any CLIP.

    Args:
        tokens: how many vectors each has (M); by default 16 (fewer where the text tower is too short), or
            as many as the words of `init` have tokens.
        init: "normal" (standard deviation 0.02), or words whose embeddings the vectors start from.
        position: of the class name: behind the context ("end"), before it ("front") or in its "middle".
        share: of the client's own text features in the mixture.

    Raises:
        UserError: as for `prompt`.
    """
    model.head = FolioHead(prompt_start(model, "prompt-folio", tokens, init, position), share)
    return train_only(model, {"head.context", "head.own"}.__contains__, mode="prompt-folio").eval()


def prompt_low_rank(
    model: Classifier,
    /,
    *,
    tokens: Count | None = None,
    init: str = "normal",
    position: Position = "end",
    rank: Count = 4,
    mu: NonNegative = 1.0,
    temperature: Positive = 0.5,
) -> Classifier:
    """A shared prompt (`head.context`) plus the client's own low-rank change (`left @ right`); any CLIP.

    Args:
        tokens: how many vectors it has (M); by default 16 (fewer where the text tower is too short for that),
            or as many as the words of `init` have tokens.
        init: "normal" (standard deviation 0.02), or words whose embeddings the vectors start from.
        position: of the class name: behind the context ("end"), before it ("front") or in its "middle".
        rank: of the client's own change.
        mu: weight of the contrastive term in the loss.
        temperature: of the contrastive term.

    Raises:
        UserError: as for `prompt`.
    """
    zero_shot = model.head
    start = prompt_start(model, "prompt-low-rank", tokens, init, position)
    assert isinstance(zero_shot, CosineHead)  # prompt_start refuses others
    model.head = LowRankHead(start, zero_shot.weight, rank, mu, temperature)
    if "head.weight" in model.derived:
        model.derived["head.caption"] = model.derived["head.weight"]
    chosen = {"head.context", "head.left", "head.right"}
    return train_only(model, chosen.__contains__, mode="prompt-low-rank").eval()
