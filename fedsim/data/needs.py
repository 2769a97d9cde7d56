"""Which assets a dataset or model reads: said beside it, so that a run names all that is missing at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from fedsim.config import Experiment

_Function = TypeVar("_Function", bound=Callable[..., object])


def needs(*names: str) -> Callable[[_Function], _Function]:
    """Mark a function of `[data]` or `[model]` with the assets that it always reads."""

    def mark(function: _Function) -> _Function:
        function.assets = names  # type: ignore[attr-defined]
        return function

    return mark


def require(experiments: Iterable[Experiment], sections: Sequence[str]) -> None:
    """Check that all assets of some sections are on this machine, before the first is read.

    Raises:
        UserError: names all that are missing, and the one command that fetches them.
    """
    functions = (experiment.function(section) for experiment in experiments for section in sections)
    wanted = dict.fromkeys(name for function in functions for name in getattr(function, "assets", ()))
    if wanted:
        from fedsim.data import assets

        assets.paths(*wanted)
