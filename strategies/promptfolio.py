"""PromptFolio: one prompt is shared, one stays with the client, their text features are mixed
(arXiv 2409.19610; after the public code).

    client   text features (1 - θ) T(v) + θ T(u_k),  v and u_k ← SGD
    server   v ← Σ n_k v_k / Σ n_k;  u_k never travels

θ is `[tuning] share`, 0.4 by default.
"""

from __future__ import annotations

from typing import Any, ClassVar

from fedsim.averaging import WeightedAverage


class PromptFolio(WeightedAverage):
    """Average one prompt of two, the other is the client's own (PromptFolio, arXiv 2409.19610)."""

    tied = ("tuning",)
    defaults: ClassVar[dict[str, dict[str, Any]]] = {
        "tuning": {"name": "prompt-folio"},
        "payload": {"personal": ["head.own"]},
    }
