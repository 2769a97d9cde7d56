"""How differently a classifier treats the groups of an attribute."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.int64]
_FEWEST = 5  #: samples below which a rate says nothing


def parity_gap(guessed: Codes, groups: Codes) -> float:
    """Demographic parity: largest difference, over classes and pairs of groups, of P(guess = class | group).

    Args:
        guessed: classes [n].
        groups: codes [n]; -1 (not known) is left out.

    Returns:
        NaN where no two groups have enough samples.
    """
    return _largest(_gap(guessed, groups, label) for label in np.unique(guessed))


def odds_gap(guessed: Codes, labels: Codes, groups: Codes) -> float:
    """Equalised odds: the largest parity gap among the samples of one true class."""
    return _largest(parity_gap(guessed[labels == y], groups[labels == y]) for y in np.unique(labels))


def _largest(gaps: Iterable[float]) -> float:
    """Of those that could be measured; NaN where none could."""
    return max((gap for gap in gaps if not math.isnan(gap)), default=math.nan)


def _gap(guessed: Codes, groups: Codes, label: Any) -> float:
    known = [groups == g for g in np.unique(groups[groups >= 0])]
    rates = [float((guessed[own] == label).mean()) for own in known if own.sum() >= _FEWEST]
    return max(rates) - min(rates) if len(rates) > 1 else math.nan
