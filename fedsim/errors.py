"""The one exception for mistakes of the user: what is wrong, where, and what to do."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from functools import cache

_SHOWN = 20


class UserError(Exception):
    """A mistake that the user can mend; the command line prints it as one line and exits with code 2."""


class UnfitTuning(UserError):
    """A tuning mode has nothing to tune in a model; whoever built the model adds which modes fit."""


class NotEnoughReplies(UserError):
    """Fewer valid client replies than the strategy accepts; the message names every client and reason."""


def listed(names: Iterable[str], most: int = 5) -> str:
    """The first of some names, and how many more there are."""
    known = list(names)
    return ", ".join(known[:most]) + (f", and {len(known) - most} more" if len(known) > most else "")


def listed_clients(clients: Sequence[int], most: int = 10) -> str:
    """`client 3`, `clients 3, 5, and 8 more`."""
    return f"{'client' if len(clients) == 1 else 'clients'} {listed(map(str, clients), most)}"


def close_to(word: str, known: Iterable[str]) -> str | None:
    """The known word that is closest to another (of any case), if one is close at all."""
    plain = {name.lower(): name for name in sorted(known)}
    found = get_close_matches(word.lower(), plain, n=1, cutoff=0.5)
    return plain[found[0]] if found else None


@cache
def warn_once(text: str) -> None:
    """Say something that the user should know, once a process."""
    logging.getLogger("fedsim").warning(text)


def nearest(word: str, known: Iterable[str]) -> str:
    """`"did you mean 'x'?"` for the closest known word (of any case), else the list of known words."""
    names = sorted(known)
    close = close_to(word, names)
    if close is not None:
        return f"did you mean '{close}'?"
    shown = ", ".join(names[:_SHOWN]) + (f", ... ({len(names)} in all)" if len(names) > _SHOWN else "")
    return f"known: {shown}" if names else "nothing is known here"
