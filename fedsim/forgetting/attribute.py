"""Erasing an attribute from a finished run: an experiment that starts from its state and only erases.

    final state ─> moments of the clients ─> eraser at the cut (LEACE) ─> head rounds ─> (audit)

The new run has the old one's model, data, clients and keys: everything that works on runs works on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedsim.errors import UserError
from fedsim.runs import Run


def erasing(
    run: Run, attributes: Sequence[str], *, head_rounds: int = 1, audit_rounds: int = 0
) -> dict[str, Any]:
    """Tables of the experiment that erases attributes from a finished run.

    What an earlier run erased is erased again, together with the new attributes: one eraser for all.

    Args:
        run: finished, of clients with ordinary keys.
        attributes: names.
        head_rounds: rounds that train what is above the cut.
        audit_rounds: exchanges of the federated audit.

    Raises:
        UserError: it is not finished, its clients are of another kind, or attributes are erased already.
    """
    summary, document = run.summary(), run.experiment().document()
    client, before = document["client"], document["detacher"]
    if client["name"] not in ("standard", "attribute-unlearning"):
        raise UserError(
            f"{run.folder} has clients '{client['name']}', which cannot be asked for moments; erasing works "
            "on runs of the standard client"
        )
    if document["partition"]["pooled"]:
        raise UserError(f"{run.folder} has one client with everybody's data; there is no federation to ask")
    erased = before.get("attributes", []) if document["strategy"].get("leace") else []
    new = [name for name in dict.fromkeys(attributes) if name not in erased]
    if not new:
        raise UserError(f"{run.folder}: '{', '.join(attributes)}' is what this run has unlearned already")
    auditing = audit_rounds + 1 if audit_rounds else 0
    return {
        **document,
        "name": f"{document['name']}-without-{'-'.join(new)}",
        "rounds": 1 + head_rounds + auditing,
        "baselines": [],
        "client": {**client, "name": "attribute-unlearning"},
        "detacher": {"name": "none", "attributes": [*erased, *new], **_cut(before)},
        "strategy": {
            "name": "attribute-unlearning",
            "origin": str((run.folder / "state.safetensors").resolve()),
            "digest": summary["digest"],
            "head_rounds": head_rounds,
            "audit_rounds": audit_rounds,
        },
        "evaluation": {**document["evaluation"], "where": "server", "patience": 0},
    }


def _cut(before: dict[str, Any]) -> dict[str, Any]:
    return {"cut": before["cut"]} if "cut" in before else {}
