"""The forms in which other libraries read an exported model: one folder each, the head beside the backbone.

    open_clip/   a CLIP, for open_clip
    hf/          a text encoder with its tokenizer, for transformers
    peft/        the low-rank updates of LoRA alone, for peft

Every folder also has `head.safetensors`: what maps the backbone's features to logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file

from fedsim.errors import UserError
from fedsim.files import whole_folder
from fedsim.models.base import Classifier, at_rest
from fedsim.models.clip import ImageTower, export_open_clip
from fedsim.models.hf import TextBackbone, export_hf
from fedsim.models.lora import export_peft, peft_layers


@dataclass(frozen=True)
class Form:
    """One of them.

    Attributes:
        folder: its name.
        fits: whether a model is of the kind.
        write: model, empty folder -> files in it; UserError where the tuning left no such form.
        readme: how to load it.
    """

    folder: str
    fits: Callable[[Classifier], bool]
    write: Callable[[Classifier, Path], None]
    readme: str


_FORMS = (
    Form(
        "open_clip",
        lambda model: isinstance(model.backbone, ImageTower),
        export_open_clip,
        """
The folder `open_clip` holds the CLIP with the tuned image tower:

```python
import open_clip
model = open_clip.create_model("local-dir:open_clip")
```
""",
    ),
    Form(
        "hf",
        lambda model: isinstance(model.backbone, TextBackbone),
        export_hf,
        """
The folder `hf` holds the tuned text encoder as transformers reads it. Features are the mean of its last
hidden states over tokens that are no padding; `hf/head.safetensors` maps them to logits:

```python
from transformers import AutoModel
encoder = AutoModel.from_pretrained("hf")
```
""",
    ),
    Form(
        "peft",
        lambda model: bool(peft_layers(model.backbone)),
        export_peft,
        """
The folder `peft` holds the LoRA updates alone. `base` is the untuned model as its own library loads it
(named in `peft/adapter_config.json`; of timm without classifier):

```python
from peft import PeftModel
tuned = PeftModel.from_pretrained(base, "peft")
```
""",
    ),
)


def write_forms(model: Classifier, out: Path) -> tuple[list[str], str, list[str]]:
    """Write a model in every form that fits it.

    Args:
        model: tuned, with the values to export.
        out: the export's folder.

    Returns:
        Names of the folders, text for the README, and what the user should know.
    """
    written, text, notices = [], "", []
    for form in _FORMS:
        if not form.fits(model):
            continue
        try:
            with whole_folder(out / form.folder) as folder:
                form.write(model, folder)
                head = at_rest(model.head).state_dict()  # of learned prompts: their text features
                save_file({k: v.cpu().contiguous() for k, v in head.items()}, folder / "head.safetensors")
        except UserError as error:
            notices.append(f"no {form.folder} folder: {error}")
            continue
        written.append(f"{form.folder}/")
        text += form.readme
    return written, text, notices
