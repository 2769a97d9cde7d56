"""CLIP models of Hugging Face transformers as zero-shot classifiers: `hf-clip:NAME-or-folder`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsim.errors import UserError
from fedsim.models.base import Classifier, DataInfo, Unit
from fedsim.models.clip import clip_classifier
from fedsim.models.images import ImageBackbone, check_images
from fedsim.models.quiet import quiet


class HfImageTower(ImageBackbone):
    """Images as stored -> image features [n, d], not normalised.

    Args:
        clip: a `CLIPModel`; its vision model and projection are taken, not copied.
        mean: per RGB channel, of images in 0..1.
        std: likewise.
    """

    def __init__(self, clip: Any, mean: Sequence[float], std: Sequence[float]) -> None:
        size = clip.config.vision_config.image_size
        super().__init__(mean, std, (size, size))
        self.vision_model, self.projection = clip.vision_model, clip.visual_projection

    def units(self) -> list[Unit]:
        """A single one."""
        return [self.from_images(Unit(("vision_model", "projection"), self._features))]

    def _features(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.projection(self.vision_model(pixel_values=pixels).pooler_output)
        return features


class HfText(nn.Module):
    """The text side of a `CLIPModel`, with the names that open_clip uses.

    Args:
        clip: a `CLIPModel`.
    """

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.text_model, self.text_projection = clip.text_model, clip.text_projection
        self.logit_scale = clip.logit_scale

    def encode_text(self, ids: Tensor, normalize: bool = False) -> Tensor:
        """Text features [n, d] for token ids [n, L], each with an end token, then padding."""
        features: Tensor = self.text_projection(self.text_model(input_ids=ids).pooler_output)
        return functional.normalize(features, dim=-1) if normalize else features


def hf_clip(
    data: DataInfo,
    /,
    *,
    name: str,
    pretrained: bool = True,
    template: str | list[str] = "a photo of a {}",
) -> Classifier:
    """Any CLIP of transformers as a zero-shot classifier.

    Args:
        name: a folder that a `CLIPModel` and its tokenizer were saved in, or a name on the Hugging Face hub.
        pretrained: load the weights; otherwise they are random, and only the rest of the folder is read.
        template: caption of a class, or several whose text features are averaged; `{}` stands for its name.

    Raises:
        UserError: no such model, it is no CLIP, or inputs are no images.
    """
    check_images(data, f"hf-clip:{name}")
    clip, tokenize, (mean, std) = _load(name, pretrained=pretrained)
    return clip_classifier(HfText(clip), HfImageTower(clip, mean, std), tokenize, data, template=template)


def _load(
    name: str, *, pretrained: bool
) -> tuple[Any, Callable[[Sequence[str]], Tensor], tuple[list[float], list[float]]]:
    import transformers

    auto: Any = transformers.CLIPModel
    local = Path(name).is_dir()
    try:
        with quiet():
            config: Any = transformers.AutoConfig.from_pretrained(name, local_files_only=local)
            if not isinstance(config, transformers.CLIPConfig):
                raise UserError(
                    f"model 'hf-clip:{name}' is a '{config.model_type}', not a CLIP; "
                    'text encoders are [model] name = "hf:NAME"'
                )
            clip: Any = (
                auto.from_pretrained(name, local_files_only=local, dtype=torch.float32)
                if pretrained
                else auto(config)
            )
            words: Any = transformers.AutoTokenizer.from_pretrained(name, local_files_only=local)
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot load the CLIP '{name}' ({str(error).splitlines()[0]}); "
            'without a network give the path of a folder: [model] name = "hf-clip:FOLDER"'
        ) from error
    longest: int = clip.config.text_config.max_position_embeddings

    def tokenize(captions: Sequence[str]) -> Tensor:
        """Token ids, int64 [captions, context]; longer captions are cut."""
        found = words(
            list(captions),
            padding="max_length",
            padding_side="right",  # what an end token says of a caption holds for what stands before it
            truncation=True,
            max_length=longest,
            return_tensors="pt",
        )
        ids: Tensor = found["input_ids"]
        return ids

    return clip.eval(), tokenize, _pixels(name, local=local)


def _pixels(name: str, *, local: bool) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of pixels: the model's own, or those of OpenAI's CLIP."""
    import transformers

    processor: Any = transformers.CLIPImageProcessor
    with quiet():
        try:
            found = processor.from_pretrained(name, local_files_only=local)
        except OSError:  # the folder has no preprocessor_config.json
            found = processor()
    return list(found.image_mean), list(found.image_std)
