"""Backbones by name: shapes, sizes, weights from files, errors; the assembled CLIP if assets can be had."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from fedsim import registry
from fedsim.errors import UserError
from fedsim.models.base import Classifier, DataInfo
from fedsim.models.clip import CosineHead
from fedsim.models.hf import hf_model
from fedsim.models.open_clip_models import clip_lite, open_clip_model, ridge
from fedsim.models.resnet import CIFAR_MEAN, CIFAR_STD, ResNet, resnet20
from fedsim.models.timm_models import efficientnet_lite0, timm_model, vit_small
from fedsim.models.tuning import bias
from fedsim.models.vgg import Vgg
from tests.models.zoo import IMAGES, TOKENS, bert_folder, inputs, make

CIFAR = DataInfo(
    ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"), (3, 32, 32)
)


def size(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "parameters", "units"),
    [
        ("resnet20", 272_474, 11),  # with the mean over pixels
        ("resnet32", 466_906, 17),
        ("resnet56", 855_770, 29),
        ("resnet110", 1_730_714, 56),
        ("vgg11", 9_228_362, 9),
        ("vgg16", 14_724_042, 14),
    ],
)
def test_networks_for_cifar(name: str, parameters: int, units: int) -> None:
    with torch.device("meta"):
        model = registry.resolve("models", name).target(CIFAR)
        assert size(model) == parameters
        assert isinstance(model.backbone, (ResNet, Vgg))
        assert len(model.backbone.units()) == units
        assert model(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 10)


def test_units_are_the_network() -> None:
    model = resnet20(CIFAR).eval()
    images = inputs("cnn")
    assert isinstance(model.backbone, ResNet)
    mean, std = torch.tensor(CIFAR_MEAN).view(3, 1, 1), torch.tensor(CIFAR_STD).view(3, 1, 1)
    y = x = model.backbone.stem((images.float() / 255 - mean) / std)
    shapes = [tuple(model.backbone.units()[0].run(images).shape[1:])]
    for unit, block in zip(model.backbone.units()[1:-1], model.backbone.blocks, strict=True):
        x, y = unit.run(x), block(y)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(16, 32, 32)] * 4 + [(32, 16, 16)] * 3 + [(64, 8, 8)] * 3
    assert torch.equal(x, y)
    torch.testing.assert_close(model.head(x.mean((2, 3))), model(images))


def test_initial_weights_of_convolutions() -> None:
    torch.manual_seed(0)
    model = resnet20(CIFAR)
    weight = model.get_parameter("backbone.blocks.8.conv1.weight")
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.02)


@pytest.mark.parametrize("name", ["resnet20", "vgg11", "timm:resnet18", "open_clip:RN50", "clip-lite"])
def test_image_models_want_images(name: str) -> None:
    found = registry.resolve("models", name)
    with pytest.raises(UserError, match="takes images"):
        found.target(TOKENS, **found.fixed)


def test_grey_images_become_rgb() -> None:
    model = timm_model(DataInfo(("a", "b"), (1, 28, 28)), name="resnet18", image_size=32).eval()
    grey = torch.randint(0, 256, (2, 1, 28, 28), dtype=torch.uint8)
    assert torch.equal(model(grey), model(grey.expand(-1, 3, -1, -1)))


def test_images_are_resized_as_pillow_does() -> None:
    import numpy as np
    from PIL import Image

    model = timm_model(IMAGES, name="resnet18", image_size=48)
    images = inputs("cnn", n=2) // 4 + 96  # Pillow clips after each of its two passes: stay clear of the ends
    prepared = model.backbone.prepare(images) * model.backbone.std + model.backbone.mean
    for image, pixels in zip(images.numpy(), prepared, strict=True):
        expected = Image.fromarray(image.transpose(1, 2, 0)).resize((48, 48), Image.Resampling.BICUBIC)
        found = 255 * pixels.permute(1, 2, 0).numpy()
        assert (
            np.abs(found - np.asarray(expected, dtype=np.float32)).max() < 1.5
        )  # Pillow rounds after each pass


def test_timm_weights_from_a_file(tmp_path: Path) -> None:
    import timm

    source = timm.create_model("vit_tiny_patch16_224", num_classes=7).eval()
    file = tmp_path / "model.safetensors"
    save_file(source.state_dict(), file)
    model = timm_model(IMAGES, name="vit_tiny_patch16_224", weights=str(file))
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    expected = source.forward_head(source.forward_features(images.float() / 127.5 - 1), pre_logits=True)
    torch.testing.assert_close(model.backbone(images), expected, rtol=1e-4, atol=1e-4)

    small = timm_model(IMAGES, name="vit_tiny_patch16_224", weights=str(file), image_size=48)
    assert small.get_parameter("backbone.trunk.pos_embed").shape == (1, 1 + 9, 192)
    with pytest.raises(UserError, match="do not fit the model"):
        timm_model(IMAGES, name="resnet18", weights=str(file))
    (tmp_path / "nonsense").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        timm_model(IMAGES, name="resnet18", weights=str(tmp_path / "nonsense"))


def test_timm_misuse() -> None:
    with pytest.raises(UserError, match="did you mean 'resnet18'"):
        timm_model(IMAGES, name="resnet18x")
    with pytest.raises(UserError, match=r"image_size = 40 is no multiple of 16.*try 32 or 48"):
        timm_model(IMAGES, name="vit_tiny_patch16_224", image_size=40)


def test_open_clip_by_name_and_by_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = "ViT-S-32-alt"
    clip = open_clip.create_model(name, force_image_size=64).eval()
    file = tmp_path / "clip.safetensors"
    save_file(clip.state_dict(), file)
    with caplog.at_level(logging.INFO):
        caplog.clear()
        model = open_clip_model(IMAGES, name=f"{name}@{file}", image_size=64)
    assert not caplog.records
    assert isinstance(model.head, CosineHead)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    pixels = (images.float() / 255 - model.backbone.mean) / model.backbone.std
    captions = open_clip.get_tokenizer(name)([f"a photo of a {word}" for word in IMAGES.classes])
    with torch.no_grad():
        torch.testing.assert_close(model(images), clip.get_logits(pixels, captions)[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="did you mean 'ViT-B-32'"):
        open_clip_model(IMAGES, name="ViT-B-33")
    with pytest.raises(UserError, match="has no weights 'laion'"):
        open_clip_model(IMAGES, name="ViT-B-32@laion")
    with pytest.raises(UserError, match=r"has no '\{\}'"):
        open_clip_model(IMAGES, name=name, image_size=64, template=["a {}", "nothing"])


def test_text_features_are_the_mean_over_what_is_no_padding(tmp_path: Path) -> None:
    model = make("bert", tmp_path)
    ids = inputs("bert")
    with torch.no_grad():
        features = model.backbone(ids)
        torch.testing.assert_close(model.backbone(ids[:, :8]), features, rtol=1e-5, atol=1e-5)
        hidden = model.backbone.encoder(input_ids=ids[:, :8].long()).last_hidden_state
    torch.testing.assert_close(hidden.mean(1), features, rtol=1e-5, atol=1e-5)
    assert features.isfinite().all()
    assert model.backbone(torch.zeros_like(ids)).isfinite().all()


def test_text_encoder_from_a_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = make("bert", tmp_path)
    folder = tmp_path / "saved"
    model.backbone.encoder.save_pretrained(folder)
    capfd.readouterr()
    again = hf_model(TOKENS, name=str(folder))
    assert capfd.readouterr() == ("", "")
    assert torch.equal(again.backbone(inputs("bert")), model.backbone(inputs("bert")))
    assert not any("pooler" in name for name in again.state_dict())


def test_text_misuse(tmp_path: Path) -> None:
    folder = str(bert_folder(tmp_path))
    with pytest.raises(UserError, match="takes token ids"):
        hf_model(IMAGES, name=folder)
    with pytest.raises(UserError, match="at most 16 tokens, the data have 20"):
        hf_model(DataInfo(("a", "b"), (20,)), name=folder, pretrained=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot load the text encoder"):
        hf_model(TOKENS, name=str(tmp_path / "empty"))


def test_token_ids_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    folder = str(bert_folder(tmp_path))
    words = make("bert", tmp_path).backbone.encoder.config.vocab_size
    assert hf_model(replace(TOKENS, vocabulary=words), name=folder, pretrained=False)
    for other in (words + 1, words // 2):
        with pytest.raises(
            UserError, match=f"knows {words} words, .* a tokenizer with {other}; give the data"
        ):
            hf_model(replace(TOKENS, vocabulary=other), name=folder, pretrained=False)


def test_ridge_is_the_closed_form() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(40, 5), torch.randn(40, 3)
    p = ridge(x, y, 2.0)
    residual = x.T @ (x @ p - (y - y.mean(0))) + 2.0 * p
    assert residual.abs().max() < 1e-4


# ------------------------------------------------------------------ with fetched weights


Asset = Callable[..., list[Path]]


@pytest.fixture
def lite(asset: Asset) -> Classifier:
    asset("efficientnet-lite0", "minilm")
    return clip_lite(CIFAR, image_size=64)


def test_efficientnet_has_the_trained_weights(asset: Asset) -> None:
    from safetensors.torch import load_file

    (folder,) = asset("efficientnet-lite0")
    model = efficientnet_lite0(CIFAR, image_size=64)
    weights = load_file(folder / "model.safetensors")
    assert torch.equal(model.get_parameter("backbone.trunk.conv_stem.weight"), weights["conv_stem.weight"])
    assert size(model.backbone) == 3_371_008
    assert (model.backbone.mean == 0.5).all()


def test_clip_lite_knows_what_words_look_like(lite: Classifier) -> None:
    """Text features of class names are nearest to the ImageNet classifier rows of their kind."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
    from safetensors.torch import load_file

    from fedsim.data.assets import path

    assert lite.head_is_prior
    assert lite.schooling == "ImageNet-supervised transfer"
    assert not any("text" in name for name, _ in lite.named_parameters())
    assert size(lite) == 3_371_008 + 10 * 1280
    rows = load_file(path("efficientnet-lite0") / "model.safetensors")["classifier.weight"]
    rows = torch.nn.functional.normalize(rows - rows.mean(0), dim=-1)
    assert isinstance(lite.head, CosineHead)
    text = torch.nn.functional.normalize(lite.head.weight, dim=-1)
    nearest = [IMAGENET_CLASSNAMES[i] for i in (text @ rows.T).argmax(1).tolist()]
    kinds = dict(zip(CIFAR.classes, nearest, strict=True))
    assert "frog" in kinds["frog"]
    assert "cat" in kinds["cat"]
    assert "truck" in kinds["truck"]
    assert "air" in kinds["airplane"]


def test_clip_lite_is_deterministic_and_leaves_the_generator_alone(lite: Classifier) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    again = clip_lite(CIFAR, image_size=64)
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in lite.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    several = clip_lite(CIFAR, image_size=64, template=["{}.", "a photo of a {}"])
    assert not torch.equal(several.head.weight, lite.head.weight)


def test_minilm_places_like_near_like(asset: Asset) -> None:
    from transformers import AutoTokenizer

    from fedsim.models.hf import minilm

    (folder,) = asset("minilm")
    model = minilm(TOKENS)
    assert size(model.backbone) == 22_565_376
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    texts = ["a dog", "a puppy", "the stock market fell"]
    ids = tokenizer(texts, padding="max_length", max_length=12, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        f = torch.nn.functional.normalize(model.backbone(ids.int()), dim=-1)
    assert f[0] @ f[1] > 0.7
    assert f[0] @ f[2] < 0.3


def test_vit_small_has_the_trained_weights(asset: Asset) -> None:
    from safetensors.torch import load_file

    (folder,) = asset("vit-small")
    weights = load_file(folder / "model.safetensors")
    model = vit_small(CIFAR, image_size=56)
    assert torch.equal(
        model.get_parameter("backbone.trunk.blocks.11.mlp.fc2.weight"), weights["blocks.11.mlp.fc2.weight"]
    )
    assert model.get_parameter("backbone.trunk.pos_embed").shape == (1, 1 + 16, 384)


def test_biases_of_vit_small() -> None:
    model = bias(timm_model(CIFAR, name="vit_small_patch14_dinov2", image_size=56), head=False)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 51_456
    assert model.eval()(inputs("cnn", n=2)).shape == (2, 10)
