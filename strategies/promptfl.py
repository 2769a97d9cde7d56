"""PromptFL: clients learn a prompt instead of a model (arXiv 2208.11625).

    server   v: context vectors of a CLIP's captions, [M, D]
    client   v_k ← SGD on its own data, both towers frozen
    server   v ← Σ n_k v_k / Σ n_k

4·M·D bytes travel in each direction. With `[tuning] class_specific = true` every class has vectors of its
own, and a class's vectors are averaged over the clients that have samples of it, n_k,c instead of n_k (ours:
elsewhere clients without the class dilute them). The mean is that of `WeightedAverage`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from fedsim.averaging import WeightedAverage


class PromptFL(WeightedAverage):
    """Average the learned context of a CLIP's captions (PromptFL, arXiv 2208.11625)."""

    tied = ("tuning",)
    defaults: ClassVar[dict[str, dict[str, Any]]] = {"tuning": {"name": "prompt"}}
