"""FedTune: parameter-efficient tuning of pre-trained models in federated learning (arXiv 2211.08025).

The paper compares ways to tune a pre-trained backbone (the input, extra modules, the backbone itself)
under plain federated averaging of what is tuned, and finds tuning the *bias terms* best when the
pre-trained model is strong. Written from the abstract; the paper's settings were not available.

    server   φ₀ ⊂ θ₀: the parameters that [tuning] lets train (default: all biases)
    client   φ_k ← SGD on its own data, everything else of θ₀ frozen
    server   φ ← Σ n_k φ_k / Σ n_k

Which parameters φ are is the experiment's `[tuning]` section, so the strategy is the mean and a default.
"""

from __future__ import annotations

from typing import Any, ClassVar

from fedsim.averaging import WeightedAverage


class FedTune(WeightedAverage):
    """Average what is tuned of a pre-trained model; bias tuning by default (FedTune, arXiv 2211.08025)."""

    defaults: ClassVar[dict[str, dict[str, Any]]] = {"tuning": {"name": "bias"}}
