"""Prompt learning: the words around a class name become learned vectors (CoOp, arXiv 2109.01134).

    [start] v_1 ... v_M  class name  [end]  ─ frozen text tower ─> text feature of the class ┐
    image ─ frozen image tower ─> feature (computed once, fedsim/features.py) ───────── cosine ─> logit

Only v, `head.context`, trains and travels: [M, D] for all classes (unified) or [classes, M, D]. The
context stands in front of the name (`position = "end"`: the name is at the end), behind it ("front"), or
half on each side ("middle"). What follows `{}` in the model's template still follows the name.

Exact shortcuts: fixed tokens are embedded once; captions are as long as the longest needs (padding is
masked, or behind the end of a causal tower); text features are computed once per evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fedsim.errors import UnfitTuning, UserError
from fedsim.models.base import Classifier, train_only
from fedsim.models.clip import CosineHead, cosine_logits, spoken, tell_apart
from fedsim.models.text_towers import TextSide, TextTower, text_tower
from fedsim.ranges import Count

Position = Literal["end", "middle", "front"]

_TOKENS = 16
_STD = 0.02
_FILLER = "a"  #: stands where a context vector goes; any word of one token that every vocabulary has


@dataclass(frozen=True)
class Caption:
    """Token ids of a caption around its words.

    Attributes:
        start: ids before the words.
        tail: ids after them, the end and then padding, as many as a caption without words has.
    """

    start: list[int]
    tail: list[int]

    @property
    def ending(self) -> int:
        """How many ids of the tail are no padding (at least one)."""
        kept = len(self.tail)
        while kept > 1 and self.tail[kept - 1] == self.tail[-1]:
            kept -= 1
        return kept


@dataclass(frozen=True)
class Layout:
    """Where everything of the prompts stands.

    Attributes:
        ids: int64 [classes, L]; a filler's id where context goes.
        slots: int64 [classes, M], positions of the context vectors in each row.
        length: of the longest prompt, its end included; what comes later is padding in all rows.
    """

    ids: Tensor
    slots: Tensor
    length: int


@dataclass(frozen=True)
class PromptStart:
    """What a prompt head is built of.

    Attributes:
        tower: frozen text tower, cut to the length of the prompts where that is exact.
        layout: of the prompts, as long as the tower's captions.
        fixed: embeddings [classes, L, D] of all tokens of the layout.
        words: embeddings [M, D] of the words that the context starts from; None: it starts at random.
        logit_scale: logarithm of the temperature's inverse, a scalar.
    """

    tower: TextTower
    layout: Layout
    fixed: Tensor
    words: Tensor | None
    logit_scale: Tensor

    def context(self, rows: int | None = None) -> Tensor:
        """A start of the learned vectors, [M, D], or [rows, M, D]."""
        shape = [*([] if rows is None else [rows]), self.layout.slots.shape[1], self.fixed.shape[-1]]
        if self.words is not None:
            return self.words.expand(shape).clone()
        return _STD * torch.randn(shape, device=self.fixed.device)


class PromptHead(nn.Module):
    """Logits by cosine similarity with text features of learned prompts.

    Args:
        start: tower and captions; `logit_scale` becomes a buffer, it never trains.
        context: start of the learned vectors, [M, D] or [classes, M, D].
    """

    ids: Tensor
    slots: Tensor
    fixed: Tensor
    logit_scale: Tensor

    def __init__(self, start: PromptStart, context: Tensor) -> None:
        super().__init__()
        self.context = nn.Parameter(context)
        self.register_buffer("ids", start.layout.ids.to(start.fixed.device))
        self.register_buffer("slots", start.layout.slots.to(start.fixed.device))
        self.register_buffer("fixed", start.fixed)
        self.register_buffer("logit_scale", start.logit_scale.detach().clone())
        self.tower = start.tower

    def text_features(self, context: Tensor) -> Tensor:
        """Features [classes, d], not normalised, of prompts with this context [M, D] or [classes, M, D]."""
        rows, count = self.slots.shape
        width = self.fixed.shape[-1]
        places = self.slots.unsqueeze(-1).expand(-1, -1, width)
        embedded = self.fixed.scatter(1, places, context.expand(rows, count, width).to(self.fixed.dtype))
        features: Tensor = self.tower(self.ids, embedded)
        return features

    def class_features(self) -> Tensor:
        """What images are compared with, [classes, d]."""
        return self.text_features(self.context)

    def forward(self, features: Tensor) -> Tensor:
        """Logits [n, classes] for image features [n, d]."""
        return cosine_logits(features, self.class_features(), self.logit_scale)

    def at_rest(self) -> CosineHead:
        """The same head as long as nothing learns: its text features, computed now."""
        with torch.no_grad():
            return CosineHead(self.class_features(), self.logit_scale)


def prompt(
    model: Classifier,
    /,
    *,
    tokens: Count | None = None,
    class_specific: bool = False,
    init: str = "normal",
    position: Position = "end",
) -> Classifier:
    """Learned vectors around the class names train (`head.context`), both towers are frozen; any CLIP.

    Args:
        tokens: how many vectors (M); by default 16 (fewer where the text tower is too short for that), or as
            many as the words of `init` have tokens.
        class_specific: vectors of its own for every class instead of the same for all.
        init: "normal" (standard deviation 0.02), or words whose embeddings the vectors start from.
        position: of the class name: behind the context ("end"), before it ("front") or in its "middle".

    Raises:
        UserError: the model is no CLIP, class names are missing or occur twice, or a prompt is longer than
            the text tower takes.
    """
    start = prompt_start(model, "prompt", tokens, init, position)
    rows = len(start.layout.ids) if class_specific else None
    model.head = PromptHead(start, start.context(rows))
    if class_specific:
        model.class_rows = ("head.context",)
    return train_only(model, lambda name: name == "head.context", mode="prompt").eval()


def prompt_start(
    model: Classifier, mode: str, tokens: int | None, init: str, position: Position
) -> PromptStart:
    """Take the text side of a CLIP classifier apart; the arguments are the keys of `prompt`.

    Args:
        mode: name of the tuning mode, for the error message.

    Raises:
        UserError: see `prompt`.
    """
    side = model.text
    if side is None or not isinstance(model.head, CosineHead):
        raise UnfitTuning(
            f"tuning '{mode}' writes captions for the text tower of a CLIP, this model has none; use [model] "
            'name = "clip-lite", "open_clip:NAME" or "hf-clip:NAME"'
        )
    _check_named(side.classes)
    words = [] if init == "normal" else context_words(side, init, tokens)
    layout = lay_out(side, len(words) or tokens, position)
    tower = text_tower(side.clip)
    model.text = None  # it is in parts now
    ids = layout.ids
    if tower.can_shorten:
        ids = ids[:, : layout.length]
        tower.shorten(layout.length)
    with torch.no_grad():
        fixed = tower.table(ids)
        known = tower.table(torch.tensor(words)).float() if words else None
    tower.drop_table()
    model.derived |= {f"head.tower.{name}": made for name, made in side.derived.items()}
    shown = Layout(ids, layout.slots, layout.length)
    return PromptStart(tower, shown, fixed, known, model.head.logit_scale)


def _check_named(classes: Sequence[str]) -> None:
    """Raise UserError for classes that are only numbered."""
    if all(name.isdecimal() for name in classes):
        raise UserError(
            "tuning 'prompt' learns the words around class names, but these classes are only numbered; name "
            'them (an npz file: an array "classes")'
        )


def context_words(side: TextSide, init: str, tokens: int | None) -> list[int]:
    """Token ids of the words that the context starts from."""
    words = content(side.tokenize, caption_form(side.tokenize), init)
    if not words:
        raise UserError('[tuning] init has no words; give some, or init = "normal"')
    if tokens is not None and tokens != len(words):
        raise UserError(
            f'[tuning] tokens = {tokens}, but init = "{init}" has {len(words)} tokens; leave one of them out'
        )
    return words


def lay_out(side: TextSide, count: int | None, position: Position) -> Layout:
    """Put `count` context vectors (None: 16, or as many as fit) and each class name together.

    Raises:
        UserError: a prompt is longer than the tokenizer's captions.
    """
    form = caption_form(side.tokenize)
    filler = content(side.tokenize, form, _FILLER)
    limit = len(form.start) + len(form.tail)
    stop = side.template.partition("{}")[2]
    rest = _follow(side, form, filler, stop) if stop.strip() else []
    follows = position == "end" or (position == "middle" and count != 1)
    names = [
        _follow(side, form, filler, f" {name}") if follows else content(side.tokenize, form, name)
        for name in map(spoken, side.classes)
    ]
    tell_apart(side.classes, [tuple(words) for words in names])
    around = len(form.start) + len(rest) + form.ending
    longest = max(range(len(names)), key=lambda row: len(names[row]))
    free = limit - around - len(names[longest])
    count = min(_TOKENS, free) if count is None else count
    if count > free or count < 1:
        raise UserError(
            f"the prompt of class '{spoken(side.classes[longest])}' with {max(count, 1)} context vectors has "
            f"{limit - free + max(count, 1)} tokens, the text tower takes at most {limit}; "
            + (f"set [tuning] tokens to at most {free}" if free > 0 else "shorten the name")
        )
    before = {"end": count, "middle": count // 2, "front": 0}[position]
    rows, slots = [], []
    first = len(form.start)
    for words in names:
        body = filler[:1] * before + words + filler[:1] * (count - before) + rest
        rows.append(form.start + body + form.tail[: limit - first - len(body)])
        behind = first + before + len(words)
        slots.append([*range(first, first + before), *range(behind, behind + count - before)])
    length = around + len(names[longest]) + count
    return Layout(torch.tensor(rows), torch.tensor(slots), length)


def caption_form(tokenize: Callable[[Sequence[str]], Tensor]) -> Caption:
    """What a tokenizer writes around the words, found from a caption without words and one with a word."""
    empty, word = tokenize(["", _FILLER]).tolist()
    start = 0
    while start < len(empty) and empty[start] == word[start]:
        start += 1
    return Caption(empty[:start], empty[start:])


def content(tokenize: Callable[[Sequence[str]], Tensor], form: Caption, text: str) -> list[int]:
    """Token ids of the words of a text alone; those of a text that was cut end where it was cut."""
    row = tokenize([text]).tolist()[0][len(form.start) :]
    for count in range(len(row)):
        if row[count:] == form.tail[: len(row) - count]:
            return list(row[:count])
    raise UserError(
        f"the tokenizer writes something behind the padding of '{text}': this CLIP has no prompts"
    )


def _follow(side: TextSide, form: Caption, filler: list[int], text: str) -> list[int]:
    """Token ids of a text that comes after other words (some tokenizers treat the first word otherwise)."""
    joined = content(side.tokenize, form, _FILLER + text)
    together = joined[: len(filler)] == filler
    return joined[len(filler) :] if together else content(side.tokenize, form, text)
