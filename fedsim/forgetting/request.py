"""What is to be forgotten, and by which finished run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fedsim.config import Experiment
from fedsim.data.classes import Word, positions_of, written
from fedsim.errors import UserError
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


@dataclass(frozen=True)
class Origin:
    """The run that is to forget.

    Attributes:
        run: its folder.
        experiment: the ordinary experiment behind it: of a run that forgot before, the one before that.
        classes: class names of its data, in the order of the labels.
        lineage: of the run itself, where it is the result of forgetting.
    """

    run: Run
    experiment: Experiment
    classes: tuple[str, ...]
    lineage: Mapping[str, Any] = field(default_factory=dict)

    @property
    def state(self) -> Path:
        """The final state."""
        return (self.run.folder / "state.safetensors").resolve()

    def before(self, kind: Kind) -> list[int]:
        """Classes or clients that are forgotten already."""
        ids = {i for one in self.lineage.get("requests", []) if one["kind"] == kind for i in one["ids"]}
        stated = self.experiment.settings["forget"].get(KEYS[kind], [])
        if kind == "class":
            stated = positions_of(stated, self.classes, "[forget] classes")
        return sorted({*ids, *stated})

    def written(self, kind: Kind, ids: Iterable[int]) -> list[Word]:
        """Classes or clients as an experiment file, a folder or the command line names them."""
        return [written(i, self.classes) if kind == "class" else i for i in ids]

    def words(self, request: Request) -> list[str]:
        """What is forgotten, in words."""
        return [self.classes[i] if request.kind == "class" else f"client {i}" for i in request.ids]

    def label(self, request: Request) -> str:
        """`class-9`, `client-3-5`; safe as a part of a folder's name."""
        parts = [request.kind, *map(str, self.written(request.kind, request.ids))]
        return re.sub(r"[^\w.+-]+", "_", "-".join(parts))

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
    from fedsim.building import class_names

    run.require_own_data("forget")
    path = run.folder / LINEAGE
    if not path.is_file():
        return Origin(run, run.experiment(), class_names(run.experiment()))
    lineage = read_json(path)
    if run.experiment().settings["forget"].get("relearn"):
        raise UserError(
            f"{run.folder} learnt again what was forgotten, to measure how fast: forget from "
            f"{lineage['origin']}, or from a method's folder beside it"
        )
    experiment = Run.open(Path(lineage["root"])).experiment()
    return Origin(run, experiment, class_names(experiment), lineage)


def words_of(origin: Origin, kind: Kind, text: str) -> list[str]:
    """The words of `--class` or `--client`, separated by commas; a name that has commas stands alone."""
    if kind == "class" and text in origin.classes:
        return [text]
    return [word.strip() for word in text.split(",") if word.strip()]


def request_of(origin: Origin, kind: Kind, words: Sequence[str]) -> Request:
    """The classes (see `fedsim.data.classes`) or clients that a user named.

    Raises:
        UserError: one that is not there, that has no data or is forgotten already; nothing would be left; or
            the data are not those of the run any more, so that positions may mean other classes.
    """
    from fedsim.building import load_data

    data = load_data(origin.experiment)
    names = data.arrays.classes
    if not words:
        raise UserError(f"--{kind} is empty: say which, for example --{kind} 0")
    _check_same(origin.run, data.arrays.digest)
    ids = positions_of(words, names, "--class") if kind == "class" else _clients(words, data.clients)
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
        which = origin.written(kind, [min(old)])[0]
        raise UserError(f"{kind} {which} is left out of {origin.run.folder} already")
    if len(chosen) + len(origin.before(kind)) >= (len(names) if kind == "class" else data.clients):
        raise UserError(f"nothing would be left: that is every {kind} there is")
    return Request(kind, chosen)


def _check_same(run: Run, digest: str) -> None:
    """Raise UserError if the run's last checkpoint is of other data (of another order of classes, say)."""
    tree, _ = run.latest_checkpoint()
    if tree is not None and tree["identity"]["the data"] != digest:
        raise UserError(
            f"{run.folder}: the data changed since this run, so its classes may be others by now; put the "
            "data back, or run the experiment again"
        )


def _clients(words: Sequence[str], count: int) -> list[int]:
    for word in words:
        if not (word.isdecimal() and int(word) < count):
            raise UserError(f"--client {word}: there is no such client; clients are 0 to {count - 1}")
    return list(map(int, words))
