"""Prompt learning: only the context moves, tokens in order, equal to a plain forward, as short as can be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from torch import Tensor
from torch.nn import functional

from fedsim.errors import UserError
from fedsim.models.base import Classifier, DataInfo, at_rest
from fedsim.models.clip import CosineHead, ImageTower, WordTokenizer, clip_classifier
from fedsim.models.hf_clip import hf_clip
from fedsim.models.prompt import PromptHead, prompt
from fedsim.models.text_towers import EncoderTower, SlotTower, text_tower
from tests.models.zoo import IMAGES, bert_folder, trained, trained_count

WORDS = ("a", "photo", "of", "the", "cat", "dog", "frog", "white", "big", "nice", ".")
CLASSES = ("cat", "big_white dog", "frog")
DATA = DataInfo(CLASSES, (3, 32, 32))
VISION = {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 1}
NATIVE = {"context_length": 20, "vocab_size": len(WORDS) + 3, "width": 32, "heads": 4, "layers": 2}
TEXTS: dict[str, dict[str, Any]] = {
    "native": {},
    "custom": {"pool_type": "eos", "eos_id": len(WORDS) + 2},
    "two-way": {"no_causal_mask": True, "pool_type": "last"},
    "coca": {"embed_cls": True, "output_tokens": True},
}
KINDS = (*TEXTS, "encoder", "hf-clip")
SHORT = {"native", "custom", "encoder", "hf-clip"}


def words_tokenizer() -> WordTokenizer:
    return WordTokenizer(WORDS, 20)


def make_clip(kind: str, folder: Path) -> Any:
    """A small CLIP of open_clip with random weights."""
    torch.manual_seed(0)
    if kind == "encoder":
        text = {"hf_model_name": str(encoder_folder(folder)), "hf_model_pretrained": False}
        text |= {"hf_pooler_type": "mean_pooler", "hf_proj_type": "linear"}
        return CustomTextCLIP(embed_dim=16, vision_cfg=VISION, text_cfg=text).eval()
    text = {**NATIVE, **TEXTS[kind]}
    if kind == "native":
        return CLIP(embed_dim=16, vision_cfg=VISION, text_cfg=text).eval()
    if kind == "coca":
        decoder = {
            "context_length": 20,
            "vocab_size": NATIVE["vocab_size"],
            "width": 32,
            "heads": 4,
            "layers": 1,
        }
        vision = {**VISION, "attentional_pool": True, "output_tokens": True}
        return CoCa(embed_dim=16, multimodal_cfg=decoder, text_cfg=text, vision_cfg=vision).eval()
    return CustomTextCLIP(embed_dim=16, vision_cfg=VISION, text_cfg=text).eval()


def make(
    kind: str, folder: Path, classes: tuple[str, ...] = CLASSES, template: str = "a photo of {} ."
) -> Classifier:
    data = DataInfo(classes, (3, 32, 32))
    if kind == "hf-clip":
        torch.manual_seed(0)
        return hf_clip(data, name=str(hf_clip_folder(folder)), pretrained=False, template=template)
    clip = make_clip(kind, folder)
    tower = ImageTower(clip.visual, {"preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}, lambda: clip)
    return clip_classifier(clip, tower, words_tokenizer(), data, template=template)


def hf_clip_folder(folder: Path) -> Path:
    """Configuration and tokenizer (one token a letter) of a small CLIP of transformers."""
    from transformers import CLIPConfig, CLIPTokenizer

    letters = sorted({letter for word in WORDS for letter in word})
    known = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={token: number for number, token in enumerate(known)}, merges=[]).save_pretrained(
        folder
    )
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    end = len(known) - 1
    text = {**size, "max_position_embeddings": 60, "vocab_size": len(known), "bos_token_id": end - 1}
    text |= {"eos_token_id": end, "pad_token_id": end}
    vision = {**size, "image_size": 32, "patch_size": 16}
    CLIPConfig(text_config=text, vision_config=vision, projection_dim=16).save_pretrained(folder)
    return folder


def encoder_folder(folder: Path) -> Path:
    """Configuration of a BERT as wide as the other towers."""
    from transformers import BertConfig

    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertConfig(vocab_size=NATIVE["vocab_size"], max_position_embeddings=20, **size).save_pretrained(folder)
    return folder


def head_of(model: Classifier) -> PromptHead:
    assert isinstance(model.head, PromptHead)
    return model.head


def unit(x: Tensor) -> Tensor:
    return functional.normalize(x, dim=-1)


@pytest.mark.parametrize("kind", KINDS)
def test_words_start_where_the_template_stands(kind: str, tmp_path: Path) -> None:
    """The whole way through tokens, slots, cut captions and pooling, against the tower's own encode_text."""
    plain = make(kind, tmp_path)
    tuned = prompt(make(kind, tmp_path), init="a photo of")
    head = head_of(tuned)
    torch.testing.assert_close(unit(at_rest(head).weight), plain.head.weight, rtol=1e-5, atol=1e-6)  # type: ignore[arg-type]
    features = torch.randn(5, 16)
    torch.testing.assert_close(head(features), plain.head(features), rtol=1e-5, atol=1e-5)
    whole = 60 if kind == "hf-clip" else 20
    assert (head.ids.shape[1] < whole) == (kind in SHORT)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("specific", [False, True])
def test_gradients_reach_the_context_and_nothing_else(kind: str, specific: bool, tmp_path: Path) -> None:
    model = prompt(make(kind, tmp_path), tokens=4, class_specific=specific)
    assert trained(model) == {"head.context"}
    assert trained_count(model) == 4 * 32 * (3 if specific else 1)
    assert model.class_rows == (("head.context",) if specific else ())
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    functional.cross_entropy(model(images), torch.tensor([0, 1, 2, 0])).backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"head.context"}
    gradient = head_of(model).context.grad
    assert gradient is not None
    assert (gradient.abs().sum(-1) > 0).all()

    on_meta = model.to("meta")
    assert on_meta(images.to("meta")).sum().backward() is None


def decoded(head: PromptHead, row: int) -> list[str]:
    names = {number: word for word, number in words_tokenizer().tokens.items()}
    names |= {0: "-", len(WORDS) + 1: "<", len(WORDS) + 2: ">"}
    found = [names[int(number)] for number in head.ids[row]]
    for vector, place in enumerate(head.slots[row].tolist()):
        assert found[place] == "a"
        found[place] = f"v{vector}"
    return found


@pytest.mark.parametrize(
    ("position", "cat", "dog"),
    [
        ("end", "< v0 v1 v2 v3 v4 cat . > - -", "< v0 v1 v2 v3 v4 big white dog . >"),
        ("middle", "< v0 v1 cat v2 v3 v4 . > - -", "< v0 v1 big white dog v2 v3 v4 . >"),
        ("front", "< cat v0 v1 v2 v3 v4 . > - -", "< big white dog v0 v1 v2 v3 v4 . >"),
    ],
)
def test_tokens_stand_in_order(position: Any, cat: str, dog: str, tmp_path: Path) -> None:
    head = head_of(prompt(make("native", tmp_path), tokens=5, position=position))
    assert decoded(head, 0) == cat.split()
    assert decoded(head, 1) == dog.split()


def plain_native(clip: CLIP, rows: list[list[int | Tensor]]) -> Tensor:
    """Text features the long way: every caption by itself, with all its padding, vector by vector."""
    found = []
    for row in rows:
        vectors = [clip.token_embedding.weight[t] if isinstance(t, int) else t for t in row]
        pad = [clip.token_embedding.weight[0]] * (20 - len(row))
        x = torch.stack(vectors + pad) + clip.positional_embedding
        hidden = clip.ln_final(clip.transformer(x[None], attn_mask=clip.attn_mask))[0]
        found.append(hidden[len(row) - 1] @ clip.text_projection)
    return torch.stack(found)


def plain_encoder(clip: CustomTextCLIP, rows: list[list[int | Tensor]]) -> Tensor:
    table = clip.text.transformer.get_input_embeddings().weight
    found = []
    for row in rows:
        x = torch.stack([table[t] if isinstance(t, int) else t for t in row] + [table[0]] * (20 - len(row)))
        mask = (torch.arange(20) < len(row)).long()[None]
        hidden = clip.text.transformer(inputs_embeds=x[None], attention_mask=mask).last_hidden_state[0]
        found.append(clip.text.proj(hidden[: len(row)].mean(0)))
    return torch.stack(found)


@pytest.mark.parametrize("specific", [False, True])
@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize(("kind", "plain"), [("native", plain_native), ("encoder", plain_encoder)])
def test_equal_to_a_plain_forward_at_full_length(
    kind: str, plain: Any, position: Any, specific: bool, tmp_path: Path
) -> None:
    """Logits and the gradient of the context."""
    clip = make_clip(kind, tmp_path)
    head = head_of(prompt(make(kind, tmp_path), tokens=5, class_specific=specific, position=position))
    assert head.ids.shape[1] == 11
    context = head.context.detach().clone().requires_grad_()
    before = {"end": 5, "middle": 2, "front": 0}[position]
    number = words_tokenizer().tokens
    rows = []
    for k, name in enumerate(("cat", "big white dog", "frog")):
        v = [*(context[k] if specific else context)]
        words = [number[word] for word in name.split()]
        rows.append([len(WORDS) + 1, *v[:before], *words, *v[before:], number["."], len(WORDS) + 2])
    images, labels = torch.randn(6, 16), torch.tensor([0, 1, 2, 0, 1, 2])
    expected = clip.logit_scale.exp() * unit(images) @ unit(plain(clip, rows)).T
    found = head(images)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    functional.cross_entropy(found, labels).backward()
    functional.cross_entropy(expected, labels).backward()
    assert head.context.grad is not None
    assert context.grad is not None
    assert (head.context.grad - context.grad).abs().max() <= 1e-5 * context.grad.abs().max()


def test_classes_in_another_order_give_the_same_logits(tmp_path: Path) -> None:
    order = [2, 0, 1]
    images = torch.randn(6, 16)
    for specific in (False, True):
        straight = head_of(prompt(make("native", tmp_path), tokens=4, class_specific=specific))
        turned = make("native", tmp_path, tuple(CLASSES[k] for k in order))
        other = head_of(prompt(turned, tokens=4, class_specific=specific))
        with torch.no_grad():
            other.context.copy_(straight.context[order] if specific else straight.context)
        torch.testing.assert_close(other(images), straight(images)[:, order], rtol=1e-5, atol=1e-5)


def test_start_of_the_context(tmp_path: Path) -> None:
    torch.manual_seed(3)
    many = DataInfo(tuple(f"{a} {b}" for a in WORDS[3:] for b in WORDS[3:]), (3, 32, 32))
    model = make("native", tmp_path, many.classes, "{}")
    context = head_of(prompt(model, class_specific=True)).context
    assert context.shape == (64, 16, 32)
    assert context.std().item() == pytest.approx(0.02, rel=0.02)
    assert abs(context.mean().item()) < 4 * 0.02 / context.numel() ** 0.5


def test_at_rest_text_features_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = prompt(make("native", tmp_path), tokens=4)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    expected = model(images)
    resting = at_rest(model)
    assert isinstance(at_rest(model.head), CosineHead)
    monkeypatch.setattr(PromptHead, "text_features", lambda *a: pytest.fail("text tower used"))
    torch.testing.assert_close(resting(images), expected, rtol=1e-6, atol=1e-6)
    linear = Classifier(torch.nn.Flatten(), torch.nn.Linear(3, 2))
    assert at_rest(linear) is linear


def test_the_token_table_and_the_image_tower_are_not_kept_twice(tmp_path: Path) -> None:
    for kind in KINDS:
        names = set(prompt(make(kind, tmp_path), tokens=2).state_dict())
        assert not any("token_embedding" in n or "word_embeddings" in n for n in names), kind
        assert not any(n.startswith("head.") and ("visual" in n or "vision" in n) for n in names), kind


def test_clip_vit_b16_on_meta() -> None:
    """16 x 512 values; captions of ten classes have 20 tokens instead of 77."""
    config: dict[str, Any] = open_clip.get_model_config("ViT-B-16")  # type: ignore[assignment]
    with torch.device("meta"):
        clip = CLIP(**config)
    tower = ImageTower(clip.visual, {"preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}, lambda: clip)
    data = DataInfo(tuple(f"thing {letter}" for letter in "abcdefghij"), (3, 32, 32))
    tokenize = open_clip.get_tokenizer("ViT-B-16")
    model = clip_classifier(clip, tower, lambda captions: tokenize(captions).to("meta"), data)
    assert model.text is not None
    model.text = replace(model.text, tokenize=tokenize)
    model = prompt(model).to("meta")
    assert trained_count(model) == 8_192
    assert head_of(model).ids.shape == (10, 20)
    functional.cross_entropy(
        model(torch.zeros(2, 3, 32, 32, dtype=torch.uint8, device="meta")),
        torch.zeros(2, dtype=torch.int64, device="meta"),
    ).backward()
    assert head_of(model).context.grad is not None


def test_towers_of_each_kind(tmp_path: Path) -> None:
    kinds = {kind: text_tower(make_clip(kind, tmp_path)) for kind in (*TEXTS, "encoder")}
    assert {kind for kind, tower in kinds.items() if tower.can_shorten} == SHORT - {"hf-clip"}
    assert isinstance(kinds.pop("encoder"), EncoderTower)
    assert all(isinstance(tower, SlotTower) for tower in kinds.values())


def test_bad_input(tmp_path: Path) -> None:
    from fedsim.models.cnn import cnn

    def native(*classes: str) -> Classifier:
        model = make("native", tmp_path)
        assert model.text is not None
        model.text = replace(model.text, classes=classes)
        return model

    with pytest.raises(UserError, match=r"text tower of a CLIP.*open_clip:NAME"):
        prompt(cnn(IMAGES))
    with pytest.raises(UserError, match="'cat' occurs 2 times"):
        prompt(native("cat", "dog", "cat"))
    with pytest.raises(UserError, match="'big dog' occurs 2 times"):
        prompt(native("big_dog", "big dog"))
    with pytest.raises(
        UserError, match="classes 'big dog' and 'Big  dog' apart: the text tower reads the same"
    ):
        prompt(native("big dog", "cat", "Big  dog"))
    with pytest.raises(UserError, match=r"'big big.*takes at most 20; shorten the name"):
        prompt(native("big " * 17, "cat"))
    with pytest.raises(UserError, match="class 1 has no name"):
        prompt(native("cat", " "))
    with pytest.raises(UserError, match=r'only numbered; name them .* array "classes"'):
        prompt(native("0", "1", "2"))
    with pytest.raises(
        UserError, match=r"'big white dog' with 15 context vectors has 21 tokens.*at most 20.*at most 14"
    ):
        prompt(make("native", tmp_path), tokens=15)
    assert head_of(prompt(make("native", tmp_path), tokens=14)).ids.shape[1] == 20
    with pytest.raises(UserError, match=r'tokens = 4, but init = "a photo of" has 3 tokens'):
        prompt(make("native", tmp_path), tokens=4, init="a photo of")
    with pytest.raises(UserError, match="init has no words"):
        prompt(make("native", tmp_path), init=" ")
    with pytest.raises(UserError, match="is a 'bert', not a CLIP"):
        hf_clip(DATA, name=str(bert_folder(tmp_path / "bert")))
    with pytest.raises(UserError, match="cannot load the CLIP"):
        hf_clip(DATA, name=str(tmp_path))
    with pytest.raises(UserError, match="takes images"):
        hf_clip(DataInfo(("a", "b"), (12,)), name=str(tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_no_zero_shot_head_has_two_rows_that_are_the_same(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'nice cat' occurs 2 times"):
        make(kind, tmp_path, ("nice cat", "dog", "nice_cat"))
    with pytest.raises(UserError, match="classes 'frog' and 'Frog' apart: the text tower reads the same"):
        make(kind, tmp_path, ("frog", "dog", "Frog"))


def test_names_that_differ_where_a_caption_is_cut_are_refused(tmp_path: Path) -> None:
    """One token a letter, at most 60."""
    long = "big white dog " * 6
    with pytest.raises(UserError, match="reads the same in both"):
        make("hf-clip", tmp_path, (f"{long} cat", f"{long} frog"))
    names = ("cat", "frog")
    assert make("hf-clip", tmp_path, names, f"{{}} of {long}").head.weight.shape == (2, 16)
