"""The experiment of a method with the user's overrides, and the record of where it comes from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from fedsim import config, registry
from fedsim.config import Experiment
from fedsim.errors import UserError, nearest
from fedsim.forgetting.methods import METHODS, RETRAIN, Plan, Tables
from fedsim.forgetting.request import Kind, Origin, Request
from fedsim.overrides import applied, key_of

#: sections that say where and how exactly a run computes: they hold for retraining, too
_EVERYWHERE = ("engine", "compute")
_RECOVER = ("patience", "tolerance", "forgotten")


#: sections that may be set for a method's run; data, model and the like are those of the run that forgets
_OWN = ("edit", "recover", "client", "schedule", "evaluation", "checkpoints", *_EVERYWHERE)

#: method by kind of request
DEFAULT: dict[Kind, str] = {"class": "prune", "client": "not"}


def methods_of(origin: Origin, request: Request, chosen: str) -> list[str]:
    """The methods behind `--method`: names separated by commas, or `all` that this run allows; each once.

    Raises:
        UserError: there is none of a name, or it does not know this kind of request.
    """
    known = METHODS[request.kind]
    if chosen == "all":
        replays = bool(origin.root.updates()) and not origin.before("class")
        return [name for name in known if name != "federaser" or replays]
    found = list(dict.fromkeys(name.strip() for name in chosen.split(",")))
    for name in found:
        if name in known or name in RETRAIN:
            continue
        elsewhere = [kind for kind, methods in METHODS.items() if name in methods]
        if elsewhere:
            names = {"class": "classes", "client": "clients"}
            raise UserError(
                f"method '{name}' forgets {names[elsewhere[0]]}, not {names[request.kind]}; for a "
                f"{request.kind}: {', '.join(known)}"
            )
        raise UserError(f"unknown method '{name}': {nearest(name, [*known, *RETRAIN, 'all'])}")
    return found


def recovery_rounds(origin: Origin, overrides: Sequence[str]) -> int:
    """`recover.rounds`, by default a quarter of the run's own rounds."""
    given = applied({}, [text for text in overrides if key_of(text) == "recover.rounds"])
    rounds = given.get("recover", {}).get("rounds", max(2, math.ceil(origin.experiment.rounds / 4)))
    if not isinstance(rounds, int) or rounds < 1:
        raise UserError(f"--set recover.rounds={rounds}: must be a number of rounds, 1 or more")
    return rounds


def experiment_of(plan: Plan, method: str, overrides: Sequence[str]) -> Experiment:
    """The experiment of one method.

    Args:
        plan: what to forget, and from what.
        method: a name in `METHODS` or `RETRAIN`.
        overrides: `edit.KEY=VALUE` and `recover.KEY=VALUE` of the strategy `unlearn`; everything else as in
            `fedsim run`. Retraining takes those of [engine] and [compute] alone: its recipe is the run's.

    Raises:
        UserError: the method cannot do it, or an override does not fit.
    """
    if method not in (*RETRAIN, "retrain-short"):
        client = [text for text in overrides if key_of(text).startswith("client.")]
        origin = replace(plan.origin, experiment=plan.origin.experiment.replace(*client))
        plan = replace(plan, origin=origin)
    make = METHODS[plan.request.kind].get(method) or RETRAIN[method]
    document = make(plan)
    mine = [text for text in (_translated(text, document) for text in overrides) if text is not None]
    folders = plan.origin.experiment.folders
    found = config.from_tables(document, source=f"--method {method}", folders=folders, overrides=mine)
    found.build("strategy")  # mistakes come before anything runs
    return found


def everywhere(override: str) -> bool:
    """Whether an override says where or how exactly to compute, and so holds for every run."""
    return key_of(override).partition(".")[0] in _EVERYWHERE


def _translated(override: str, document: Tables) -> str | None:
    """An override as it applies to a method's experiment; None where it does not."""
    section, _, key = key_of(override).partition(".")
    if everywhere(override):
        return override
    if document["strategy"]["name"] != "unlearn":
        return None
    if section == "recover":
        return None if key == "rounds" else override.replace("recover.", "strategy.", 1)
    if section == "edit":
        known = _keys_of(document["strategy"]["edit"]["name"])
        return override.replace("edit.", "strategy.edit.", 1) if key in known else None
    return None if section == "client" else override  # the client's are in the document already


def check_overrides(overrides: Sequence[str], methods: Sequence[str]) -> None:
    """Raise UserError for a key that none of the methods has, or that would change what is compared."""
    edits = set(methods) & set(registry.table("edits"))
    known = {key for name in edits for key in _keys_of(name)}
    for override in overrides:
        section, _, key = key_of(override).partition(".")
        if section not in _OWN:
            raise UserError(
                f"--set {override}: data, model and recipe are those of the run that forgets; keys of "
                f"{', '.join(_OWN)} may be set"
            )
        if section == "edit" and not known:
            raise UserError(f"--set {override}: {', '.join(methods)} takes no keys of edit")
        if section == "edit" and key not in known:
            raise UserError(f"--set {override}: no such key in {', '.join(methods)}: {nearest(key, known)}")
        if section == "recover" and key != "rounds" and key not in _RECOVER:
            raise UserError(f"--set {override}: {nearest(key, ['rounds', *_RECOVER])}")


def _keys_of(edit: str) -> Iterable[str]:
    """Keys of an edit."""
    return registry.schema(registry.resolve("edits", edit).target).model_fields


def lineage_of(plan: Plan, method: str) -> Tables:
    """What a run folder records of where it comes from."""
    requests = [*plan.origin.lineage.get("requests", [])]
    words = plan.origin.words(plan.request)
    return {
        "origin": str(plan.origin.run.folder.resolve()),
        "digest": plan.origin.run.summary()["digest"],
        "root": str(plan.origin.root.folder.resolve()),
        "method": method,
        "requests": [*requests, {"kind": plan.request.kind, "ids": list(plan.request.ids), "words": words}],
    }
