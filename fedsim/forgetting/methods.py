"""From a request to experiments: one function per method.

`METHODS` says which methods know which kind of request; a new kind of request is a new table in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim import messages
from fedsim.errors import UserError
from fedsim.files import write_atomic
from fedsim.forgetting.request import KEYS, MASKS, Origin, Request
from fedsim.runs import Run

Tables = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """Everything that the tables of an experiment are made of."""

    origin: Origin
    request: Request
    rounds: int  #: of recovery
    folder: Path  #: of the request

    def document(self, name: str, **sections: Any) -> Tables:
        """The run's own experiment without the data, with some sections or keys replaced."""
        document = self.origin.experiment.document()
        lost = {kind: self.origin.before(kind) for kind in KEYS}
        lost[self.request.kind] += self.request.ids
        partition = document["partition"]
        partition.setdefault("seed", self.origin.experiment.seed)
        document["checkpoints"]["record_updates"] = False
        left_out = {KEYS[kind]: self.origin.written(kind, sorted(ids)) for kind, ids in lost.items() if ids}
        forget = {**document["forget"], **left_out}
        if all(lost.values()):
            forget["watch"] = KEYS[self.request.kind]
        return {**document, "name": name, "baselines": [], "forget": forget, **sections}

    def unlearn(self, name: str, edit: Tables, edit_rounds: int, rounds: int, **keys: Any) -> Tables:
        """An experiment of the strategy `unlearn`."""
        mine = self.origin.experiment.document()
        strategy = {
            "name": "unlearn",
            "kind": self.request.kind,
            "targets": self.origin.written(self.request.kind, self.request.ids),
            "edit": edit,
            "recover": mine["strategy"],
            **keys,
        }
        return self.document(
            name,
            rounds=edit_rounds + rounds,
            strategy=strategy,
            client={"name": "unlearn", "base": mine["client"]},
            # the best validation loss may be that of the start, which has forgotten nothing
            evaluation={**mine["evaluation"], "patience": 0},
        )

    def start(self, state: Path, digest: str) -> Tables:
        """Keys of the strategy that say where to start."""
        masks = self.origin.run.folder / MASKS
        more = {"masks": str(masks.resolve())} if masks.is_file() else {}
        return {"origin": str(state), "digest": digest, **more}


def _edited(name: str) -> Callable[[Plan], Tables]:
    """A method that edits the final state and recovers."""

    def make(plan: Plan) -> Tables:
        steps = len(plan.request.ids) if name in ("prune", "pga") else int(name != "none")
        rounds = 0 if name == "head-mask" else plan.rounds
        start = plan.start(plan.origin.state, plan.origin.run.summary()["digest"])
        edit: Tables = {"name": name}
        if name == "pga":
            edit["shares"] = [_share(plan, client) for client in plan.request.ids]
        return plan.unlearn(name, edit, steps, rounds, **start)

    return make


def _retrained(name: str, seed: int) -> Callable[[Plan], Tables]:
    """The same recipe from the beginning; another seed changes the model's start and the order of samples."""

    def make(plan: Plan) -> Tables:
        return plan.document(name, seed=plan.origin.experiment.seed + seed)

    return make


def _retrained_briefly(plan: Plan) -> Tables:
    """As many rounds of training from the beginning as the others have for their recovery.

    With a seed of its own: with that of `retrain` it would be the first rounds of the reference itself.
    """
    return plan.document("retrain-short", rounds=plan.rounds, seed=plan.origin.experiment.seed + 2)


def _rolled_back(plan: Plan) -> Tables:
    """Go on from the last state that had never seen the data."""
    root = plan.origin.root
    first = _first_round(root, plan)
    total = plan.origin.experiment.rounds
    start: Tables = {}
    if first > 1:
        state = plan.folder / "roll-back-start.safetensors"
        start = {"origin": str(state.resolve()), "digest": _extract(root, first - 1, state)}
    made = plan.unlearn(
        "roll-back", {"name": "none"}, 0, total - first + 1, first_round=first - 1, patience=0, **start
    )
    return {**made, "seed": plan.origin.experiment.seed + 3}  # not the reference's own


def _erased(plan: Plan) -> Tables:
    """FedEraser: replay recorded updates with half the local work."""
    root = plan.origin.root
    count = len(root.updates())
    if not count:
        raise UserError(
            f"{root.folder} recorded no updates, which method 'federaser' replays; run the experiment again "
            "with --set checkpoints.record_updates=true"
        )
    if plan.origin.before("class"):
        raise UserError(
            f"{root.folder} recorded updates that were trained on classes which are forgotten since; method "
            "'federaser' would replay them: choose another method"
        )
    document = plan.document("federaser", rounds=count)
    client = dict(document["client"])
    for key in ("epochs", "steps"):
        if key in client:
            client[key] = max(1, client[key] // 2) if key == "steps" else client[key] / 2
    lost = sorted({*plan.origin.before("client"), *plan.request.ids})
    strategy = {"name": "federaser", "updates": str((root.folder / "updates").resolve()), "targets": lost}
    return {**document, "client": client, "strategy": strategy}


#: kind of request -> method -> tables of its experiment
METHODS: dict[str, dict[str, Callable[[Plan], Tables]]] = {
    "class": {
        **{name: _edited(name) for name in ("prune", "not", "head-mask", "none")},
        "roll-back": _rolled_back,
        "retrain-short": _retrained_briefly,
    },
    "client": {
        **{name: _edited(name) for name in ("not", "none", "pga")},
        "federaser": _erased,
        "roll-back": _rolled_back,
        "retrain-short": _retrained_briefly,
    },
}
#: what forgetting is compared with, and how far two honest retrainings are apart
RETRAIN: dict[str, Callable[[Plan], Tables]] = {
    "retrain": _retrained("retrain", 0),
    "retrain-2": _retrained("retrain-2", 1),
}


def relearn(plan: Plan, method: str, state: Path, digest: str, rounds: int) -> Tables:
    """A few rounds with the data back, from the state that a method ended with."""
    linear = plan.request.kind == "class"
    document = plan.unlearn(
        f"relearn-{rounds}-{method}",
        {"name": "fresh-head" if linear else "none"},
        int(linear),
        rounds,
        origin=str(state),
        digest=digest,
        patience=0,
    )
    return {**document, "forget": {**document["forget"], "relearn": True}}


def _first_round(root: Run, plan: Plan) -> int:
    """The first round in which somebody trained on the data."""
    from fedsim.building import load_data

    lost = {kind: plan.origin.before(kind) for kind in KEYS}  # what went before must not come back, either
    lost[plan.request.kind] += plan.request.ids
    holders = set(lost["client"])
    if lost["class"]:
        counts = load_data(plan.origin.experiment).class_counts()
        holders |= set(counts[:, lost["class"]].sum(1).nonzero()[0].tolist())
    rounds = [
        row["round"] for row in root.client_rows() if row["phase"] == "train" and row["client"] in holders
    ]
    if not rounds:
        what = ", ".join(plan.origin.words(plan.request))
        raise UserError(f"{root.folder}: nobody ever trained on {what}; there is nothing to forget")
    return int(min(rounds))


def _share(plan: Plan, client: int) -> float:
    """The client's share of the weights in the last round that it and others trained in.

    Clients that were forgotten before, or by this request before it, are not counted: the model that this
    client's part is taken out of is already without them.
    """
    gone = set(plan.origin.before("client")) | {other for other in plan.request.ids if other < client}
    weighting = plan.origin.experiment["strategy"].options.get("weighting", "examples")
    for run in (plan.origin.run, plan.origin.root):
        rounds: dict[int, dict[int, float]] = {}
        for row in run.client_rows():
            if row["phase"] != "train" or "error" in row or row["client"] in gone:
                continue
            if math.isfinite(row.get(messages.EXAMPLES, math.nan)):  # else the reply was refused
                weights = rounds.setdefault(row["round"], {})
                weights[row["client"]] = messages.weight_of(row, weighting)
        totals = [(weights.get(client, 0.0), sum(weights.values())) for weights in rounds.values()]
        shares = [own / total for own, total in totals if 0 < own < total]
        if shares:
            return shares[-1]
    raise UserError(
        f"{plan.origin.root.folder}: client {client} never trained in a round with others, so its part in "
        "their mean is not known, which method 'pga' takes out; choose another method"
    )


def _extract(root: Run, server_round: int, path: Path) -> str:
    """Write the state after a round to a file; returns its digest."""
    from safetensors.numpy import save

    from fedsim import checkpoints, payload

    checkpoint = root.folder / "checkpoints" / f"round-{server_round:05d}.safetensors"
    if not checkpoint.is_file():
        raise UserError(
            f"{root.folder} kept no checkpoint of round {server_round}, where method 'roll-back' begins; "
            f"run the experiment again with --set checkpoints.keep={root.experiment().rounds + 1}"
        )
    values = messages.views_of(checkpoints.load(checkpoint)["progress"]["arrays"])
    write_atomic(path, save({k: v.copy() for k, v in values.items()}))
    return payload.digest(values)
