"""What every command has: a console, quiet libraries, and errors that end in one line.

Nothing heavy is imported here: the command line imports this module before it knows the command.
"""

from __future__ import annotations

import logging
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import typer

from fedsim.errors import UserError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from fedsim.config import Experiment
    from fedsim.hooks import Hook

_CHATTY = ("ray", "torch", "datasets", "transformers", "matplotlib", "tensorboard")


class Session:
    """One command: where it prints, how quiet libraries are, and how errors end it.

    A UserError is one line and exit code 2, Ctrl-C is exit code 130, anything else exit code 1.

    Attributes:
        on_interrupt: what Ctrl-C prints.
    """

    def __init__(self, *, debug: bool, verbose: bool = False, on_stderr: bool = False) -> None:
        from rich.console import Console

        self.debug = debug
        self.verbose = verbose
        self.console = Console(stderr=on_stderr)
        self.on_interrupt = "interrupted"
        self._quiet = ExitStack()

    def __enter__(self) -> Self:
        if not self.verbose:
            self._quiet.enter_context(_silence())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._quiet.close()
        if isinstance(error, KeyboardInterrupt):
            self._say(self.on_interrupt)
            raise typer.Exit(130) from None
        if not isinstance(error, Exception) or isinstance(error, typer.Exit | BrokenPipeError):
            return
        if self.debug:
            traceback.print_exception(error)
        ours = isinstance(error, UserError)
        hint = "" if self.debug else " (use --debug for the traceback)"
        first = str(error).splitlines()[0] if str(error) else ""
        self._say(f"error: {error}" if ours else f"error: {type(error).__name__}: {first}{hint}")
        for note in getattr(error, "__notes__", ()):  # what went wrong before, which may be the cause
            self._say(note)
        raise typer.Exit(2 if ours else 1) from None

    def note(self, text: str) -> None:
        """One line that the user should know."""
        from rich.markup import escape

        self.console.print(f"[yellow]note[/]  {escape(text)}", highlight=False, soft_wrap=True)

    def facts(self, pairs: Mapping[str, str]) -> None:
        """Aligned `label  value` lines; values are never wrapped, so that paths can be copied."""
        from rich.markup import escape

        for label, value in pairs.items():
            self.console.print(f"[dim]{label:<10}[/]  {escape(value)}", highlight=False, soft_wrap=True)

    def loading(self, what: str, *, aside: bool = False) -> AbstractContextManager[Any]:
        """The first sign of life: importing torch and Flower takes many seconds on a slow machine.

        Args:
            what: is done, or with what.
            aside: on stderr, for commands whose output is a table or another program's.
        """
        from rich.console import Console
        from rich.markup import escape

        console = Console(stderr=True) if aside else self.console
        if console.is_terminal:
            return console.status(f"{escape(what)}  [dim]loading torch and Flower[/]")
        console.print(f"{what}: loading torch and Flower", markup=False, highlight=False, soft_wrap=True)
        return nullcontext()

    @contextmanager
    def watching(self, experiment: Experiment) -> Iterator[Sequence[Hook]]:
        """The hooks that show a run: live on a terminal, plain lines elsewhere (and under --verbose)."""
        from fedsim import _flwr
        from fedsim.progress import LiveHook, PlainHook

        with _flwr.quiet(not self.verbose):
            if self.console.is_terminal and not self.verbose:
                with LiveHook(self.console, experiment) as hook:
                    yield [hook]
            else:
                yield [PlainHook(self._plain, experiment)]

    def _plain(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


@contextmanager
def _silence() -> Iterator[None]:
    """No warnings and no log lines below ERROR from libraries."""
    before = {name: logging.getLogger(name).level for name in _CHATTY}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in _CHATTY:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in before.items():
                logging.getLogger(name).setLevel(level)
