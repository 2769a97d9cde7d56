"""Loads what a Flower app names in its pyproject.toml, and says of what it imports in vain where it went."""

from __future__ import annotations

import ast
import linecache
import re
from importlib import import_module
from importlib.metadata import version
from traceback import extract_tb
from typing import Any

from fedsim.engine.simulate import check_app
from fedsim.errors import UserError

_ATTRIBUTE = re.compile(r"module '([\w.]+)' has no attribute '(\w+)'")

#: Flower's public modules, the newest first
_PUBLIC = (
    "flwr.app",
    "flwr.clientapp",
    "flwr.serverapp",
    "flwr.serverapp.strategy",
    "flwr.clientapp.mod",
    "flwr.common",
    "flwr.client",
    "flwr.client.mod",
    "flwr.server",
    "flwr.server.strategy",
    "flwr.server.workflow",
    "flwr.simulation",
)


def loaded(reference: str, part: str, requires: str = "") -> Any:
    """The server app or client app behind `"module:object"`.

    Args:
        reference: of it.
        part: `serverapp` or `clientapp`.
        requires: the Flower that the app names among its dependencies.

    Raises:
        UserError: it cannot be imported, or is something else.
    """
    module, _, name = reference.partition(":")
    what = f"{part} = '{reference}'"
    try:
        found: Any = import_module(module)
    except SystemExit as error:
        raise UserError(
            f"cannot load {what}: a module calls sys.exit({error.code}) when it is imported; what it asks "
            "of a command line must have defaults, or stand behind: if __name__ == '__main__'"
        ) from error
    except (ImportError, AttributeError) as error:
        hint = _gone(error, requires)
        if hint is None and isinstance(error, AttributeError):
            raise  # the app's own mistake, with its traceback
        raise UserError(
            f"cannot load {what} ({error}); {hint or 'is what the app needs installed?'}"
        ) from error
    try:
        for attribute in name.split("."):
            found = getattr(found, attribute)
    except AttributeError as error:
        raise UserError(f"cannot load {what} ({error})") from error
    check_app(found, part, what)
    return found


def _gone(error: ImportError | AttributeError, requires: str) -> str | None:
    """What to say where a name of Flower's is not there; None where it is not Flower's."""
    if isinstance(error, ImportError):
        module, names = error.name or "", _imported(error)
    else:
        found = _ATTRIBUTE.search(str(error))
        module, names = (found[1], [found[2]]) if found else ("", [])
    if module.partition(".")[0] != "flwr":
        return None
    text = (
        f"the installed Flower {version('flwr')} has it no longer, if it ever had: Flower moved its modules "
        "in 1.31 and 1.32"
    )
    there = [f"{name} is in {place}" for name in names if (place := _place(name))]
    if there:
        text += f"; now {', '.join(there)}"
    return f"{text}; the app asks for '{requires}'" if requires else text


def _imported(error: ImportError) -> list[str]:
    """The names in the import statement that failed."""
    frames = [frame for frame in extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    if not frames:
        return []
    try:
        tree = ast.parse("".join(linecache.getlines(frames[-1].filename)))
    except SyntaxError:
        return []
    return [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.lineno == frames[-1].lineno
        for alias in node.names
    ]


def _place(name: str) -> str | None:
    """The public module of Flower that has a name."""
    return next((place for place in _PUBLIC if hasattr(import_module(place), name)), None)
