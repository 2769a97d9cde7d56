"""A simulation leaves the process as it was, and does not look at old objects while it runs."""

from __future__ import annotations

import gc
import subprocess
import sys
from typing import Any

import pytest
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedsim import simulate
from fedsim.engine.process import for_rounds
from fedsim.testing import toy_client_app


def test_old_objects_are_passed_over_while_rounds_run() -> None:
    seen: list[int] = []
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        seen.append(gc.get_freeze_count())

    before = len(gc.get_objects())
    simulate(app, toy_client_app(lambda client, arrays, config: (arrays, {})), 1)
    assert seen[0] > 0.9 * before
    assert gc.get_freeze_count() == 0


def test_what_somebody_else_froze_stays_frozen() -> None:
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        with for_rounds():
            made: list[Any] = []
            made.append(made)
        assert gc.get_freeze_count() == frozen
    finally:
        gc.unfreeze()


def test_it_ends_with_an_error_as_well() -> None:
    with pytest.raises(KeyError), for_rounds():
        raise KeyError("x")
    assert gc.get_freeze_count() == 0


def test_a_worker_that_serves_a_second_simulation_forgets_the_first_one() -> None:
    script = """
import weakref, ray.cloudpickle
from dataclasses import replace
from fedsim.engine.surroundings import Surroundings
from fedsim.engine.worker import Setup, Worker

class App:
    def __init__(self):
        self.me = self  # as a function of __main__ is: a cycle

here = Surroundings.here(near=True)
setup = Setup(ray.cloudpickle.dumps(App()), 1, {}, here, 1, 60.0, None, False, False)
worker = Worker()
worker.equip(setup, near=False)
first = weakref.ref(worker.app)
worker.equip(replace(setup), near=False)
print(first() is None)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.split() == ["True"]
