"""A simulation leaves the process as it was, and does not look at old objects while it runs."""

from __future__ import annotations

import gc
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
