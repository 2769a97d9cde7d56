"""CLIP models of open_clip: any of them by name, and one that is assembled from two shipped encoders.

`clip-lite` is a dual encoder in CLIP's form, not OpenAI's or LAION's CLIP: no image-text pair was used.

    image ─ EfficientNet-Lite0 (ImageNet) ─ pooled ────────────────> [n, 1280]
    text ── MiniLM ─ mean over tokens ─> [n, 384] ─ projection ────> [n, 1280]      cosine of the two

The projection P is the ridge regression from the sentence embeddings E [1000, 384] of ImageNet's class
names to the rows W [1000, 1280] of the ImageNet classifier, so a text is mapped to the classifier row that
it would have had:  P = (E'E + λ I)^-1 E' (W - mean W).  It is closed-form and cached, not trained.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsim.data.needs import needs
from fedsim.errors import UserError, nearest
from fedsim.files import write_atomic
from fedsim.lookup import candidates, listed
from fedsim.models.base import Classifier, DataInfo
from fedsim.models.clip import ImageTower, clip_classifier
from fedsim.models.hf import MINILM
from fedsim.models.images import check_images, resampled
from fedsim.models.quiet import quiet
from fedsim.ranges import Count

_WIDTH = 1280
_CONTEXT = 32
_RIDGE = 3.0
_LOGIT_SCALE = 20.0
_FORMS = ("{}.", "a photo of a {}.", "a picture of the {}.")


@needs("efficientnet-lite0", "minilm")
def clip_lite(
    data: DataInfo, /, *, image_size: Count = 128, template: str | list[str] = "a photo of a {}"
) -> Classifier:
    """Dual encoder (28 M parameters) of ImageNet EfficientNet-Lite0 and MiniLM as a zero-shot classifier.

    Not OpenAI's CLIP: its image tower was supervised with ImageNet labels and its text projection is a
    ridge regression. Weights: `fedsim assets fetch efficientnet-lite0 minilm`.

    Args:
        image_size: pixels a side that images are resized to.
        template: caption of a class, or several whose text features are averaged; `{}` stands for its name.
    """
    check_images(data, "clip-lite")
    clip, tokenize, derived = load_clip_lite(image_size)
    pixels = {"mean": [0.5] * 3, "std": [0.5] * 3, "size": image_size, "interpolation": "bicubic"}
    text = {"hf_model_name": MINILM, "hf_tokenizer_name": MINILM}
    config = _clip_lite_config(image_size)
    config["text_cfg"].update(text)
    about = {"model_cfg": config, "preprocess_cfg": pixels}
    tower = ImageTower(clip.visual, about, partial(_whole_clip_lite, image_size))
    model = clip_classifier(clip, tower, tokenize, data, template=template, derived=derived)
    model.schooling = "ImageNet-supervised transfer"
    return model


def names() -> list[str]:
    """The architectures of open_clip."""
    import open_clip

    return list(open_clip.list_models())


def open_clip_model(
    data: DataInfo,
    /,
    *,
    name: str,
    image_size: Count | None = None,
    template: str | list[str] = "a photo of a {}",
) -> Classifier:
    """Any open_clip model as a zero-shot classifier: `NAME@TAG`, `NAME@FILE`, or `NAME` with random weights.

    Args:
        name: open_clip's name of the model, then `@` and a tag of pre-trained weights or a file (relative to
            the experiment file, then to the current folder).
        image_size: pixels a side that images are resized to; by default the model's own size.
        template: caption of a class, or several whose text features are averaged; `{}` stands for its name.

    Raises:
        UserError: no such model or tag, the weights cannot be had, or inputs are no images.
    """
    import open_clip

    check_images(data, f"open_clip:{name}")
    architecture, _, weights = name.partition("@")
    if architecture not in names():
        raise UserError(f"open_clip has no model '{architecture}': {nearest(architecture, names())}")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if weights and weights not in tags:
        weights = str(_weights_file(weights, architecture, tags, data))
    make = partial(_create, architecture, weights, image_size)
    clip = make()
    config = {
        "model_cfg": open_clip.get_model_config(architecture),
        "preprocess_cfg": open_clip.get_model_preprocess_cfg(clip),
    }
    derived = {}
    if weights and image_size not in (None, config["model_cfg"]["vision_cfg"].get("image_size")):
        derived = resampled(_create(architecture, weights, None).state_dict(), clip.state_dict())
    if image_size is not None:
        config["model_cfg"]["vision_cfg"]["image_size"] = image_size
    try:
        with quiet():
            tokenize = open_clip.get_tokenizer(architecture)
    except Exception as error:  # whatever the tokenizer's library raises
        raise UserError(f"cannot load the tokenizer of '{architecture}': {error}") from error
    tower = ImageTower(clip.visual, config, make)
    return clip_classifier(clip, tower, tokenize, data, template=template, derived=derived)


def _weights_file(weights: str, architecture: str, tags: list[str], data: DataInfo) -> Path:
    places = candidates(weights, data.folders)
    for place in places:
        if place.is_file():
            return place.resolve()
    raise UserError(
        f"open_clip has no weights '{weights}' for '{architecture}' ({nearest(weights, tags)}) and there is "
        f"no such file (looked for {listed(places)})"
    )


def _create(architecture: str, weights: str, image_size: int | None) -> Any:
    """The whole model; an OpenAI checkpoint gets the activation it was trained with."""
    import open_clip

    trained = open_clip.get_pretrained_cfg(architecture, weights) if weights else {}
    try:
        with quiet():
            return open_clip.create_model(
                architecture,
                pretrained=weights or None,
                force_image_size=image_size,
                force_quick_gelu=bool(trained.get("quick_gelu")),
                pretrained_text=False,
            )
    except Exception as error:  # open_clip raises whatever its downloaders raise
        raise UserError(
            f"open_clip cannot build '{architecture}' with weights '{weights or 'random'}' ({error}); "
            "without a network give NAME@FILE"
        ) from error


def load_clip_lite(image_size: int) -> tuple[Any, Callable[[Sequence[str]], Tensor], dict[str, str]]:
    """The assembled open_clip model, its tokenizer, and what its computed entries were made of.

    Leaves torch's global RNG as it was.
    """
    from open_clip.model import CustomTextCLIP
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
    from safetensors.torch import load_file

    from fedsim.data.assets import path
    from fedsim.payload import digest_of

    image_weights, text_folder = path("efficientnet-lite0") / "model.safetensors", path("minilm")
    config = _clip_lite_config(image_size)
    config["text_cfg"].update(
        hf_model_name=str(text_folder), hf_tokenizer_name=str(text_folder), hf_model_pretrained=True
    )
    with torch.random.fork_rng(devices=[]), quiet():
        clip = CustomTextCLIP(**config).eval()
    state = load_file(image_weights)
    rows = state.pop("classifier.weight")
    del state["classifier.bias"]
    clip.visual.trunk.load_state_dict(state)
    tokenize = _tokenizer(text_folder)
    captions = [tokenize([form.replace("{}", name) for name in IMAGENET_CLASSNAMES]) for form in _FORMS]
    with torch.no_grad():
        clip.logit_scale.fill_(math.log(_LOGIT_SCALE))
        clip.text.proj.weight.copy_(_projection(clip.text, captions, rows, text_folder).T)
    # with the rest of the text tower, which the digest of the text features covers anyway
    made_of = {"rows": rows, "captions": torch.stack(captions), "penalty": torch.tensor(_RIDGE)}
    return clip, tokenize, {"text.proj.weight": digest_of(made_of)}


def _clip_lite_config(image_size: int) -> dict[str, Any]:
    return {
        "embed_dim": _WIDTH,
        "vision_cfg": {
            "timm_model_name": "tf_efficientnet_lite0",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "none",
            "image_size": image_size,
        },
        "text_cfg": {
            "hf_model_pretrained": False,
            "hf_pooler_type": "mean_pooler",
            "hf_proj_type": "linear",
            "context_length": _CONTEXT,
        },
    }


def _whole_clip_lite(image_size: int) -> Any:
    return load_clip_lite(image_size)[0]


def _tokenizer(folder: Path) -> Callable[[Sequence[str]], Tensor]:
    from transformers import AutoTokenizer

    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)

    def tokenize(captions: Sequence[str]) -> Tensor:
        """Token ids, int64 [captions, 32]; longer captions are cut."""
        tokens = tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=_CONTEXT, return_tensors="pt"
        )
        ids: Tensor = tokens["input_ids"]
        return ids

    return tokenize


@torch.no_grad()
def _projection(text: Any, captions: Sequence[Tensor], rows: Tensor, folder: Path) -> Tensor:
    """P [384, 1280], from the cache if it was made of the same weights, forms and λ."""
    from safetensors.torch import load, save

    from fedsim.data.store import cache_folder, cache_key, cache_writing

    weights = (folder / "model.safetensors").read_bytes()
    key = cache_key(
        "clip-lite", 1, _RIDGE, list(_FORMS), rows.numpy().tobytes(), hashlib.sha256(weights).digest()
    )
    file = cache_folder("models") / f"clip-lite-{key}.safetensors"
    if not file.exists():
        embeddings = _class_embeddings(text, captions)
        made = save({"projection": ridge(embeddings, rows, _RIDGE)})
        with cache_writing(file):
            write_atomic(file, made)
    projection: Tensor = load(file.read_bytes())["projection"]
    return projection


def ridge(inputs: Tensor, targets: Tensor, penalty: float) -> Tensor:
    """(X'X + λ I)^-1 X' (Y - mean Y), solved in float64, returned in float32: [d_x, d_y].

    Args:
        inputs: X [n, d_x].
        targets: Y [n, d_y].
        penalty: λ > 0.
    """
    x, y = inputs.double(), targets.double()
    gram = x.T @ x + penalty * torch.eye(x.shape[1], dtype=torch.float64)
    solution: Tensor = torch.linalg.solve(gram, x.T @ (y - y.mean(0)))
    return solution.float().contiguous()


def _class_embeddings(text: Any, captions: Sequence[Tensor]) -> Tensor:
    """E [1000, 384]: mean over caption forms of normalised MiniLM embeddings of ImageNet's class names."""
    pad = text.config.pad_token_id
    found = []
    for ids in captions:
        for batch in torch.split(ids, 100):
            batch = batch[:, : int((batch != pad).sum(1).max())]  # padding is masked: shorter is only faster
            mask = (batch != pad).long()
            hidden = text.transformer(input_ids=batch, attention_mask=mask)
            found.append(torch.nn.functional.normalize(text.pooler(hidden, mask), dim=-1))
    return torch.cat(found).view(len(captions), len(captions[0]), -1).mean(0)
