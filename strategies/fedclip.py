"""FedCLIP: a gate on the image features of a frozen CLIP is learned and averaged (arXiv 2302.13485).

    client   features f · gate_k(f),  gate_k ← AdamW on its own data, both towers frozen
    server   gate ← Σ n_k gate_k / Σ n_k

The gate is `[tuning] name = "clip-adapter"`. The client's loss is cross-entropy over all classes; the public
code contrasts the images and captions of a batch instead.
"""

from __future__ import annotations

from typing import Any, ClassVar

from fedsim.averaging import WeightedAverage


class FedCLIP(WeightedAverage):
    """Average a learned gate on the image features of a CLIP (FedCLIP, arXiv 2302.13485)."""

    tied = ("tuning",)
    defaults: ClassVar[dict[str, dict[str, Any]]] = {
        "tuning": {"name": "clip-adapter"},
        "client": {"optimizer": "adamw", "lr": 5e-5, "weight_decay": 0.2, "batch_size": 32},
    }
