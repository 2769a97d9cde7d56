"""Text encoders of Hugging Face transformers: `hf:NAME-or-folder`, and MiniLM with fetched weights.

    token ids int [n, L] ─ encoder ─> hidden states ─ mean over tokens ─> features [n, d] ─ Linear

Token ids come with the data; they must be those of the encoder's own tokenizer. Data that know their
tokenizer are refused where the numbers of words or the padding tokens differ. Padding may stand anywhere: it
is moved behind the words first, so that a sample's features do not depend on where it is and how long. What
an encoder may look at is its own affair: a decoder (GPT-2) keeps its causal mask; of an encoder-decoder (T5),
the encoder is taken.

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
        pad: the token that pads; None: nothing does.
    """

    def __init__(self, encoder: Any, source: str, pad: int | None) -> None:
        super().__init__()
        self.pad = pad
        self.pooler = (getattr(encoder, "pooler", None),)  # no submodule, only exporting puts it back
        if self.pooler[0] is not None:
            encoder.pooler = None
        self.encoder = encoder
        self.source = source

    def units(self) -> list[Unit]:
        """Embeddings, layers and mean of a BERT; any other encoder is a single unit."""
        whole = [Unit(("encoder",), self._whole)]
        if not takes_finished_mask(self.encoder):
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

    def _tidy(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Ids int64 [n, L] with all padding behind the words, and where there is none, bool [n, L]."""
        if self.pad is None:
            return ids.long(), torch.ones_like(ids, dtype=torch.bool)
        order = (ids == self.pad).byte().argsort(dim=1, stable=True)
        ids = ids.long().gather(1, order)
        return ids, ids != self.pad

    def _embed(self, ids: Tensor) -> Tensor:
        ids, mask = self._tidy(ids)
        hidden: Tensor = self.encoder.embeddings(input_ids=ids)
        return torch.cat([hidden, mask.unsqueeze(-1).to(hidden.dtype)], dim=-1)

    def _layer(self, layer: nn.Module, x: Tensor) -> Tensor:
        hidden, mask = x[..., :-1], x[..., -1:]
        hidden = layer(hidden, attention_mask=attention_of(self.encoder, mask.squeeze(-1) != 0))
        return torch.cat([hidden, mask.to(hidden.dtype)], dim=-1)

    def _mean(self, x: Tensor) -> Tensor:
        hidden, weight = x[..., :-1], x[..., -1:]
        return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)

    def _whole(self, ids: Tensor) -> Tensor:
        ids, mask = self._tidy(ids)
        attend = attention_of(self.encoder, mask)
        hidden: Tensor = self.encoder(input_ids=ids, attention_mask=attend).last_hidden_state
        return self._mean(torch.cat([hidden, mask.unsqueeze(-1).to(hidden.dtype)], dim=-1))


def takes_finished_mask(encoder: Any) -> bool:
    """Whether its layers need no more than a finished mask: a plain BERT's, which see all tokens."""
    from transformers import BertModel

    config = encoder.config
    return type(encoder) is BertModel and config._attn_implementation == "sdpa" and not config.is_decoder


def attention_of(encoder: Any, mask: Tensor) -> Tensor:
    """A mask [n, L], True at tokens that are no padding, as the encoder takes it.

    Of a mask [n, L] every model of transformers makes what its own attention needs (a decoder adds that no
    token sees a later one). For that it looks whether any padding is there at all, which waits for the
    device; so a BERT gets a finished additive mask [n, 1, L, L].
    """
    if not takes_finished_mask(encoder):
        return mask.long()
    closed = torch.finfo(torch.float32).min * (~mask)[:, None, None, :].float()
    return closed.expand(-1, 1, mask.shape[1], -1)


def hf_model(data: DataInfo, /, *, name: str, pretrained: bool = True, pad: int | None = None) -> Classifier:
    """Any text encoder of transformers, from a folder or the hub, mean-pooled, with a new linear head.

    Args:
        name: a folder with config.json and model.safetensors (relative to the experiment file, then to the
            current folder), or the model's name on the Hugging Face hub.
        pretrained: load the weights; otherwise they are random and only the configuration is read.
        pad: the token id that pads samples, -1 where nothing pads; by default that of the data's tokenizer,
            or `pad_token_id` in config.json.

    Raises:
        UserError: no such model, or samples are no sequences of token ids, or they are too long, or nobody
            knows what pads them.
    """
    return _build(data, name, pretrained=pretrained, pad=pad)


@needs("minilm")
def minilm(data: DataInfo, /) -> Classifier:
    """all-MiniLM-L6-v2 (22.6 M parameters), a sentence encoder, with a new linear head.

    Weights: `fedsim assets fetch minilm`.
    """
    from fedsim.data.assets import path

    return _build(data, str(path("minilm")), pretrained=True, source=MINILM)


def _build(
    data: DataInfo, name: str, *, pretrained: bool, source: str | None = None, pad: int | None = None
) -> Classifier:
    shown = "minilm" if source == MINILM else f"hf:{name}"
    if len(data.sample_shape) != 1:
        raise UserError(
            f"model '{shown}' takes token ids [length], the data are {list(data.sample_shape)}; "
            "choose a text dataset or another [model] name"
        )
    encoder = _load(name, data.folders, pretrained=pretrained)
    longest = _longest(encoder)
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
    padding = _padding(shown, data, encoder.config, pad)
    backbone = TextBackbone(encoder, source or encoder.name_or_path, padding).eval()
    _try(shown, backbone, data.sample_shape[0])
    return Classifier(backbone, nn.Linear(width, len(data.classes))).eval()


def _longest(encoder: Any) -> int | None:
    """Tokens that there are positions for; a RoBERTa's first positions belong to padding."""
    longest = getattr(encoder.config, "max_position_embeddings", None)
    if longest is None or longest < 1:
        return None
    table = getattr(getattr(encoder, "embeddings", None), "position_embeddings", None)
    skipped = getattr(table, "padding_idx", None)
    return int(longest) if skipped is None else int(longest) - skipped - 1


def _padding(shown: str, data: DataInfo, config: Any, given: int | None) -> int | None:
    """The token that pads: as the experiment says, or the data's tokenizer, or the model's configuration."""
    if given is not None:
        return given if given >= 0 else None
    own = getattr(config, "pad_token_id", None)
    own = own if own is not None and own >= 0 else None
    if data.padding is None and own is None:
        raise UserError(
            f"model '{shown}' names no pad_token_id in config.json: say which token id pads the samples, "
            "[model] pad = 0 for instance, or pad = -1 where nothing does"
        )
    if data.padding is not None and own is not None and data.padding != own:
        raise UserError(
            f"model '{shown}' pads with token {own}, the tokenizer of the data with {data.padding}; give "
            f'the data the model\'s own ([data] tokenizer = "FOLDER"), or set [model] pad = {data.padding}'
        )
    return own if data.padding is None else data.padding


def _try(shown: str, backbone: TextBackbone, length: int) -> None:
    """Run a sample, so that what cannot encode text says so now.

    Raises:
        UserError: it does not put out hidden states of tokens.
    """
    word = 1 if backbone.pad == 0 else 0
    try:
        with torch.no_grad():
            backbone(torch.full((1, length), word))
    except (ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"model '{shown}' ({type(backbone.encoder).__name__}) does not encode a text of {length} tokens: "
            f"{(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from error


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
    if encoder.config.is_encoder_decoder:
        encoder = encoder.get_encoder()
    return encoder.eval()


def export_hf(model: Classifier, folder: Path) -> None:
    """Write the tuned encoder as `transformers.AutoModel.from_pretrained` reads it, LoRA merged into it.

    Its tokenizer comes along if it is where the encoder came from.

    Args:
        model: a classifier made by `hf_model`.
        folder: an existing one.

    Raises:
        UserError: the model is no text encoder, or the encoder of an encoder-decoder, or its tuning added
            modules that transformers has no place for.
    """
    import transformers

    backbone = model.backbone
    if not isinstance(backbone, TextBackbone):
        raise UserError("this model is no text encoder of transformers; export it as safetensors")
    added = [name for name in backbone.state_dict() if not name.startswith("encoder.")]
    if added:
        raise UserError(
            f"this tuning added '{added[0]}' to the encoder, which transformers has no place for; "
            "use the exported safetensors"
        )
    mapping: Any = transformers.MODEL_MAPPING
    whole = mapping.get(type(backbone.encoder.config), None)
    if whole is not None and not isinstance(backbone.encoder, whole):
        raise UserError(
            "this is one half of an encoder-decoder, which transformers does not read without the other; use "
            "the exported safetensors"
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
