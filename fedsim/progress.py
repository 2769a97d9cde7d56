"""Watching a run: a live display on a terminal, plain lines elsewhere.

    quickstart  fedtune · tiny-clip · bias · 10 clients

    round      7/15  ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━  3.1 s, 3.9 s left
    clients    4/10  ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━  training
    accuracy  0.812  ▁▂▄▅▆▇█
    loss      0.534  █▅▄▂▁▁▁
    traffic          ↑ 1.2 MB  ↓ 1.2 MB

A hook only stores numbers; the display's own thread draws them a few times a second.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from flwr.app import Message

from fedsim.config import Experiment
from fedsim.hooks import Hook, Round
from fedsim.terminal import grid, human_bytes, human_seconds, human_traffic, plural, sparkline

if TYPE_CHECKING:
    from rich.console import Console, Group

_REFRESHES = 8  #: a second
_NOTICES = 3  #: shown in full a round; the others are counted
_PHASES = {"train": "training", "evaluate": "evaluating"}


@dataclass
class _Board:
    """What is known of one run (the main one, or a baseline) so far."""

    title: str
    details: str
    rounds: int
    baseline: bool = False
    done: int = 0
    phase: str = ""
    answered: int = 0
    expected: int = 0
    accuracies: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    up: int = 0
    down: int = 0
    trained: int = 0
    seconds: float = 0.0
    began: float = field(default_factory=time.monotonic)
    round_began: float = field(default_factory=time.monotonic)
    finished: bool = False

    def add(self, result: Round) -> None:
        """Take over a finished round."""
        self.done = result.number
        self.up, self.down = result.bytes_up, result.bytes_down
        self.answered = self.expected = 0
        self.round_began = time.monotonic()
        if result.number > 0:
            self.trained += 1
            self.seconds += result.seconds
        if result.accuracy is not None:
            self.accuracies.append(result.accuracy)
        loss = result.loss if result.loss is not None else result.train_loss
        if loss is not None:
            self.losses.append(loss)

    def left(self) -> float | None:
        """Seconds to the last round, from the mean of the rounds so far."""
        if not self.trained:
            return None
        mean = self.seconds / self.trained
        spent = time.monotonic() - self.round_began
        return max(0.0, (self.rounds - self.done) * mean - min(spent, mean))


def _board(experiment: Experiment, first_round: int) -> _Board:
    sections = [experiment[name].name for name in ("strategy", "model", "tuning")]
    details = " · ".join([*sections, plural(experiment.clients, "client")])
    return _Board(experiment.name, details, experiment.rounds, done=max(0, first_round - 1))


class _Watcher(Hook, ABC):
    """What the displays share: which run is going on, and a limit on notices."""

    def __init__(self, main: Experiment | None = None) -> None:
        self._main = main.json() if main is not None else None
        self._boards: list[_Board] = []
        self._notices = 0

    def start(self, experiment: Experiment, first_round: int) -> None:
        self._boards.append(_board(experiment, first_round))
        self._boards[-1].baseline = self._main is not None and experiment.json() != self._main
        if first_round > 0 and not self._boards[-1].baseline:
            self.say(f"going on after round {first_round - 1}")

    def data(self, card: Sequence[str]) -> None:
        if not self._boards[-1].baseline:
            for line in card:
                self.say(f"data: {line}")

    def round(self, result: Round) -> None:
        self._boards[-1].add(result)
        if self._notices > _NOTICES:
            self.say(f"and {self._notices - _NOTICES} more of this kind (see clients.jsonl)")
        self._notices = 0

    def notice(self, text: str) -> None:
        self._notices += 1
        if self._notices <= _NOTICES:
            self.say(text)

    def finish(self, summary: dict[str, Any]) -> None:
        self._boards[-1].finished = True

    @abstractmethod
    def say(self, text: str) -> None:
        """Print one line."""


class PlainHook(_Watcher):
    """One plain line a round, for files and pipes; a baseline has one line at its end.

    Args:
        write: gets every line.
        main: the experiment that is run; others that start are its baselines.
    """

    def __init__(self, write: Callable[[str], None], main: Experiment | None = None) -> None:
        super().__init__(main)
        self.write = write

    def start(self, experiment: Experiment, first_round: int) -> None:
        super().start(experiment, first_round)
        board = self._boards[-1]
        if not board.baseline:
            self.write(f"{board.title}: {board.details} · {plural(board.rounds, 'round')}")

    def round(self, result: Round) -> None:
        super().round(result)
        if not self._boards[-1].baseline:
            self.write(round_line(result, self._boards[-1].rounds))

    def finish(self, summary: dict[str, Any]) -> None:
        super().finish(summary)
        if self._boards[-1].baseline:
            took = human_seconds(summary["seconds"])
            self.write(f"{summary['name']}: accuracy {summary['accuracy']:.4f} after {took}")

    def say(self, text: str) -> None:
        self.write(f"note: {text}")


class LogHook(PlainHook):
    """The same lines, flushed one by one: for the log of a server (`flwr run --stream`)."""

    def __init__(self) -> None:
        super().__init__(lambda line: print(line, flush=True))

    def finish(self, summary: dict[str, Any]) -> None:
        super().finish(summary)
        start, end = summary["accuracy_start"], summary["accuracy"]
        self.write(f"finished: accuracy {start:.4f} -> {end:.4f}, digest {summary['digest'][:16]}")
        self.write(f"run folder: {Path(summary['run']).resolve()}")


def round_line(result: Round, rounds: int) -> str:
    """One finished round in at most 80 columns."""
    width = len(str(rounds))
    parts = [f"round {result.number:>{width}}/{rounds}"]
    if result.accuracy is not None:
        parts.append(f"accuracy {result.accuracy:.4f}")
    if result.loss is not None:
        parts.append(f"loss {result.loss:.4f}")
    elif result.train_loss is not None:
        parts.append(f"training loss {result.train_loss:.4f}")
    if result.number > 0:
        asked = result.clients + result.refused
        clients = f"{result.clients}/{asked} clients" if result.refused else plural(asked, "client")
        parts += [clients, f"up {human_bytes(result.bytes_up)}"]
    return "  ".join([*parts, human_seconds(result.seconds)])


class LiveHook(_Watcher):
    """A rich live display; use it as a context manager, it vanishes at the end.

    Args:
        console: where to draw.
        main: the experiment that is run; others that start are its baselines and get a compact line.
    """

    def __init__(self, console: Console, main: Experiment | None = None) -> None:
        from rich.live import Live

        super().__init__(main)
        self.console = console
        self._live = Live(
            get_renderable=self.__rich__, console=console, refresh_per_second=_REFRESHES, transient=True
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def sent(self, server_round: int, phase: str, count: int) -> None:
        board = self._boards[-1]
        board.phase, board.answered, board.expected = phase, 0, count

    def reply(self, server_round: int, phase: str, client: int, message: Message) -> None:
        self._boards[-1].answered += 1

    def say(self, text: str) -> None:
        from rich.markup import escape

        self.console.print(f"[yellow]note[/]  {escape(text)}", highlight=False, soft_wrap=True)

    def __rich__(self) -> Group:
        """The picture of this moment."""
        from rich.console import Group
        from rich.text import Text

        parts: list[Any] = []
        boards = list(self._boards)  # the run's thread may add one meanwhile
        if not boards:
            return Group(Text("loading data and model", style="dim"))
        if not boards[0].baseline:
            main = boards.pop(0)
            title = Text.assemble((main.title, "bold"), "  ", (main.details, "dim"))
            parts += [title, Text(), _rows(main)]
        if boards:
            parts += [Text(), _baseline_rows(boards)]
        return Group(*parts)


def _table() -> Any:
    table = grid()
    table.add_column(style="dim", no_wrap=True, min_width=10)
    table.add_column(justify="right", no_wrap=True, min_width=6)
    table.add_column(no_wrap=True, width=28)
    table.add_column(style="dim", no_wrap=True)
    return table


def _rows(board: _Board) -> Any:
    table = _table()
    table.add_row("round", f"{board.done}/{board.rounds}", _bar(board.done, board.rounds), _clock(board))
    answered, expected = board.answered, board.expected
    if not board.finished:
        count = f"{answered}/{expected}" if expected else ""
        phase = _PHASES.get(board.phase, board.phase) if expected else "evaluating"
        table.add_row("clients", count, _bar(answered, expected), phase)
    for name, values in (("accuracy", board.accuracies), ("loss", board.losses)):
        if values:
            table.add_row(name, f"{values[-1]:.3f}", f"[cyan]{sparkline(list(values), 28)}[/]")
    table.add_row("traffic", "", human_traffic(board.up, board.down))
    return table


def _baseline_rows(boards: list[_Board]) -> Any:
    table = _table()
    for board in boards:
        accuracy = f"accuracy {board.accuracies[-1]:.3f}" if board.accuracies else ""
        count = f"{board.done}/{board.rounds}"
        table.add_row(board.title, count, _bar(board.done, board.rounds), accuracy)
    return table


def _bar(done: int, total: int) -> Any:
    from rich.progress_bar import ProgressBar

    return ProgressBar(total=max(1, total), completed=done, complete_style="cyan", finished_style="cyan")


def _clock(board: _Board) -> str:
    if board.finished:
        return human_seconds(board.seconds)
    left = board.left()
    spent = human_seconds(time.monotonic() - board.began)
    return spent if left is None else f"{spent}, {human_seconds(left)} left"
