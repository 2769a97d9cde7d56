"""What of a Flower strategy must survive an interruption, for ours and for a stranger's class.

A strategy with `state_dict()` / `load_state_dict()` decides itself. Of any other one it is the instance's
attributes minus its constructor's arguments; a strategy given to the constructor (Flower's differential
privacy wrappers) is followed.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from flwr.serverapp.strategy import Strategy

from fedsim.errors import UserError


def state_of(strategy: Strategy) -> dict[str, Any]:
    """The state as a tree that a checkpoint can hold (or tries to: see `checkpoints.Unstorable`)."""
    own = getattr(strategy, "state_dict", None)
    if own is not None:
        state: dict[str, Any] = own()
        return state
    arguments = constructor_arguments(type(strategy))
    transient = getattr(strategy, "transient", ())
    found: dict[str, Any] = {}
    for name, value in vars(strategy).items():
        if isinstance(value, Strategy):
            found[name] = state_of(value)
        elif name not in arguments and name not in transient:
            found[name] = value
    return found


def restore(strategy: Strategy, state: Mapping[str, Any]) -> None:
    """The inverse of `state_of`."""
    own = getattr(strategy, "load_state_dict", None)
    if own is not None:
        own(state)
        return
    for name, value in state.items():
        inner = getattr(strategy, name, None)
        if isinstance(inner, Strategy):
            restore(inner, value)
        else:
            setattr(strategy, name, value)


def innermost(strategy: Strategy) -> Strategy:
    """The strategy that sums replies up: one that wraps another (differential privacy) hands them on."""
    inner = next((value for value in vars(strategy).values() if isinstance(value, Strategy)), None)
    return strategy if inner is None else innermost(inner)


def constructor_arguments(kind: type) -> set[str]:
    """Names of all constructor parameters along the class's ancestry."""
    return {
        name
        for cls in kind.__mro__
        if "__init__" in vars(cls)
        for name in inspect.signature(vars(cls)["__init__"]).parameters
    }


def require_clients(strategy: Strategy, clients: int) -> None:
    """Say at once what Flower's strategies would wait for for ever.

    Raises:
        UserError: the strategy (or one that it wraps) wants more clients than there are.
    """
    for name in ("min_available_nodes", "min_train_nodes", "min_evaluate_nodes", "min_clients"):
        wanted = getattr(strategy, name, 0)
        if isinstance(wanted, int) and wanted > clients:
            raise UserError(
                f"strategy {type(strategy).__name__} wants {name} = {wanted} clients but "
                f"there are {clients}; set strategy.{name} to {clients} or less, or raise partition.clients"
            )
    for value in vars(strategy).values():
        if isinstance(value, Strategy):
            require_clients(value, clients)
