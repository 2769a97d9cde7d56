"""Libraries that load models report on the terminal and to the root logger; a run's terminal is ours."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings, no log records up to WARNING and no progress bars of transformers inside."""
    reports: Any = import_module("transformers.utils.logging")
    disabled, bars = logging.root.manager.disable, reports.is_progress_bar_enabled()
    logging.disable(logging.WARNING)
    reports.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        if bars:
            reports.enable_progress_bar()
