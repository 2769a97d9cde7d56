"""Text encoders of Hugging Face transformers: `hf:NAME-or-folder`, and MiniLM with fetched weights.

    token ids int [n, L], 0 pads ─ encoder ─> hidden states ─ mean over tokens ─> features [n, d] ─ Linear

Token ids come with the data; they must be those of the encoder's own tokenizer, with 0 for padding. Data that
know their tokenizer are refused where the numbers of words differ.

A BERT is divided into units: embeddings, layers, mean. What passes between them is [n, L, d + 1]: the last
channel says which tokens are no padding (1 or 0), so that a layer needs nothing but what comes from below.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.data.needs import needs
from fedsim.errors import UserError
from fedsim.lookup import candidates, listed
from fedsim.models.base import Classifier, DataInfo, Unit, hooked, run_units
from fedsim.models.lora import merged
from fedsim.models.quiet import quiet

MINILM = "sentence-transformers/all-MiniLM-L6-v2"  #: public name of `minilm`
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "spiece.model")


class TextBackbone(nn.Module):
    """Token ids [n, L] -> mean of the hidden states at tokens that are no padding, [n, d].

    Args:
        encoder: a transformers model; it loses its pooler, because features are the mean: the pooler would
            train and travel for nothing.
        source: its public name, or the folder that it was read from.
    """

    def __init__(self, encoder: Any, source: str) -> None:
        super().__init__()
        self.pooler = (getattr(encoder, "pooler", None),)  # no submodule, only exporting puts it back
        if self.pooler[0] is not None:
            encoder.pooler = None
        self.encoder = encoder
        self.source = source

    def units(self) -> list[Unit]:
        """Embeddings, layers and mean of a BERT; any other encoder is a single unit."""
        whole = [Unit(("encoder",), self._whole)]
        if not self._is_plain_bert():
            return whole
        layers = [
            Unit((f"encoder.encoder.layer.{number}",), partial(self._layer, layer))
            for number, layer in enumerate(self.encoder.encoder.layer)
        ]
        around = (self.encoder, self.encoder.encoder)
        if any(map(hooked, around)):  # running the units would miss them
            return whole
        return [Unit(("encoder.embeddings",), self._embed), *layers, Unit((), self._mean)]

    def forward(self, ids: Tensor) -> Tensor:
        """Features, float32."""
        return run_units(self.units(), ids)

    def _is_plain_bert(self) -> bool:
        from transformers import BertModel

        config = self.encoder.config
        return (
            type(self.encoder) is BertModel
            and config._attn_implementation == "sdpa"  # takes a finished mask, see `_attend`
            and not config.is_decoder
        )

    def _embed(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.encoder.embeddings(input_ids=ids.long())
        return torch.cat([hidden, (ids != 0).unsqueeze(-1).to(hidden.dtype)], dim=-1)

    def _layer(self, layer: nn.Module, x: Tensor) -> Tensor:
        hidden, mask = x[..., :-1], x[..., -1:]
        hidden = layer(hidden, attention_mask=attention_of(self.encoder.config, mask.squeeze(-1) != 0))
        return torch.cat([hidden, mask.to(hidden.dtype)], dim=-1)

    def _mean(self, x: Tensor) -> Tensor:
        hidden, weight = x[..., :-1], x[..., -1:]
        return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)

    def _whole(self, ids: Tensor) -> Tensor:
        mask = ids != 0
        attend = attention_of(self.encoder.config, mask)
        hidden: Tensor = self.encoder(input_ids=ids.long(), attention_mask=attend).last_hidden_state
        return self._mean(torch.cat([hidden, mask.unsqueeze(-1).to(hidden.dtype)], dim=-1))


def attention_of(config: Any, mask: Tensor) -> Tensor:
    """A mask [n, L], True at tokens that are no padding, as the encoder with this configuration takes it.

    From a mask [n, L] the attention of torch ("sdpa") looks whether any padding is there at all, which
    waits for the device; a finished additive one [n, 1, L, L] is taken as it is.
    """
    if config._attn_implementation != "sdpa":
        return mask.long()
    closed = torch.finfo(torch.float32).min * (~mask)[:, None, None, :].float()
    return closed.expand(-1, 1, mask.shape[1], -1)


def hf_model(data: DataInfo, /, *, name: str, pretrained: bool = True) -> Classifier:
    """Any text encoder of transformers, from a folder or the hub, mean-pooled, with a new linear head.

    Args:
        name: a folder with config.json and model.safetensors (relative to the experiment file, then to the
            current folder), or the model's name on the Hugging Face hub.
        pretrained: load the weights; otherwise they are random and only the configuration is read.

    Raises:
        UserError: no such model, or samples are no sequences of token ids, or they are too long.
    """
    return _build(data, name, pretrained=pretrained)


@needs("minilm")
def minilm(data: DataInfo, /) -> Classifier:
    """all-MiniLM-L6-v2 (22.6 M parameters), a sentence encoder, with a new linear head.

    Weights: `fedsim assets fetch minilm`.
    """
    from fedsim.data.assets import path

    return _build(data, str(path("minilm")), pretrained=True, source=MINILM)


def _build(data: DataInfo, name: str, *, pretrained: bool, source: str | None = None) -> Classifier:
    shown = "minilm" if source == MINILM else f"hf:{name}"
    if len(data.sample_shape) != 1:
        raise UserError(
            f"model '{shown}' takes token ids [length], the data are {list(data.sample_shape)}; "
            "choose a text dataset or another [model] name"
        )
    encoder = _load(name, data.folders, pretrained=pretrained)
    longest = getattr(encoder.config, "max_position_embeddings", None)
    if longest is not None and data.sample_shape[0] > longest:
        raise UserError(
            f"model '{shown}' takes at most {longest} tokens, the data have {data.sample_shape[0]}; "
            "shorten the samples"
        )
    words = getattr(encoder.config, "vocab_size", None)
    if data.vocabulary is not None and words is not None and not _alike(data.vocabulary, words):
        raise UserError(
            f"model '{shown}' knows {words} words, the token ids of the data come from a tokenizer with "
            f'{data.vocabulary}; give the data the model\'s own: [data] tokenizer = "FOLDER"'
        )
    width = getattr(encoder.config, "hidden_size", None)
    if width is None:
        raise UserError(f"model '{shown}' states no hidden_size in config.json: it is no text encoder")
    backbone = TextBackbone(encoder, source or encoder.name_or_path)
    return Classifier(backbone, nn.Linear(width, len(data.classes))).eval()


def _alike(tokenizer: int, embeddings: int) -> bool:
    """Embeddings may be rounded up to a few more rows than the tokenizer has words."""
    return tokenizer <= embeddings <= 1.02 * tokenizer


def _load(name: str, folders: Sequence[Path], *, pretrained: bool) -> Any:
    import transformers

    auto: Any = transformers.AutoModel
    places = candidates(name, folders)
    local = next((place for place in places if place.is_dir()), None)
    source = name if local is None else str(local.resolve())
    offline = local is not None
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(source, local_files_only=offline)
            encoder = (
                auto.from_pretrained(source, local_files_only=offline, config=config, dtype="float32")
                if pretrained
                else auto.from_config(config)
            )
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        if local is not None:
            raise UserError(f"cannot load the text encoder in {source} ({reason})") from error
        raise UserError(
            f"cannot load the text encoder '{name}': there is no such folder (looked for {listed(places)}), "
            f"and as a name on the Hugging Face hub it fails ({reason})"
        ) from error
    return encoder.eval()


def export_hf(model: Classifier, folder: Path) -> None:
    """Write the tuned encoder as `transformers.AutoModel.from_pretrained` reads it, LoRA merged into it.

    Its tokenizer comes along if it is where the encoder came from.

    Args:
        model: a classifier made by `hf_model`.
        folder: an existing one.

    Raises:
        UserError: the model is no text encoder, or its tuning added modules that transformers has no place
            for.
    """
    backbone = model.backbone
    if not isinstance(backbone, TextBackbone):
        raise UserError("this model is no text encoder of transformers; export it as safetensors")
    added = [name for name in backbone.state_dict() if not name.startswith("encoder.")]
    if added:
        raise UserError(
            f"this tuning added '{added[0]}' to the encoder, which transformers has no place for; "
            "use the exported safetensors"
        )
    encoder: Any = merged(backbone.encoder)
    if backbone.pooler[0] is not None:
        encoder.pooler = backbone.pooler[0]
    with quiet():
        encoder.save_pretrained(folder)
    _save_tokenizer(backbone.encoder.name_or_path, folder)


def _save_tokenizer(source: str, folder: Path) -> None:
    import transformers

    local = Path(source).is_dir()
    if local and not any((Path(source) / name).is_file() for name in _TOKENIZERS):
        return  # transformers would make up an empty one
    with quiet(), suppress(OSError, ValueError):  # on the hub, there may be none, too
        transformers.AutoTokenizer.from_pretrained(source, local_files_only=local).save_pretrained(folder)
