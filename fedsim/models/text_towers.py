"""CLIP text towers that take token *embeddings*, so that some of them can be learned.

    ids [c, L] ─ table ─> embeddings [c, L, D] ─ tower ─> text features [c, d]        (frozen, all of it)

A tower still gets the token ids: they say where a caption ends and what is padding. The table is not part
of the tower: prompts look up their fixed tokens once and let it go.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.models.hf import attention_of

_POOLED_AT_A_TOKEN = ("first", "argmax", "eos")  #: open_clip's ways of pooling that padding cannot reach


@dataclass(frozen=True)
class TextSide:
    """What a CLIP classifier keeps for prompt learning, until it is known that it will not be needed.

    Attributes:
        clip: a whole CLIP; `text_tower` takes it apart.
        tokenize: captions -> token ids int64 [captions, context], padded on the right.
        classes: class names in the order of the logits.
        template: the first caption template; what stands behind its `{}` also ends a learned prompt.
        derived: computed entries of the text tower -> digest of their ingredients, see `Classifier`.
    """

    clip: Any
    tokenize: Callable[[Sequence[str]], Tensor]
    classes: tuple[str, ...]
    template: str
    derived: Mapping[str, str]


class TextTower(nn.Module, ABC):
    """Embeddings of captions -> text features; what a subclass does is `forward`.

    Attributes:
        table: embeds token ids [..., ] -> [..., D]; no submodule, its weights stay outside the state.
        can_shorten: captions without the padding that all of them share give the same features.
    """

    def __init__(self, table: nn.Module, *, can_shorten: bool) -> None:
        super().__init__()
        self.__dict__["table"] = table  # past nn.Module, which would register it
        self.can_shorten = can_shorten

    table: nn.Module

    def drop_table(self) -> None:
        """Let the table go, once nothing is looked up any more."""
        del self.__dict__["table"]

    def shorten(self, length: int) -> None:
        """From now on captions have `length` tokens; called once, only where `can_shorten`."""

    @abstractmethod
    def forward(self, ids: Tensor, embedded: Tensor) -> Tensor:
        """Features [c, d], not normalised, for ids [c, L] and their embeddings [c, L, D]."""


class _Slot(nn.Module):
    """Stands where a tower looks up its tokens, and hands out the embeddings that lie in it."""

    embedded: Tensor | None = None

    def forward(self, ids: Tensor) -> Tensor:
        assert self.embedded is not None
        return self.embedded


class SlotTower(TextTower):
    """A tower whose own code runs unchanged: only its token table is replaced by a slot.

    Args:
        clip: has `encode_text(ids, normalize=...)`.
        holder: the module in it that has `token_embedding`.
        can_shorten: see `TextTower`.
    """

    holder: nn.Module

    def __init__(self, clip: nn.Module, holder: nn.Module, *, can_shorten: bool) -> None:
        super().__init__(holder.get_submodule("token_embedding"), can_shorten=can_shorten)
        for name in ("visual", "text_decoder"):  # CoCa has a decoder
            if hasattr(clip, name):
                delattr(clip, name)
        self.slot = _Slot()
        holder.token_embedding = self.slot
        self.clip = clip
        self.__dict__["holder"] = holder  # a part of `clip`: its weights are in the state already

    def shorten(self, length: int) -> None:
        """open_clip's own towers add as many positions as they have, and mask as many."""
        for name in ("positional_embedding", "attn_mask"):
            whole = getattr(self.holder, name, None)
            if isinstance(whole, nn.Parameter):
                setattr(self.holder, name, nn.Parameter(whole.detach()[:length].clone()))
            elif whole is not None:
                setattr(self.holder, name, whole[:length, :length].clone())

    def forward(self, ids: Tensor, embedded: Tensor) -> Tensor:
        """See `TextTower`."""
        self.slot.embedded = embedded
        try:
            features: Tensor = self.clip.encode_text(ids, normalize=False)  # type: ignore[operator]
        finally:
            self.slot.embedded = None
        return features


class EncoderTower(TextTower):
    """A transformers encoder inside an open_clip model (`HFTextEncoder`): padding is masked.

    Args:
        text: the `HFTextEncoder`.
    """

    def __init__(self, text: Any) -> None:
        super().__init__(text.transformer.get_input_embeddings(), can_shorten=True)
        text.transformer.set_input_embeddings(nn.Identity())  # it gets embeddings, never ids
        self.transformer, self.pooler, self.proj = text.transformer, text.pooler, text.proj
        self.pad = int(text.config.pad_token_id)

    def forward(self, ids: Tensor, embedded: Tensor) -> Tensor:
        """See `TextTower`."""
        mask = ids != self.pad
        hidden = self.transformer(inputs_embeds=embedded, attention_mask=attention_of(self.transformer, mask))
        features: Tensor = self.proj(self.pooler(hidden, mask.long()))
        return features


def text_tower(clip: Any) -> TextTower:
    """The text tower of a CLIP, frozen, in eval mode; the CLIP is taken apart and of no use afterwards.

    Args:
        clip: any CLIP of open_clip (native towers, transformers encoders, CoCa), or `HfText`.
    """
    from open_clip.hf_model import HFTextEncoder
    from open_clip.model import CLIP

    from fedsim.models.hf_clip import HfText

    if isinstance(clip, HfText):
        tower: TextTower = SlotTower(clip, clip.text_model.embeddings, can_shorten=True)
    elif isinstance(getattr(clip, "text", None), HFTextEncoder):
        tower = EncoderTower(clip.text)
    else:
        holder = clip if isinstance(clip, CLIP) else clip.text
        tower = SlotTower(clip, holder, can_shorten=_causal(holder))
    return tower.eval().requires_grad_(False)


def _causal(text: Any) -> bool:
    """No token sees a later one, and no later one is pooled."""
    pooled = getattr(text, "text_pool_type", None) or text.pool_type
    masked = isinstance(text.attn_mask, torch.Tensor)
    return masked and pooled in _POOLED_AT_A_TOKEN and getattr(text, "cls_emb", None) is None
