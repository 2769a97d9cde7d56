"""Any timm model as a backbone: `timm:NAME`, and two with weights that `fedsim assets` fetches.

Images are resized to the model's size and normalised as its configuration says; features are what timm
pools before its classifier, the head is a new linear layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fedsim.data.needs import needs
from fedsim.errors import UserError, nearest
from fedsim.lookup import find
from fedsim.models.base import Classifier, DataInfo, Unit
from fedsim.models.images import ImageBackbone, check_images, resampled
from fedsim.models.quiet import quiet
from fedsim.models.units import library_units
from fedsim.ranges import Count


class TimmBackbone(ImageBackbone):
    """Images -> features [n, d].

    Args:
        trunk: timm model without classifier.
        mean: per channel, see `ImageBackbone`.
        std: likewise.
        size: height and width of the trunk's input.
        interpolation: how images are resized to it.
        source: timm's name of the trunk.
    """

    def __init__(
        self,
        trunk: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        size: int,
        interpolation: str,
        source: str,
    ) -> None:
        super().__init__(mean, std, (size, size), interpolation)
        self.trunk = trunk
        self.source = source

    def units(self) -> list[Unit]:
        """The trunk's units."""
        first, *others = library_units(self.trunk, "trunk")
        return [self.from_images(first), *others]


def timm_model(
    data: DataInfo,
    /,
    *,
    name: str,
    image_size: Count | None = None,
    weights: str | None = None,
    pretrained: bool = False,
) -> Classifier:
    """Any timm model with a new linear head; random weights unless `weights` or `pretrained` is given.

    Args:
        name: timm's name of the model.
        image_size: pixels a side that images are resized to; by default the model's own size.
        weights: safetensors file with timm's names; a classifier in it is ignored. Relative to the experiment
            file, then to the current folder.
        pretrained: let timm download its weights.

    Raises:
        UserError: no such model, no or unfit weights, a size that is no multiple of the patch size, or
            inputs that are no images.
    """
    file = find(weights, data.folders, "[model] weights") if weights else None
    return _build(data, name, image_size, file, pretrained=pretrained)


@needs("efficientnet-lite0")
def efficientnet_lite0(data: DataInfo, /, *, image_size: Count = 128) -> Classifier:
    """EfficientNet-Lite0 (3.4 M parameters without head), supervised on ImageNet, with a new linear head.

    Weights: `fedsim assets fetch efficientnet-lite0`.

    Args:
        image_size: pixels a side that images are resized to.
    """
    from fedsim.data.assets import path

    weights = path("efficientnet-lite0") / "model.safetensors"
    half = (0.5, 0.5, 0.5)  # as these weights were trained; ImageNet's own constants cost accuracy
    return _build(data, "tf_efficientnet_lite0", image_size, weights, mean=half, std=half)


@needs("vit-small")
def vit_small(data: DataInfo, /, *, image_size: Count = 112) -> Classifier:
    """ViT-S/14 (22 M parameters), DINOv2 fine-tuned for saliency, with a new linear head.

    Weights: `fedsim assets fetch vit-small`.

    Args:
        image_size: pixels a side that images are resized to, a multiple of 14.
    """
    from fedsim.data.assets import path

    return _build(data, "vit_small_patch14_dinov2", image_size, path("vit-small") / "model.safetensors")


def _build(
    data: DataInfo,
    name: str,
    image_size: int | None,
    weights: Path | None,
    *,
    pretrained: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Classifier:
    check_images(data, f"timm:{name}")
    trunk = _create(name, pretrained=pretrained and weights is None)
    if weights is not None:
        _load(trunk, weights)
    config: dict[str, Any] = trunk.pretrained_cfg
    size = image_size or config["input_size"][-1]
    derived = _set_size(trunk, name, size) if size != config["input_size"][-1] else {}
    backbone = TimmBackbone(
        trunk, mean or config["mean"], std or config["std"], size, config["interpolation"], name
    )
    head = nn.Linear(trunk.head_hidden_size, len(data.classes))
    return Classifier(backbone, head, derived=derived).eval()


def names() -> list[str]:
    """The models of timm."""
    import timm

    return list(timm.list_models())


def _create(name: str, *, pretrained: bool) -> Any:
    import timm

    if not timm.is_model(name.partition(".")[0]):
        raise UserError(f"timm has no model '{name}': {nearest(name, names())}")
    try:
        with quiet():
            return timm.create_model(name, num_classes=0, pretrained=pretrained)
    except Exception as error:  # timm raises whatever its downloaders raise
        if not pretrained:
            raise UserError(f"timm cannot build '{name}': {error}") from error
        raise UserError(
            f"timm cannot fetch the weights of '{name}' ({error}); without a network give "
            '[model] weights = "file.safetensors"'
        ) from error


def _load(trunk: Any, weights: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise UserError(f"[model] weights '{weights}': cannot be read as safetensors ({error})") from error
    classifier = trunk.pretrained_cfg.get("classifier") or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    state = {key: value for key, value in state.items() if key.rpartition(".")[0] not in heads}
    try:
        trunk.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"[model] weights '{weights}' do not fit the model: {error}") from error


def _set_size(trunk: Any, name: str, size: int) -> dict[str, str]:
    """Vision Transformers get their position embedding resampled; a CNN takes any size.

    Returns:
        What the resampled entries were made of, as `Classifier` takes it.
    """
    if not hasattr(trunk, "set_input_size"):
        return {}
    patch = max(getattr(getattr(trunk, "patch_embed", None), "patch_size", (1,)))
    if size % patch:
        down = max(size // patch, 1) * patch
        raise UserError(
            f"[model] image_size = {size} is no multiple of {patch}, the patch size of '{name}'; "
            f"try {down} or {down + patch}"
        )
    before = trunk.state_dict()
    trunk.set_input_size((size, size))
    made_of = resampled(before, trunk.state_dict())
    return {f"backbone.trunk.{entry}": digest for entry, digest in made_of.items()}
