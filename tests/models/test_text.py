"""Text encoders of transformers: which tokens are words, and who sees whom, is as transformers has it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from fedsim.data.asset_datasets import _padding
from fedsim.errors import UserError
from fedsim.models.base import Classifier, DataInfo
from fedsim.models.hf import export_hf, hf_model

LENGTH, WORDS = 12, 40
TEXT = DataInfo(("a", "b"), (LENGTH,), dtype="int32")
_BERT = {
    "vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 16,
}  # fmt: skip
_NO_ENDS = {"bos_token_id": None, "eos_token_id": None}
KINDS: dict[str, tuple[type[Any], dict[str, Any], int | None]] = {
    "bert": (transformers.BertConfig, _BERT, None),
    "bert-pad-7": (transformers.BertConfig, {**_BERT, "pad_token_id": 7}, None),
    "roberta": (transformers.RobertaConfig, {**_BERT, "pad_token_id": 1}, None),
    "distilbert": (
        transformers.DistilBertConfig,
        {"vocab_size": WORDS, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32,
         "max_position_embeddings": 16},
        None,
    ),
    "gpt2": (
        transformers.GPT2Config,
        {"vocab_size": WORDS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, **_NO_ENDS},
        3,
    ),
    "t5": (
        transformers.T5Config,
        {"vocab_size": WORDS, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2},
        None,
    ),
    "llama": (transformers.LlamaConfig, {**_BERT, **_NO_ENDS}, 0),
}  # fmt: skip


def folder(kind: str, tmp_path: Path, **keys: Any) -> str:
    config, own, _ = KINDS[kind]
    config(**{**own, **keys}).save_pretrained(tmp_path / kind)
    return str(tmp_path / kind)


def make(kind: str, tmp_path: Path, data: DataInfo = TEXT, **keys: Any) -> Classifier:
    torch.manual_seed(0)
    pad = KINDS[kind][2]
    keys = {"pad": pad, **keys} if pad is not None else keys
    return hf_model(data, name=folder(kind, tmp_path), pretrained=False, **keys)


def pad_of(kind: str) -> int:
    config, own, pad = KINDS[kind]
    return int(pad if pad is not None else config(**own).pad_token_id)


def sentences(pad: int) -> list[list[int]]:
    """Words of every id but the padding's, 0 among them."""
    rows = [[0, 5, 9, 2, 11, 4], [8, 0, 6], [10, 12, 13, 14, 15, 2, 0, 5, 9, 30, 31, 32]]
    return [[word if word != pad else 33 for word in row] for row in rows]


def padded(rows: list[list[int]], pad: int, length: int, side: str = "right") -> Tensor:
    fill = [[pad] * (length - len(row)) for row in rows]
    joined = [row + f if side == "right" else f + row for row, f in zip(rows, fill, strict=True)]
    return torch.tensor(joined, dtype=torch.int32)


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_the_mean_of_transformers_own_hidden_states(kind: str, tmp_path: Path) -> None:
    model, pad = make(kind, tmp_path), pad_of(kind)
    ids = padded(sentences(pad), pad, LENGTH)
    mask = (ids != pad).long()
    with torch.no_grad():
        hidden = model.backbone.encoder(input_ids=ids.long(), attention_mask=mask).last_hidden_state  # type: ignore[operator]
        expected = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        torch.testing.assert_close(model.backbone(ids), expected, rtol=0, atol=1e-6)
        for row, words in enumerate(sentences(pad)):
            alone = model.backbone.encoder(input_ids=torch.tensor([words])).last_hidden_state.mean(1)  # type: ignore[operator]
            torch.testing.assert_close(model.backbone(ids)[row : row + 1], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing_wherever_it_is(kind: str, tmp_path: Path) -> None:
    model, pad = make(kind, tmp_path), pad_of(kind)
    rows = sentences(pad)[:2]
    with torch.no_grad():
        short = model.backbone(padded(rows, pad, 6))
        torch.testing.assert_close(model.backbone(padded(rows, pad, LENGTH)), short, rtol=0, atol=1e-6)
        torch.testing.assert_close(
            model.backbone(padded(rows, pad, LENGTH, "left")), short, rtol=0, atol=1e-6
        )
        nothing = model.backbone(torch.full((1, LENGTH), pad, dtype=torch.int32))
    assert torch.equal(nothing, torch.zeros_like(nothing))


def test_a_decoder_sees_no_later_word(tmp_path: Path) -> None:
    """The first of two words is encoded alike whatever the second is; in a BERT it is not."""
    for kind, causal in (("gpt2", True), ("llama", True), ("bert", False)):
        model = make(kind, tmp_path)
        seen: list[Tensor] = []
        model.backbone.encoder.register_forward_hook(
            lambda m, i, out, seen=seen: seen.append(out.last_hidden_state)
        )  # type: ignore[misc]
        with torch.no_grad():
            model.backbone(torch.tensor([[5, 6], [5, 9]], dtype=torch.int32))
        assert torch.allclose(seen[0][0, 0], seen[0][1, 0], atol=1e-6) == causal, kind


def test_who_says_what_pads(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"names no pad_token_id.*\[model\] pad = 0.*pad = -1"):
        hf_model(TEXT, name=folder("gpt2", tmp_path), pretrained=False)
    assert (
        hf_model(replace(TEXT, padding=4), name=folder("gpt2", tmp_path), pretrained=False).backbone.pad == 4
    )
    assert make("gpt2", tmp_path, pad=-1).backbone.pad is None
    assert make("roberta", tmp_path, replace(TEXT, padding=1)).backbone.pad == 1
    with pytest.raises(
        UserError, match=r"pads with token 1, the tokenizer of the data with 0.*\[model\] pad = 0"
    ):
        make("roberta", tmp_path, replace(TEXT, padding=0))
    assert make("roberta", tmp_path, replace(TEXT, padding=0), pad=0).backbone.pad == 0
    whole = make("gpt2", tmp_path, pad=-1)
    ids = torch.tensor([[0, 1, 2]], dtype=torch.int32)
    with torch.no_grad():
        hidden = whole.backbone.encoder(input_ids=ids.long()).last_hidden_state  # type: ignore[operator]
        torch.testing.assert_close(whole.backbone(ids), hidden.mean(1), rtol=0, atol=1e-6)


def test_what_encodes_no_text_is_named_when_the_model_is_built(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"takes at most 14 tokens, the data have 15"):
        make("roberta", tmp_path, replace(TEXT, sample_shape=(15,)))  # two positions belong to padding
    vit = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.ViTConfig(**vit, pad_token_id=0).save_pretrained(tmp_path / "vit")
    with pytest.raises(UserError, match=r"'hf:.*vit' \(ViTModel\) does not encode a text of 12 tokens: "):
        hf_model(TEXT, name=str(tmp_path / "vit"), pretrained=False, pad=0)


def test_half_of_an_encoder_decoder_has_no_folder_of_its_own(tmp_path: Path) -> None:
    model = make("t5", tmp_path)
    assert not any("decoder" in name for name in model.state_dict())
    with pytest.raises(UserError, match=r"one half of an encoder-decoder, .* use the exported safetensors"):
        export_hf(model, tmp_path)


def test_a_bert_is_divided_whatever_pads(tmp_path: Path) -> None:
    """What passes between its units says which tokens are words."""
    model = make("bert-pad-7", tmp_path)
    assert len(model.backbone.units()) == 4  # type: ignore[operator]
    ids = padded(sentences(7), 7, LENGTH)
    x = model.backbone.units()[0].run(ids)  # type: ignore[operator]
    assert torch.equal(x[..., -1], (ids != 7).float())
    assert len(make("roberta", tmp_path).backbone.units()) == 1  # type: ignore[operator]


@pytest.mark.parametrize(
    ("words", "beside", "pad"),
    [
        (["<s>", "<pad>", "a"], {}, 1),
        (["a", "end", "[PAD]"], {"tokenizer_config.json": {"pad_token": "end"}}, 1),
        (["a", "[PAD]", "end"], {"special_tokens_map.json": {"pad_token": {"content": "end"}}}, 2),
        (["a", "[PAD]"], {"tokenizer_config.json": {"pad_token": None}}, 1),
    ],
)
def test_sentences_are_padded_with_the_tokenizers_own_token(
    words: list[str], beside: dict[str, Any], pad: int, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
    for name, value in beside.items():
        (tmp_path / name).write_text(json.dumps(value))
    assert _padding(tokenizer, tmp_path) == pad
    tokenizer.enable_padding(pad_id=0)
    assert _padding(tokenizer, tmp_path) == 0
