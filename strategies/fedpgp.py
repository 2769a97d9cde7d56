"""FedPGP: a shared prompt plus a low-rank change of the client's own (arXiv 2405.09771; after public code).

    client   prompt v + U_k V_k,  cross-entropy + µ · contrast(T(v); near T(caption), far from T(v + U_k V_k))
    server   v ← Σ n_k v_k / Σ n_k;  U_k and V_k never travel

Rank, µ and the contrast's temperature are keys of `[tuning]`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from fedsim.averaging import WeightedAverage


class FedPGP(WeightedAverage):
    """Average a prompt, its low-rank change is the client's own (FedPGP, arXiv 2405.09771)."""

    tied = ("tuning",)
    defaults: ClassVar[dict[str, dict[str, Any]]] = {
        "tuning": {"name": "prompt-low-rank"},
        "payload": {"personal": ["head.left", "head.right"]},
    }
