"""Makes the bundled tiny-clip: fedsim/models/tiny_clip.safetensors and tiny_clip.json.

    python experiments/make_tiny_clip.py

A CLIP (Radford et al. 2021, arXiv 2103.00020) of 8x8 digits, pre-trained on the 700 clean digits of
`digits_for_pretraining`, which are disjoint from the federated ones. With ten classes a batch holds many
images of one caption, so the loss is cross-entropy over the ten captions of one random template instead
of the batch-wise contrastive loss. The only augmentation is a shift by at most one pixel: rotation,
inversion and noise stay unseen, they are what federated tuning has to adapt to. About 30 seconds on one
core; the same library versions on the same CPU give the same file.
"""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from fedsim.data.sources import DIGIT_WORDS, digits, digits_for_pretraining
from fedsim.models.base import DataInfo
from fedsim.models.clip import TINY_CONFIG, TINY_WEIGHTS, ImageTower, new_tiny_clip, tiny_clip

EPOCHS, BATCH, RATE = 60, 50, 2e-3
TEMPLATES = (
    "a photo of a {}",
    "a photo of the number {}",
    "a picture of the digit {}",
    "an image of a handwritten {}",
    "the handwritten digit {}",
    "a {}",
)


def config() -> dict[str, object]:
    """What open_clip calls `open_clip_config.json`, and the words of the tokenizer."""
    words = sorted({word for template in TEMPLATES for word in template.split()} - {"{}"})
    words += DIGIT_WORDS
    vision = {"image_size": 8, "patch_size": 2, "width": 64, "head_width": 16, "layers": 3, "mlp_ratio": 2.0}
    text = {"context_length": 16, "vocab_size": len(words) + 3, "width": 64, "heads": 4, "layers": 2}
    return {
        "model_cfg": {"embed_dim": 64, "vision_cfg": vision, "text_cfg": {**text, "mlp_ratio": 2.0}},
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear"},
        "words": words,
    }


def nudge(images: Tensor) -> Tensor:
    """Every image moved by -1, 0 or 1 pixel along both axes; [n, 1, 8, 8]."""
    padded = functional.pad(images, (1, 1, 1, 1))
    rows, columns = torch.randint(0, 3, (2, len(images), 1))
    span = torch.arange(8)
    samples = torch.arange(len(images))[:, None, None]
    return padded[samples, 0, (rows + span)[:, :, None], (columns + span)[:, None, :]][:, None]


def main() -> None:
    """Train, write the two files, and say the zero-shot accuracy on the federated test images."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    shape = config()
    TINY_CONFIG.write_text(json.dumps(shape, indent=2) + "\n", "utf-8")
    clip, tokenizer = new_tiny_clip(shape)
    tower = ImageTower(clip.visual, shape, whole=lambda: clip)
    captions = [tokenizer([template.replace("{}", word) for word in DIGIT_WORDS]) for template in TEMPLATES]
    images, labels = map(torch.from_numpy, digits_for_pretraining())
    batches = len(images) // BATCH
    optimiser = torch.optim.AdamW(clip.parameters(), lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=EPOCHS * batches)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(images)).view(batches, BATCH):
            template = int(torch.randint(len(captions), ()))
            text = clip.encode_text(captions[template], normalize=True)
            features = functional.normalize(tower(nudge(images[chosen])), dim=-1)
            loss = functional.cross_entropy(clip.logit_scale.exp() * features @ text.T, labels[chosen])
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            schedule.step()
    save_file({name: value.contiguous() for name, value in clip.state_dict().items()}, TINY_WEIGHTS)
    model = tiny_clip(DataInfo(DIGIT_WORDS, (1, 8, 8)))
    test = digits()
    with torch.no_grad():
        predicted = model(torch.from_numpy(test.test_x)).argmax(1)
    accuracy = (predicted == torch.from_numpy(test.test_y)).float().mean().item()
    print(f"{TINY_WEIGHTS.name}: {TINY_WEIGHTS.stat().st_size / 1e6:.2f} MB, zero-shot {accuracy:.3f}")


if __name__ == "__main__":
    main()
