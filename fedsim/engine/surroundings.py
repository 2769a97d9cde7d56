"""What a module finds around it when it is imported, beside its files: a worker has what the driver has."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True)
class Surroundings:
    """Facts about the driver's process.

    Attributes:
        argv: its `sys.argv`, which modules that parse options at import read.
        path: its `sys.path`, which comes first in a worker, too.
        folder: its current folder; workers go there if they have it.
        environment: its variables, or those of fedsim alone where workers are on other machines.
        filters: of warnings, those of Python's own categories.
        levels: of loggers, by name ("" is the root).
        logs: whether its root logger has a handler.
    """

    argv: tuple[str, ...]
    path: tuple[str, ...]
    folder: str
    environment: Mapping[str, str]
    filters: tuple[tuple[Any, ...], ...]
    levels: Mapping[str, int]
    logs: bool

    @classmethod
    def here(cls, *, near: bool) -> Self:
        """Those of this process.

        Args:
            near: all workers are on this machine.
        """
        loggers = {"": logging.root, **logging.root.manager.loggerDict}
        return cls(
            argv=tuple(sys.argv),
            path=tuple(entry or os.getcwd() for entry in sys.path),
            folder=os.getcwd(),
            environment={k: v for k, v in os.environ.items() if _is_ours(k) or (near and not _is_rays(k))},
            filters=tuple(
                _harmless(entry) for entry in warnings.filters if entry[2].__module__ == "builtins"
            ),
            levels={k: found.level for k, found in loggers.items() if isinstance(found, logging.Logger)},
            logs=logging.root.hasHandlers(),
        )

    def adopt(self, before: Surroundings | None) -> None:
        """Make this process like the driver's.

        Args:
            before: what it adopted for an earlier simulation.
        """
        had = {name for name in os.environ if _is_ours(name)} | {*(before.environment if before else ())}
        for name in had - self.environment.keys():
            os.environ.pop(name, None)
        for name, value in self.environment.items():
            if os.environ.get(name) != value:  # as few as can be: threads of Ray's may be reading them
                os.environ[name] = value
        sys.argv[:] = self.argv
        if os.path.isdir(self.folder):
            os.chdir(self.folder)
        # the driver's order: Ray puts the current folder before PYTHONPATH, where it would win
        sys.path[:] = [*self.path, *(entry for entry in sys.path if entry not in self.path)]
        warnings.resetwarnings()
        warnings.filters.extend(self.filters)  # type: ignore[attr-defined]
        for name, level in self.levels.items():
            logging.getLogger(name).setLevel(level)
        if self.logs and not logging.root.hasHandlers():
            logging.basicConfig(level=self.levels[""])


def _harmless(entry: tuple[Any, ...]) -> tuple[Any, ...]:
    """A filter that shows where the driver's raises: Ray itself warns in workers."""
    return ("default", *entry[1:]) if entry[0] == "error" else entry


def _is_ours(name: str) -> bool:
    return name.startswith("FEDSIM_")


def _is_rays(name: str) -> bool:
    """A variable that Ray sets for each worker."""
    return name.startswith("RAY_") or name.endswith("_VISIBLE_DEVICES")
