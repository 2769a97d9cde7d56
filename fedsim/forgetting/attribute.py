"""Erasing an attribute from a finished run: an experiment that starts from its state and only erases.

    final state ─> moments of the clients ─> eraser at the cut (LEACE) ─> head rounds ─> (audit)

The new run has the old one's model, data, clients and keys: everything that works on runs works on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedsim import config
from fedsim.config import Experiment
from fedsim.errors import UserError
from fedsim.overrides import applied
from fedsim.runs import Run
from fedsim.terminal import attacks_of, chance_of


def experiment_of(run: Run, attributes: Sequence[str], overrides: Sequence[str] = ()) -> Experiment:
    """The experiment that erases attributes, with a user's overrides; its rounds are what it has to do.

    Raises:
        UserError: see `erasing`, or an override does not fit.
    """
    if not [name for name in attributes if name]:
        raise UserError("--attribute names nothing; the names are those of the data's attributes")
    given = applied({}, overrides).get("strategy", {})
    if given.get("leace") is False:
        raise UserError("strategy.leace = false leaves nothing to do: an attribute is forgotten by LEACE")
    wanted = {key: given[key] for key in ("head_rounds", "audit_rounds") if isinstance(given.get(key), int)}
    tables = erasing(run, attributes, **wanted)
    folders = run.experiment().folders
    return config.from_tables(tables, source="--attribute", folders=folders, overrides=overrides)


def before_and_after(origin: Run, run: Run) -> list[str]:
    """What erasing did to accuracy and attackers, a line each.

    Args:
        origin: the run that was to forget; what it did not measure is measured at the new run's start.
        run: the new one.
    """
    start, summary = {**run.history()[0], **origin.summary()}, run.summary()
    attacks = attacks_of(summary)
    wide = max(map(len, ["accuracy", *attacks]))
    lines = [f"{'accuracy':<{wide}}  {start['accuracy']:.3f} → {summary['accuracy']:.3f}"]
    for key in attacks:
        before = f"{start[key]:.3f}" if key in start else "     "
        error, chance = summary.get(f"{key}_error"), chance_of(summary, key)
        doubt = "" if error is None else f" ± {error:.3f}"
        line = f"{key.replace('_', ' '):<{wide}}  {before} → {summary[key]:.3f}{doubt}  (chance {chance:.3f})"
        lines.append(line)
    return lines


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
        UserError: it is not finished, was made on nodes, its clients are of another kind, or attributes are
            erased already.
    """
    run.require_own_data("forget")
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
