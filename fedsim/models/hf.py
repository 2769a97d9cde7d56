"""Text encoders of Hugging Face transformers: `hf:NAME-or-folder`, and MiniLM with fetched weights.

    token ids int [n, L], 0 pads ─ encoder ─> hidden states ─ mean over tokens ─> features [n, d] ─ Linear

Token ids come with the data; they must be those of the encoder's own tokenizer, with 0 for padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.errors import UserError
from fedsim.lookup import candidates, listed
from fedsim.models.base import Classifier, DataInfo
from fedsim.models.quiet import quiet


class TextBackbone(nn.Module):
    """Token ids [n, L] -> mean of the hidden states at tokens that are no padding, [n, d].

    Args:
        encoder: a transformers model.
    """

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor) -> Tensor:
        """Features, float32."""
        mask = ids != 0
        hidden: Tensor = self.encoder(
            input_ids=ids.long(), attention_mask=self._attend(mask)
        ).last_hidden_state
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)

    def _attend(self, mask: Tensor) -> Tensor:
        """The mask as the encoder takes it.

        From a mask [n, L] the attention of torch ("sdpa") looks whether any padding is there at all, which
        waits for the device; a finished additive one [n, 1, L, L] is taken as it is.
        """
        if self.encoder.config._attn_implementation != "sdpa":
            return mask.long()
        closed = torch.finfo(torch.float32).min * (~mask)[:, None, None, :].float()
        return closed.expand(-1, 1, mask.shape[1], -1)


def hf_model(data: DataInfo, /, *, name: str, pretrained: bool = True) -> Classifier:
    """Any transformers text encoder, mean-pooled, with a new linear head.

    Args:
        name: a folder with config.json and model.safetensors (relative to the experiment file, then to the
            current folder), or the model's name on the Hugging Face hub.
        pretrained: load the weights; otherwise they are random and only the configuration is read.

    Raises:
        UserError: no such model, or samples are no sequences of token ids, or they are too long.
    """
    if len(data.sample_shape) != 1:
        raise UserError(
            f"model 'hf:{name}' takes token ids [length], the data are {list(data.sample_shape)}; "
            "choose a text dataset or another [model] name"
        )
    encoder = _load(name, data.folders, pretrained=pretrained)
    longest = getattr(encoder.config, "max_position_embeddings", None)
    if longest is not None and data.sample_shape[0] > longest:
        raise UserError(
            f"model 'hf:{name}' takes at most {longest} tokens, the data have {data.sample_shape[0]}; "
            "shorten the samples"
        )
    width = getattr(encoder.config, "hidden_size", None)
    if width is None:
        raise UserError(f"model 'hf:{name}' states no hidden_size in config.json: it is no text encoder")
    return Classifier(TextBackbone(encoder), nn.Linear(width, len(data.classes))).eval()


def minilm(data: DataInfo, /) -> Classifier:
    """all-MiniLM-L6-v2 (22.6 M parameters), a sentence encoder, with a new linear head.

    Weights: `fedsim assets fetch minilm`.
    """
    from fedsim.data.assets import path

    return hf_model(data, name=str(path("minilm")))


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
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None  # features are the mean: it would train and travel for nothing
    return encoder.eval()
