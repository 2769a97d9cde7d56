"""What is to be forgotten, and by which finished run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fedsim.config import Experiment
from fedsim.errors import UserError, nearest
from fedsim.runs import Run, read_json

Kind = Literal["class", "client"]

#: in the folder of a run that forgets: where it comes from
LINEAGE = "lineage.json"
#: beside its state: layer -> uint8 [channels], 1 where a channel is pruned
MASKS = "masks.safetensors"
#: key of [forget] by kind
KEYS: dict[Kind, str] = {"class": "classes", "client": "clients"}


@dataclass(frozen=True)
class Request:
    """What to forget.

    Attributes:
        kind: classes or clients.
        ids: positions of classes, or clients.
    """

    kind: Kind
    ids: tuple[int, ...]

    @property
    def label(self) -> str:
        """`class-9`, `client-3-5`."""
        return "-".join([self.kind, *map(str, self.ids)])


@dataclass(frozen=True)
class Origin:
    """The run that is to forget.

    Attributes:
        run: its folder.
        experiment: the ordinary experiment behind it: of a run that forgot before, the one before that.
        lineage: of the run itself, where it is the result of forgetting.
    """

    run: Run
    experiment: Experiment
    lineage: Mapping[str, Any] = field(default_factory=dict)

    @property
    def state(self) -> Path:
        """The final state."""
        return (self.run.folder / "state.safetensors").resolve()

    def before(self, kind: Kind) -> list[int]:
        """Classes or clients that are forgotten already."""
        ids = {i for one in self.lineage.get("requests", []) if one["kind"] == kind for i in one["ids"]}
        return sorted({*ids, *self.experiment.settings["forget"].get(KEYS[kind], [])})

    @property
    def root(self) -> Run:
        """The ordinary run at the beginning."""
        return Run.open(Path(self.lineage["root"])) if self.lineage else self.run


def opened(run: Run) -> Origin:
    """A finished run as the origin of forgetting.

    Raises:
        UserError: it is not finished, was made on nodes, or its root is gone.
    """
    if not run.finished:
        raise UserError(f"{run.folder} is not finished; first: fedsim resume {run.folder}")
    if not (run.folder / "state.safetensors").is_file():
        raise UserError(f"{run.folder} has no final state (state.safetensors); run the experiment again")
    run.require_own_data("forget")
    path = run.folder / LINEAGE
    if not path.is_file():
        return Origin(run, run.experiment())
    lineage = read_json(path)
    if run.experiment().settings["forget"].get("relearn"):
        raise UserError(
            f"{run.folder} learnt again what was forgotten, to measure how fast: forget from "
            f"{lineage['origin']}, or from a method's folder beside it"
        )
    return Origin(run, Run.open(Path(lineage["root"])).experiment(), lineage)


def request_of(origin: Origin, kind: Kind, words: Sequence[str]) -> Request:
    """The classes (by position or name) or clients that a user named.

    Raises:
        UserError: one that is not there, that has no data or is forgotten already; or nothing would be left.
    """
    from fedsim.building import load_data

    data = load_data(origin.experiment)
    classes = data.arrays.classes
    if not words:
        raise UserError(f"--{kind} is empty: say which, for example --{kind} 0")
    names = [str(n) for n in range(data.clients)] if kind == "client" else list(classes)
    ids = []
    for word in words:
        if word.isdecimal() and int(word) < len(names):
            ids.append(int(word))
        elif word in names:
            ids.append(names.index(word))
        else:
            numbers = f"0 to {len(names) - 1}"
            known = f"clients are {numbers}"
            if kind == "class":
                known = f"by number {numbers}, or by name: {nearest(word, names)}"
            raise UserError(f"--{kind} {word}: there is no such {kind}; {known}")
    chosen = tuple(sorted(set(ids)))
    counts = data.class_counts().sum(0)
    nobody = [names[i] for i in chosen if kind == "class" and not counts[i]]
    if nobody:
        raise UserError(f"--class {nobody[0]}: no client has samples of it; there is nothing to forget")
    unmeasured = set(chosen) - set(np.unique(data.arrays.test_y).tolist()) if kind == "class" else set()
    if unmeasured:
        raise UserError(
            f"--class {names[min(unmeasured)]}: there are no test samples of it, so forgetting could not be "
            "measured"
        )
    old = set(origin.before(kind)) & set(chosen)
    if old:
        raise UserError(f"{kind} {min(old)} is left out of {origin.run.folder} already")
    if len(chosen) + len(origin.before(kind)) >= len(names):
        raise UserError(f"nothing would be left: that is every {kind} there is")
    return Request(kind, chosen)
