"""The run folder: everything that a finished or interrupted experiment leaves.

runs/quickstart/
    experiment.toml     the complete experiment, all defaults filled in
    origin.json         where it was started: modules and relative paths are looked up there; whether on nodes
    metrics.jsonl       one line a round
    clients.jsonl       one line per client and round
    checkpoints/        round-00007.safetensors ..., best.safetensors
    tensorboard/        event files
    baselines/          run folders of the baselines
    updates/            start.safetensors, round-00001.safetensors ... (checkpoints.record_updates)
    state.safetensors   the final shared state   } of a finished run
    summary.json        the closing object       }

Numbers that are not finite are "NaN", "Infinity" and "-Infinity" in all JSON (`fedsim/json_text.py`).
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Message, RecordDict

from fedsim import config, json_text, messages
from fedsim.checkpoints import load, save
from fedsim.config import Experiment
from fedsim.errors import UserError
from fedsim.files import write_atomic
from fedsim.hooks import Hook, Round


def default_folder() -> Path:
    """Where run folders are made: `FEDSIM_RUNS` or `runs` in the current folder."""
    return Path(os.environ.get("FEDSIM_RUNS", "runs")).expanduser()


def found(folder: Path) -> Path:
    """A run folder by path, or by its name in the folder of runs."""
    named = default_folder() / folder
    return named if not folder.exists() and named.is_dir() else folder


_REPLACED = ".replaced"  #: where a new run keeps the one that it replaces, until its end


class Run:
    """One run folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    # ---------------------------------------------------------------------------- make and find

    @classmethod
    def create(cls, experiment: Experiment, parent: Path | None = None) -> Run:
        """Make a new folder named like the experiment (`-2`, `-3`, ... when the name is taken)."""
        parent = parent or default_folder()
        made = cls._unnamed(experiment, parent)
        for folder in _names(parent / experiment.name):
            try:
                made.rename(folder)  # fails where a folder with contents is
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
            else:
                return cls(folder)
        raise AssertionError("unreachable")

    @classmethod
    @contextmanager
    def fresh(
        cls, experiment: Experiment, parent: Path | None = None, *, overwrite: bool = False
    ) -> Iterator[Run]:
        """A new run folder that vanishes again if the run fails before its first round.

        Args:
            overwrite: replace the run of that name; it comes back if the new one fails before its first
                round, and is deleted when the block ends well.

        Raises:
            UserError: what is to be replaced is no run folder, or is in use.
        """
        target = (parent or default_folder()) / experiment.name
        run = cls._replacing(experiment, target) if overwrite and target.exists() else None
        run = run or cls.create(experiment, parent)
        replaced = run.folder / _REPLACED
        try:
            yield run
        except Exception:
            if not (run.folder / "metrics.jsonl").exists():
                if replaced.exists():
                    aside = run.folder.with_name(f".{run.folder.name}.failed")
                    run.folder.rename(aside)
                    (aside / _REPLACED).rename(run.folder)
                    run = cls(aside)
                shutil.rmtree(run.folder, ignore_errors=True)
            raise
        shutil.rmtree(replaced, ignore_errors=True)

    @classmethod
    def _replacing(cls, experiment: Experiment, target: Path) -> Run:
        """A new folder in the place of an old run, which it holds until it is sure to be worth it."""
        with cls.open(target).lock():
            made = cls._unnamed(experiment, target.parent)
            target.rename(made / _REPLACED)
            made.rename(target)
        return cls(target)

    @staticmethod
    def _unnamed(experiment: Experiment, parent: Path) -> Path:
        """Made whole under a hidden name, so that nobody ever sees half a run folder."""
        try:
            parent.mkdir(parents=True, exist_ok=True)
            made = Path(tempfile.mkdtemp(dir=parent, prefix=f".{experiment.name}."))
        except OSError as error:
            raise UserError(
                f"cannot make a run folder in '{parent}': {error.strerror}; give --folder, or set FEDSIM_RUNS"
            ) from error
        (made / "experiment.toml").write_text(experiment.toml(), "utf-8")
        (made / "origin.json").write_text(json.dumps({"folders": experiment.folders}), "utf-8")
        made.chmod(0o755)
        return made

    @classmethod
    def open(cls, folder: Path) -> Run:
        """An existing run folder.

        Raises:
            UserError: it is none.
        """
        for name in ("experiment.toml", "origin.json"):
            if not (folder / name).is_file():
                raise UserError(f"{folder} is no run folder (it has no {name})")
        return cls(folder)

    def experiment(self) -> Experiment:
        """The experiment that this folder records (its modules and data are looked up where they were)."""
        path = self.folder / "experiment.toml"
        folders = self._origin().get("folders", [])
        return config.from_tables(config.read(path), source=str(path), folders=folders)

    @property
    def on_nodes(self) -> bool:
        """Whether clients were nodes, whose data this machine need not have."""
        return bool(self._origin().get("nodes", False))

    def made_on_nodes(self) -> None:
        """Record that clients are nodes."""
        text = json.dumps({**self._origin(), "nodes": True})
        write_atomic(self.folder / "origin.json", text.encode())

    def require_own_data(self, command: str) -> None:
        """Refuse what would train on this machine's data instead of that of the nodes.

        Raises:
            UserError: clients were nodes.
        """
        if self.on_nodes:
            raise UserError(
                f"{self.folder} was made on nodes, which have the clients' data; fedsim {command} would "
                "train on the data of this machine instead: start a new run on the nodes (flwr run)"
            )

    def _origin(self) -> dict[str, Any]:
        return read_json(self.folder / "origin.json")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder, so that no second process writes to it.

        Raises:
            UserError: another process holds it.
        """
        try:
            handle = (self.folder / ".lock").open("w")
        except OSError as error:
            raise UserError(
                f"{self.folder} cannot be written ({error.strerror}); make it writable, or go on with a copy"
            ) from error
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(f"{self.folder} is in use by another process") from error
            yield

    # ------------------------------------------------------------------------------- contents

    @property
    def finished(self) -> bool:
        """True when the run has its summary."""
        return (self.folder / "summary.json").is_file()

    def summary(self) -> dict[str, Any]:
        """The closing object.

        Raises:
            UserError: the run is not finished.
        """
        if not self.finished:
            raise UserError(f"{self.folder} is not finished; fedsim resume {self.folder}")
        return _measured(read_json(self.folder / "summary.json"))

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Mark the run as finished."""
        write_atomic(self.folder / "summary.json", (json_text.dump(summary, indent=2) + "\n").encode())

    def history(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl."""
        return _read_lines(self.folder / "metrics.jsonl")

    def client_rows(self) -> list[dict[str, Any]]:
        """The rows of clients.jsonl."""
        return _read_lines(self.folder / "clients.jsonl")

    # ---------------------------------------------------------------------------- checkpoints

    def checkpoints(self) -> list[Path]:
        """Checkpoint files, oldest first."""
        return sorted((self.folder / "checkpoints").glob("round-*.safetensors"))

    def save_checkpoint(self, server_round: int, tree: dict[str, Any], keep: int) -> None:
        """Write a checkpoint atomically and delete the oldest beyond `keep`."""
        save(self.folder / "checkpoints" / f"round-{server_round:05d}.safetensors", tree)
        for old in self.checkpoints()[:-keep]:
            old.unlink(missing_ok=True)

    def save_best(self, tree: dict[str, Any]) -> None:
        """Keep the state with the best validation loss."""
        save(self.folder / "checkpoints" / "best.safetensors", tree)

    def save_start(self, arrays: ArrayRecord) -> None:
        """Keep the state before the first round, from which recorded updates lead to the last."""
        save(self.folder / "updates" / "start.safetensors", {"arrays": arrays})

    def save_updates(self, server_round: int, sent: RecordDict, replies: list[tuple[int, Message]]) -> None:
        """Keep what each client changed in a round, and how many examples it weighs.

        Args:
            server_round: of the round.
            sent: content of an instruction.
            replies: (client, reply) pairs; error replies are left out.
        """
        tree = {}
        before = messages.views_of(sent.array_records[messages.ARRAYS])
        for client, message in replies:
            if messages.complaint(message, messages.shapes_of(sent.array_records[messages.ARRAYS])) is None:
                after = messages.views_of(message.content.array_records[messages.ARRAYS])
                changed = {k: v - before[k] for k, v in after.items() if v.dtype.kind == "f"}
                examples = message.content.metric_records[messages.METRICS][messages.EXAMPLES]
                tree[client] = {"examples": examples, "update": changed}
        save(self.folder / "updates" / f"round-{server_round:05d}.safetensors", {"clients": tree})

    def updates(self) -> list[Path]:
        """Files of recorded updates, oldest first (without the start)."""
        return sorted((self.folder / "updates").glob("round-*.safetensors"))

    def latest_checkpoint(self) -> tuple[dict[str, Any] | None, list[str]]:
        """The newest checkpoint that can be read, and notices about those that cannot."""
        notices: list[str] = []
        for path in reversed(self.checkpoints()):
            try:
                return load(path), notices
            except UserError as error:
                notices.append(f"{error}; trying the checkpoint before it")
        return None, notices

    def truncate(self, last_round: int) -> None:
        """Forget lines written after the checkpoint of `last_round`."""
        for name in ("metrics.jsonl", "clients.jsonl"):
            path = self.folder / name
            rows = [row for row in _read_lines(path) if row["round"] <= last_round]
            write_atomic(path, "".join(map(_line, rows)).encode())


def _names(base: Path) -> Iterator[Path]:
    yield base
    number = 2
    while True:
        yield base.with_name(f"{base.name}-{number}")
        number += 1


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a run folder.

    Raises:
        UserError: it is damaged.
    """
    try:
        found: dict[str, Any] = json_text.load(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); delete it and resume, or start a new run") from error
    return found


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines; a last line cut off by a crash is dropped."""
    rows: list[dict[str, Any]] = []
    if path.is_file():
        for line in path.read_text("utf-8").splitlines():
            try:
                rows.append(_measured(json_text.load(line)))
            except json.JSONDecodeError:
                break
    return rows


def _measured(row: dict[str, Any]) -> dict[str, Any]:
    """Runs of earlier versions have null for NaN."""
    return {key: math.nan if value is None else value for key, value in row.items()}


class FolderHook(Hook):
    """Writes metrics.jsonl, clients.jsonl and TensorBoard events.

    Args:
        run: the folder.
        half: names that travel as bfloat16, so that a client's bytes add up to the run's.
    """

    def __init__(self, run: Run, half: frozenset[str] = frozenset()) -> None:
        self.run = run
        self.half = half
        #: sort keys and finished line of every reply of the round: a line is a third of a dict
        self._clients: list[tuple[bool, int, int, str]] = []
        self._board: Any = None

    def start(self, experiment: Experiment, first_round: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = first_round if first_round > 0 else None
        self._board = SummaryWriter(str(self.run.folder / "tensorboard"), purge_step=purge)

    def reply(self, server_round: int, phase: str, client: int, message: Message) -> None:
        own: dict[str, Any] = {"round": server_round, "client": client, "phase": phase}
        said: dict[str, Any] = {}
        if message.has_error():
            own["error"] = message.error.reason
        else:
            own["bytes_up"] = messages.nbytes(message.content, self.half)
            for record in message.content.metric_records.values():
                said.update(record.items())
        row = {**own, **{k: v for k, v in said.items() if k not in own}}
        self._clients.append((phase == "evaluate", client, len(self._clients), _line(row)))

    def round(self, result: Round) -> None:
        self._write_clients()
        row = result.row()
        _append(self.run.folder / "metrics.jsonl", [_line(row)])
        for name, value in row.items():
            if name != "round" and isinstance(value, int | float):
                self._board.add_scalar(name, value, result.number)
        self._board.flush()

    def close(self) -> None:
        # replies of a round that was cut off: their errors say why
        self._write_clients()
        if self._board is not None:
            self._board.close()

    def _write_clients(self) -> None:
        """In order of phase and client, in whatever order they answered."""
        self._clients.sort()
        _append(self.run.folder / "clients.jsonl", [line for *_, line in self._clients])
        self._clients = []


def _append(path: Path, lines: Iterable[str]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(lines)


def _line(row: dict[str, Any]) -> str:
    return json_text.dump(row) + "\n"
