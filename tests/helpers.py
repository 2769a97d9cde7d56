"""Small experiments that run in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedsim import config
from fedsim.config import Experiment
from fedsim.finish import Result, run_experiment
from fedsim.hooks import Hook, Round
from fedsim.runs import Run

TINY: dict[str, Any] = {
    "name": "tiny",
    "rounds": 3,
    "data": {"name": "digits"},
    "partition": {"name": "iid", "clients": 4, "shots": 4},
    "model": {"name": "mlp", "hidden": 16},
    "client": {"lr": 0.1, "batch_size": 16},
}


def tiny(*overrides: str, **tables: Any) -> Experiment:
    """A tiny experiment with some tables or keys replaced."""
    return config.from_tables({**TINY, **tables}, source="test", overrides=overrides)


def run(experiment: Experiment, folder: Path, *hooks: Hook) -> Result:
    """Run it below `folder`."""
    return run_experiment(experiment, Run.create(experiment, folder), hooks)


class StopAt(Hook):
    """Presses Ctrl-C: when round `number` is finished, or (`reply`) when its second reply arrives."""

    def __init__(self, number: int, *, during: bool = False) -> None:
        self.number, self.during, self.replies = number, during, 0

    def reply(self, server_round: int, phase: str, client: int, message: Any) -> None:
        if self.during and server_round == self.number:
            self.replies += 1
            if self.replies == 2:
                raise KeyboardInterrupt

    def round(self, result: Round) -> None:
        if not self.during and result.number == self.number:
            raise KeyboardInterrupt


#: before a program in a subprocess: those of a background job ignore SIGINT otherwise
HEARS_CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
