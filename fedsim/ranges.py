"""Annotated types for keys of experiment files, so that a signature states its ranges once."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt

Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
Share = Annotated[float, Gt(0), Le(1)]  #: (0, 1]
Portion = Annotated[float, Ge(0), Lt(1)]  #: [0, 1)
Fraction = Annotated[float, Ge(0), Le(1)]  #: [0, 1]
