"""tiny-clip: a real open_clip model, its text tower gone, honest about its start."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from torch.nn import functional

from fedsim.data.sources import DIGIT_WORDS, digits
from fedsim.errors import UserError
from fedsim.models.base import Classifier, DataInfo, directions
from fedsim.models.clip import TINY_WEIGHTS, cosine_logits, export_open_clip, load_tiny_clip, tiny_clip
from fedsim.models.tuning import bias

DATA = DataInfo(DIGIT_WORDS, (1, 8, 8))


def parameter_count(model: torch.nn.Module, *, trainable: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def accuracy(model: Classifier, **shift: float) -> float:
    found = digits(**shift)  # type: ignore[arg-type]
    with torch.no_grad():
        predicted = model(torch.from_numpy(found.test_x)).argmax(1).numpy()
    return float(np.mean(predicted == found.test_y))


def test_small_and_good_at_what_it_was_trained_for() -> None:
    assert TINY_WEIGHTS.stat().st_size < 1_000_000
    model = tiny_clip(DATA)
    assert accuracy(model) >= 0.9
    assert 0.45 <= accuracy(model, rotate=25.0, noise=0.1) <= 0.70


def test_logits_are_those_of_open_clip_and_the_text_tower_is_gone() -> None:
    clip, tokenizer = load_tiny_clip()
    model = tiny_clip(DATA)
    images = torch.from_numpy(digits().test_x[:16])
    with torch.no_grad():
        pixels = (images.float() / 255).expand(-1, 3, -1, -1) * 2 - 1
        captions = tokenizer([f"a photo of a {word}" for word in DIGIT_WORDS])
        expected = clip.get_logits(pixels, captions)[0]
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    assert not any("text" in name or "token_embedding" in name for name, _ in model.named_parameters())
    assert parameter_count(model) < parameter_count(clip)


def test_bias_tuning_selects_exactly_the_visual_biases() -> None:
    model = bias(tiny_clip(DATA))
    width, layers, mlp = 64, 3, 2
    block = 3 * width + width + mlp * width + width + 2 * width  # in_proj, out_proj, fc1, fc2, two LayerNorms
    assert parameter_count(model, trainable=True) == layers * block + 2 * width  # and ln_pre, ln_post
    assert not model.head.weight.requires_grad
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sum(name.endswith("in_proj_bias") for name in trained) == layers


def test_the_key_bias_gets_no_gradient() -> None:
    """softmax(q·(k + b)) does not depend on b: a third of every fused bias is inert."""
    model = bias(tiny_clip(DATA))
    found = digits(rotate=25.0)
    functional.cross_entropy(
        model(torch.from_numpy(found.train_x[:64])), torch.from_numpy(found.train_y[:64])
    ).backward()
    for name, parameter in model.named_parameters():
        if name.endswith("in_proj_bias"):
            assert parameter.grad is not None
            query, key, value = parameter.grad.chunk(3)
            assert key.norm() < 1e-5 * (query.norm() + value.norm())


def test_words_it_does_not_know_and_bad_templates() -> None:
    with pytest.raises(UserError, match="does not know the word 'cat'"):
        tiny_clip(DataInfo(("cat", "dog"), (1, 8, 8)))
    with pytest.raises(UserError, match=r"has no '\{\}'"):
        tiny_clip(DATA, template="a photo")
    with pytest.raises(UserError, match="1 or 3 channels"):
        tiny_clip(DataInfo(DIGIT_WORDS, (64,)))


def test_other_sizes_and_colours_are_accepted() -> None:
    model = tiny_clip(DataInfo(DIGIT_WORDS, (3, 28, 28)))
    assert model(torch.zeros(2, 3, 28, 28, dtype=torch.uint8)).shape == (2, 10)


def test_export_is_read_back_by_open_clip(tmp_path: Path) -> None:
    model = bias(tiny_clip(DATA))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    export_open_clip(model, tmp_path)
    again = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    pixels = torch.rand(4, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(
            again.encode_image(pixels), model.backbone.visual(pixels), rtol=1e-5, atol=1e-5
        )
    assert json.loads((tmp_path / "open_clip_config.json").read_text())["model_cfg"]["embed_dim"] == 64


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (("one", "two", "one"), "'one' occurs 2 times; rename them"),
        (("one", " one"), "'one' occurs 2 times"),
        (("one", "One", "two"), "classes 'one' and 'One' apart: the text tower reads the same"),
        (("one", "_"), "class 1 has no name"),
    ],
)
def test_classes_that_the_text_tower_cannot_tell_apart_are_refused(
    classes: tuple[str, ...], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        tiny_clip(DataInfo(classes, (1, 8, 8)))


def test_a_zero_vector_has_no_direction_and_a_bounded_gradient() -> None:
    """Features of a blank image may all be 0: a smallest length of 1e-12 made gradients of 1e12."""
    features = torch.randn(4, 6)
    features[1] = 0
    features.requires_grad_()
    text = torch.randn(3, 6)
    logits = cosine_logits(features, text, torch.tensor(2.0))
    assert logits[1].tolist() == [0, 0, 0]
    functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
    assert features.grad is not None
    assert features.grad.abs().max() < 10
    ordinary = torch.randn(5, 6)
    assert torch.equal(directions(ordinary), functional.normalize(ordinary, dim=-1))
