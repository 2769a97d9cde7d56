"""Locally supervised learning: a backbone trained window by window, in a fraction of the memory.

    model = LocallySupervised(resnet32(), method="man++", blocks=16)
    model.local_step(images, labels, optimizer)
    plain = model.inference_model()

    chain.py       what a backbone is divided into         plans.py       where it is cut
    windows.py     windows and the loop that runs them     methods.py     which windows a method has
    heads.py couplings.py objectives.py                    what trains a window that is not the last
    learner.py     LocallySupervised                       meters.py memory.py   bytes, measured and foreseen
    federated.py   what every client of a federation trains with

Only torch, no Flower. The names below are those of `[local]`; a method of one's own is
`"package.module:function"` (docs/local_learning.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsim.local_learning.learner import LocallySupervised

METHODS = {
    "bp": "fedsim.local_learning.methods:bp",
    "checkpointed-bp": "fedsim.local_learning.methods:checkpointed_bp",
    "greedy": "fedsim.local_learning.methods:greedy",
    "dgl": "fedsim.local_learning.methods:dgl",
    "infopro": "fedsim.local_learning.methods:infopro",
    "man": "fedsim.local_learning.methods:man",
    "man++": "fedsim.local_learning.methods:man_plus",
    "hpff": "fedsim.local_learning.methods:hpff",
    "mlaan": "fedsim.local_learning.methods:mlaan",
}

__all__ = ["METHODS", "LocallySupervised"]


def __getattr__(name: str) -> Any:
    """torch is imported when somebody wants to train, not when somebody lists names."""
    if name == "LocallySupervised":
        from fedsim.local_learning.learner import LocallySupervised

        return LocallySupervised
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
