"""Many runs from one experiment: every combination of some keys, resumable, with a table at the end.

    runs/quickstart-sweep/
        sweep.json       the base experiment and the grid: what this folder belongs to
        cells/<slug>/    one ordinary run folder per combination
        results.json     a list of {"cell": {key: value}, "summary": {...}, "curve": [...]} (or "error": text)
        table.md         made from results.json alone: mean ± sample standard deviation over seeds

Finished cells are not run again, interrupted ones go on from their checkpoint, failed ones are tried again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

from fedsim import config, json_text
from fedsim.compare import differing
from fedsim.config import Experiment
from fedsim.data import needs
from fedsim.errors import UserError, nearest
from fedsim.files import place_for, write_atomic
from fedsim.finish import run_experiment
from fedsim.hooks import Hook
from fedsim.overrides import toml_value
from fedsim.runs import Run, default_folder
from fedsim.sweep_table import Result, plain, table_of
from fedsim.terminal import baselines_of, measured

#: makes the hooks of one cell and closes them after it
Watch = Callable[["Cell"], AbstractContextManager[Sequence[Hook]]]


@dataclass(frozen=True)
class Cell:
    """One combination of the grid.

    Attributes:
        keys: the grid's keys with this cell's values.
        experiment: the complete experiment, named like the cell's folder.
    """

    keys: Mapping[str, Any]
    experiment: Experiment

    @property
    def label(self) -> str:
        """`seed=0 tuning.name=bias`."""
        return " ".join(f"{key}={plain(value)}" for key, value in self.keys.items())


# ---------------------------------------------------------------------------------------- the grid


def parse_grid(texts: Iterable[str], option: str = "--grid") -> dict[str, list[Any]]:
    """`["seed=0,1", "tuning.name=bias,head"]` -> lists of TOML values (bare words are strings).

    Raises:
        UserError: not of the form KEY=V1,V2, or a key is given twice.
    """
    grid: dict[str, list[Any]] = {}
    for text in texts:
        key, equals, values = (part.strip() for part in text.partition("="))
        if not equals or not key or not values.strip(","):
            raise UserError(f"{option} {text}: expected KEY=VALUE,VALUE, for example {option} seed=0,1,2")
        if key in grid:
            both = f"{option} {key}={','.join(map(plain, grid[key]))} and {option} {text}"
            raise UserError(f"{both} give {key} twice; write all its values in one")
        grid[key] = _values(values)
    return grid


def chosen(only: Mapping[str, Sequence[Any]], cells: Sequence[Cell]) -> set[int]:
    """Numbers of the cells whose keys have one of the given values.

    Raises:
        UserError: there are none.
    """
    found = {
        number
        for number, cell in enumerate(cells)
        if all(cell.keys.get(key) in values for key, values in only.items())
    }
    if not found:
        keys = dict.fromkeys(key for cell in cells for key in cell.keys)
        for key, values in only.items():
            if key not in keys:
                raise UserError(f"--only {key}: cells of this sweep do not set it: {nearest(key, keys)}")
            there = dict.fromkeys(plain(cell.keys[key]) for cell in cells if key in cell.keys)
            if not any(plain(value) in there for value in values):
                asked = f"{key}={','.join(map(plain, values))}"
                raise UserError(f"--only {asked}: no cell has that: {nearest(plain(values[0]), there)}")
        raise UserError(f"--only: no cell is {_words(only)} at once")
    return found


def check_overrides(overrides: Iterable[str], cells: Sequence[Cell]) -> None:
    """Refuse `--set` on a key that every cell sets again.

    Raises:
        UserError: names the key.
    """
    for text in overrides:
        key = text.partition("=")[0].strip()
        if cells and all(key in cell.keys for cell in cells):
            raise UserError(
                f"--set {text}: every cell of this sweep sets {key}; --only {text} runs those that have it"
            )


def _words(grid: Mapping[str, Sequence[Any]]) -> str:
    return " ".join(f"{key}={','.join(map(plain, values))}" for key, values in grid.items())


def _values(text: str) -> list[Any]:
    try:
        found = tomllib.loads(f"x = [{text}]")["x"]
    except tomllib.TOMLDecodeError:
        found = [toml_value(part.strip()) for part in text.split(",") if part.strip()]
    return _distinct(found)


def _distinct(values: Iterable[Any]) -> list[Any]:
    """Each value once: a cell that ran twice would count twice in means and spreads."""
    return list({_toml(value): value for value in values}.values())


def cells_of(base: Experiment, grid: Mapping[str, Sequence[Any]]) -> list[Cell]:
    """All combinations as validated experiments, the last key changing fastest.

    Args:
        base: what all cells share.
        grid: key -> values. A value may be a table of keys that belong together (a mode and its learning
            rate, say); the name above a list of tables is free, `cells` for example.

    Raises:
        UserError: a combination is no valid experiment; the message names it.
    """
    if not grid:
        raise UserError(
            "nothing to sweep over; give --grid KEY=VALUE,VALUE or a [sweep] section in the file, "
            "for example --grid seed=0,1,2"
        )
    cells = []
    axes = [
        [value if isinstance(value, Mapping) else {key: value} for value in _distinct(values)]
        for key, values in grid.items()
    ]
    owners: dict[str, str] = {}
    for axis, values in zip(grid, axes, strict=True):
        for key in dict.fromkeys(key for table in values for key in table):
            if owners.setdefault(key, axis) != axis:
                raise UserError(
                    f"'{owners[key]}' and '{axis}' of this sweep both set {key}; to run some of its cells: "
                    f"--only {key}=VALUE"
                )
    for tables in itertools.product(*axes):
        keys = {key: value for table in tables for key, value in table.items()}
        # a name chooses another object and drops the former one's keys: it goes first
        ordered = sorted(keys.items(), key=lambda pair: not pair[0].endswith(".name"))
        overrides = [f"{key}={_toml(value)}" for key, value in ordered]
        try:
            experiment = base.replace(*overrides, f"name={json.dumps(slug(keys))}")
        except UserError as error:
            raise UserError(f"cell {Cell(keys, base).label}: {error}") from error
        cells.append(Cell(keys, experiment))
    return cells


def slug(keys: Mapping[str, Any]) -> str:
    """A folder name for a cell: readable where it can be, distinct always."""
    text = "_".join(f"{key}-{plain(value)}" for key, value in keys.items())
    safe = re.sub(r"[^A-Za-z0-9.+_-]+", "-", text)
    if safe == text and len(safe) <= 80:
        return safe
    return f"{safe[:70]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _toml(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# --------------------------------------------------------------------------------------- the sweep


class Sweep:
    """A sweep folder.

    Args:
        folder: made if needed.
        base: the experiment that all cells share.
        grid: key -> values.

    Raises:
        UserError: the folder belongs to something else, or a cell is no valid experiment.
    """

    def __init__(self, folder: Path, base: Experiment, grid: Mapping[str, Sequence[Any]]) -> None:
        self.folder = folder
        self.cells = cells_of(base, grid)
        document = base.document()
        document.pop("name")
        self._claim({"experiment": document, "grid": {key: list(values) for key, values in grid.items()}})

    @classmethod
    def open(
        cls,
        base: Experiment,
        grid: Mapping[str, Sequence[Any]],
        *,
        name: str | None = None,
        parent: Path | None = None,
    ) -> Sweep:
        """The sweep `name` (default: the experiment's name and `-sweep`) in the folder of runs."""
        chosen = name or f"{base.name}-sweep"
        config.check_name(chosen, "--name")
        merged = {**base.sweep, **grid}
        return cls(place_for((parent or default_folder()) / chosen, "--folder"), base, merged)

    def run(
        self,
        watch: Watch,
        *,
        after: Callable[[int, Cell, Result], None] = lambda number, cell, result: None,
        stop_on_error: bool = False,
        jobs: int = 1,
        only: Mapping[str, Sequence[Any]] | None = None,
    ) -> list[Result]:
        """Run what is not finished; results and table are written after each cell.

        Args:
            only: key -> values: unfinished cells with others are left for later.
            watch: hooks of a cell; not used with several jobs.
            after: told every cell's result, those of earlier calls too.
            stop_on_error: raise what a cell raises, instead of recording it and going on.
            jobs: cells that run side by side, each job in a process of its own.

        Returns:
            One result per cell.

        Raises:
            UserError: data or weights that a cell reads are missing; the message names all of them.
        """
        results: dict[int, Result] = {}

        def done(number: int, result: Result) -> None:
            results[number] = result
            self._write([results[number] for number in sorted(results)])
            after(number + 1, self.cells[number], result)

        with Run(self.folder).lock():
            todo = []
            wanted = chosen(only or {}, self.cells)
            ended = [self._finished(cell) for cell in self.cells]
            left = [self.cells[number].experiment for number in wanted if ended[number] is None]
            needs.require(left, ["data", "model"])
            for number, (cell, found) in enumerate(zip(self.cells, ended, strict=True)):
                if found is not None:
                    done(number, found)
                elif number not in wanted:
                    continue
                elif jobs > 1:
                    todo.append(number)
                else:
                    done(number, _run_cell(cell, self.folder / "cells", watch, stop_on_error=stop_on_error))
            if todo:
                self._run_side_by_side(todo, jobs, done, stop_on_error=stop_on_error)
        return [results[number] for number in sorted(results)]

    def _run_side_by_side(
        self, todo: Sequence[int], jobs: int, done: Callable[[int, Result], None], *, stop_on_error: bool
    ) -> None:
        """Cells in `jobs` processes that stay for the whole sweep: torch is imported once in each."""
        spawn = get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_end_with_parent) as pool:
            parent = self.folder / "cells"
            running = {}
            for number in todo:
                cell = self.cells[number]
                future = pool.submit(
                    _run_apart, dict(cell.keys), cell.experiment.json(), parent, stop_on_error
                )
                running[future] = number
            try:
                for future in as_completed(running):
                    done(running[future], future.result())
            except BrokenProcessPool as error:
                raise UserError(
                    "a process of this sweep was killed (out of memory?); the same command goes on, "
                    "with fewer --jobs if it was the memory"
                ) from error
            except KeyboardInterrupt:
                for child in active_children():  # their cells go on from their checkpoints
                    child.terminate()
                raise
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _finished(self, cell: Cell) -> Result | None:
        run = Run(self.folder / "cells" / cell.experiment.name)
        if not run.finished:
            return None
        summary = run.summary()
        missing = set(cell.experiment.baselines) - set(baselines_of(summary))
        return None if missing else _result(cell, run, summary)

    def _write(self, results: Sequence[Result]) -> None:
        write_atomic(self.folder / "results.json", (json_text.dump(results, indent=2) + "\n").encode())
        write_atomic(self.folder / "table.md", table_of(results).encode())

    def _claim(self, document: dict[str, Any]) -> None:
        """Record what the folder belongs to, or check that it belongs to the same."""
        record = self.folder / "sweep.json"
        text = json.dumps(document, indent=2) + "\n"
        if record.is_file():
            changed = differing([json.loads(record.read_text("utf-8")), json.loads(text)])
            if changed and any(self.folder.glob("cells/*")):
                keys = ", ".join(key.removeprefix("experiment.") for key in changed)
                raise UserError(
                    f"{self.folder} holds another sweep (different: {keys}); give this one its own --name"
                )
            if not changed:
                return
        elif self.folder.is_dir() and any(self.folder.iterdir()):
            raise UserError(f"{self.folder} exists and is no sweep; give --name")
        write_atomic(record, text.encode())


def _run_cell(cell: Cell, parent: Path, watch: Watch, *, stop_on_error: bool) -> Result:
    """Run one cell, or go on with it; what it raises becomes its result unless `stop_on_error`."""
    try:
        run = Run(parent / cell.experiment.name)
        if not run.folder.exists():
            run = Run.create(cell.experiment, parent)
        with watch(cell) as hooks:
            summary = run_experiment(cell.experiment, run, hooks).summary
    except Exception as error:
        if stop_on_error:
            raise
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        return {"cell": dict(cell.keys), "error": f"{kind}{error}"}
    return _result(cell, run, summary)


def _end_with_parent() -> None:
    """A process of a pool would outlive a sweep that is killed."""
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()


def _run_apart(keys: dict[str, Any], text: str, parent: Path, stop_on_error: bool) -> Result:
    """Run one cell in a process of its own, where nobody watches it."""
    cell = Cell(keys, config.from_json(text))
    return _run_cell(cell, parent, lambda _: nullcontext(()), stop_on_error=stop_on_error)


def _result(cell: Cell, run: Run, summary: Mapping[str, Any]) -> Result:
    """What `results.json` keeps of a cell: the run's path is relative to the sweep's folder, the curve is
    [round, bytes sent up so far, accuracy] of every evaluation.
    """
    shown = {**summary, "run": f"cells/{cell.experiment.name}"}
    curve = [[row["round"], row["bytes_up"], row["accuracy"]] for row in measured(run.history())]
    return {"cell": dict(cell.keys), "summary": shown, "curve": curve}
