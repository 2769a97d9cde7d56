"""CLIP as an image classifier: the image tower is the backbone, text features are the head.

    class names ─ template ─ text tower ─> text features [classes, d]   (once, then the tower is dropped)
                                                    │
    images ─ visual tower ─> features [n, d] ──── cosine ─> logits [n, classes]

`tiny_clip` is a real open_clip model small enough to be bundled (see experiments/make_tiny_clip.py);
`clip_classifier` makes the same classifier of any open_clip model.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedsim.errors import UserError
from fedsim.models.base import Classifier, DataInfo, Unit, directions
from fedsim.models.images import ImageBackbone, check_images
from fedsim.models.text_towers import TextSide
from fedsim.models.units import library_units

if TYPE_CHECKING:
    from open_clip.model import CLIP

TINY_WEIGHTS = Path(__file__).with_name("tiny_clip.safetensors")
TINY_CONFIG = TINY_WEIGHTS.with_suffix(".json")


class ImageTower(ImageBackbone):
    """A CLIP visual tower that takes images as they are stored.

    Args:
        visual: open_clip visual tower (a module); its `image_size` is the size that images are resized to.
        config: content of `open_clip_config.json` (model_cfg, preprocess_cfg).
        whole: builds the whole CLIP that `visual` came from; only exporting needs it.
    """

    def __init__(self, visual: Any, config: Mapping[str, Any], whole: Callable[[], CLIP]) -> None:
        size = visual.image_size
        pixels = config["preprocess_cfg"]
        super().__init__(
            pixels["mean"],
            pixels["std"],
            (size, size) if isinstance(size, int) else (size[0], size[1]),
            "bilinear" if pixels.get("interpolation") == "bilinear" else "bicubic",
        )
        self.visual = visual
        self.config = dict(config)
        self.whole = whole

    def units(self) -> list[Unit]:
        """The tower's units; the features they end in are not normalised."""
        first, *others = library_units(self.visual, "visual")
        return [self.from_images(first), *others]


class CosineHead(nn.Module):
    """Logits by cosine similarity: exp(logit_scale) * normalise(features) @ normalise(weight)^T.

    Args:
        weight: text features [classes, d], one row per class.
        logit_scale: logarithm of the temperature's inverse, a scalar; a buffer, it never trains.
    """

    logit_scale: Tensor

    def __init__(self, weight: Tensor, logit_scale: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.register_buffer("logit_scale", logit_scale.detach().clone())

    def forward(self, features: Tensor) -> Tensor:
        """Logits [n, classes] for features [n, d]."""
        return cosine_logits(features, self.weight, self.logit_scale)


def cosine_logits(features: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """exp(logit_scale) * cosine of image features [n, d] and text features [classes, d]: [n, classes]."""
    return logit_scale.exp() * directions(features) @ directions(text).T


def spoken(name: str) -> str:
    """A class name as it stands in a caption: underscores are spaces."""
    return name.replace("_", " ").strip()


def tell_apart(classes: Sequence[str], readings: Sequence[Hashable]) -> None:
    """Raise UserError unless a text tower reads every class name as no other.

    Args:
        classes: class names.
        readings: what it reads of each; none (token ids on `meta`): the names alone are compared.
    """
    names = [spoken(name) for name in classes]
    blank = [number for number, name in enumerate(names) if not name]
    if blank:
        raise UserError(f"class {blank[0]} has no name for the text tower to read; give it one")
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise UserError(
            f"classes of the same name get the same text feature: '{name}' occurs {count} times; rename them"
        )
    read: dict[Hashable, str] = {}
    for name, reading in zip(names, readings, strict=False):
        other = read.setdefault(reading, name)
        if other != name:
            raise UserError(
                f"nothing tells the classes '{other}' and '{name}' apart: the text tower reads the same in "
                "both; rename one"
            )


class WordTokenizer:
    """One token per word from a fixed list: 0 pads, words count from 1, the two highest are start and end.

    Args:
        words: the vocabulary.
        context_length: tokens per caption, start and end included.
    """

    def __init__(self, words: Sequence[str], context_length: int) -> None:
        self.tokens = {word: number for number, word in enumerate(words, start=1)}
        self.context_length = context_length
        self.start, self.end = len(words) + 1, len(words) + 2

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens, with padding, start and end."""
        return self.end + 1

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Tokens, int64 [captions, context_length]; raises UserError for a word it does not know."""
        rows = torch.zeros(len(captions), self.context_length, dtype=torch.int64)
        for row, caption in zip(rows, captions, strict=True):
            words = caption.lower().split()
            unknown = [word for word in words if word not in self.tokens]
            if unknown:
                raise UserError(
                    f"tiny-clip does not know the word '{unknown[0]}' of \"{caption}\": it was trained on "
                    f"digits alone and knows {', '.join(self.tokens)}; rename the classes, change the "
                    'template, or choose another [model] name such as "cnn"'
                )
            if len(words) + 2 > self.context_length:
                most = self.context_length - 2
                raise UserError(f'"{caption}" has more than {most} words; shorten the template')
            row[: len(words) + 2] = torch.tensor([self.start, *map(self.tokens.__getitem__, words), self.end])
        return rows


def tiny_clip(data: DataInfo, /, *, template: str = "a photo of a {}") -> Classifier:
    """Bundled CLIP of 8x8 digits (0.2 M parameters) as a zero-shot classifier, ready to be tuned.

    Three-block ViT with 2x2 patches, pre-trained on 700 clean digits that no federated client has
    (`experiments/make_tiny_clip.py`). Images of another size are resized, grey becomes RGB.

    Args:
        template: caption of a class; `{}` stands for its name.
    """
    clip, tokenizer = load_tiny_clip()
    tower = ImageTower(clip.visual, tiny_config(), _whole_tiny_clip)
    return clip_classifier(clip, tower, tokenizer, data, template=template)


def clip_classifier(
    clip: Any,
    tower: ImageBackbone,
    tokenize: Callable[[Sequence[str]], Tensor],
    data: DataInfo,
    *,
    template: str | Sequence[str] = "a photo of a {}",
    derived: Mapping[str, str] | None = None,
) -> Classifier:
    """A classifier of any CLIP; the text tower is used once, for the head.

    It stays at hand as `text` until the model is tuned (prompt learning needs it) and is no part of the
    classifier's state.

    Args:
        clip: a model of open_clip, or `HfText`.
        tower: the backbone, made of its visual tower (which is not copied).
        tokenize: captions -> tokens int64 [captions, context].
        data: class names and the shape of one image.
        template: caption of a class; `{}` stands for its name. Of several captions, the mean of their
            normalised text features counts.
        derived: entries of `clip`'s state that were computed, see `Classifier`.

    Raises:
        UserError: no `{}` in a template, inputs are no images, a word that the tokenizer does not know, or
            classes that the text tower cannot tell apart.
    """
    templates = [template] if isinstance(template, str) else list(template)
    bad = [text for text in templates if "{}" not in text]
    if bad or not templates:
        raise UserError(f"[model] template '{''.join(bad[:1])}' has no '{{}}' for the class name")
    check_images(data, "CLIP")
    clip.eval()
    captions = [tokenize([form.replace("{}", spoken(name)) for name in data.classes]) for form in templates]
    tokens = torch.cat(captions, 1)
    tell_apart(data.classes, [] if tokens.is_meta else [row.tobytes() for row in tokens.cpu().numpy()])
    with torch.no_grad():
        text = torch.stack([clip.encode_text(tokens, normalize=True) for tokens in captions]).mean(0)
    model = Classifier(
        tower,
        CosineHead(text, clip.logit_scale),
        head_is_prior=True,
        derived=_derived(clip, captions, derived or {}),
    )
    made = {name.removeprefix("text."): digest for name, digest in (derived or {}).items()}
    model.text = TextSide(clip, tokenize, data.classes, templates[0], made)
    return model.eval()


def _derived(clip: Any, captions: Sequence[Tensor], derived: Mapping[str, str]) -> dict[str, str]:
    """What the classifier's computed entries were made of: text features of the text tower and tokens."""
    from fedsim.payload import digest_of

    state = clip.state_dict()
    text = {name: value for name, value in state.items() if not name.startswith("visual.")}
    tokens = {f"tokens of template {number}": value for number, value in enumerate(captions)}
    visual = {f"backbone.{name}": made for name, made in derived.items() if name.startswith("visual.")}
    return {"head.weight": digest_of(text | tokens, derived), **visual}


@cache
def tiny_config() -> dict[str, Any]:
    """Content of the bundled `tiny_clip.json`: model_cfg, preprocess_cfg, words."""
    config: dict[str, Any] = json.loads(TINY_CONFIG.read_text("utf-8"))
    return config


def new_tiny_clip(config: Mapping[str, Any]) -> tuple[CLIP, WordTokenizer]:
    """A CLIP of this shape with random weights (torch's global RNG), and its tokenizer."""
    from open_clip.model import CLIP

    tokenizer = WordTokenizer(config["words"], config["model_cfg"]["text_cfg"]["context_length"])
    return CLIP(**config["model_cfg"]), tokenizer


def load_tiny_clip() -> tuple[CLIP, WordTokenizer]:
    """The bundled CLIP and its tokenizer; leaves torch's global RNG as it was."""
    from safetensors.torch import load_file

    with torch.random.fork_rng(devices=[]):
        clip, tokenizer = new_tiny_clip(tiny_config())
    clip.load_state_dict(load_file(TINY_WEIGHTS))
    return clip.eval(), tokenizer


def _whole_tiny_clip() -> CLIP:
    return load_tiny_clip()[0]


def export_open_clip(model: Classifier, folder: Path) -> None:
    """Write the whole CLIP, with the tuned visual tower, as open_clip reads it.

    `open_clip.create_model("local-dir:FOLDER")` loads `open_clip_config.json` and
    `open_clip_model.safetensors`. The head is not in it: where it was tuned, too, the text tower no longer
    reproduces it.

    Args:
        model: a classifier made by `clip_classifier`.
        folder: an existing one.

    Raises:
        UserError: the model is no CLIP, or its tuning added modules that open_clip has no place for.
    """
    from safetensors.torch import save_file

    tower = model.backbone
    if not isinstance(tower, ImageTower):
        raise UserError("this model is no CLIP: it has no open_clip form; export it as safetensors")
    clip = tower.whole()
    known = {f"visual.{name}" for name in clip.visual.state_dict()} | {"mean", "std"}
    added = [name for name in tower.state_dict() if name not in known]
    if added:
        raise UserError(
            f"this tuning added '{added[0]}' to the image tower, which open_clip has no place for; "
            "use the exported safetensors"
        )
    clip.visual.load_state_dict(tower.visual.state_dict())
    (folder / "open_clip_config.json").write_text(json.dumps(tower.config, indent=2) + "\n", "utf-8")
    state = {key: value.detach().cpu().contiguous() for key, value in clip.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
