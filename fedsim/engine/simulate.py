"""Run any Flower Message-API app on one of our engines."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedsim import _flwr, registry
from fedsim.engine.grid import BaseGrid
from fedsim.engine.process import for_rounds
from fedsim.engine.tally import Tally
from fedsim.engine.waiting import in_vain
from fedsim.errors import UserError, nearest
from fedsim.seeding import derive_seed, generators_restored, seed_everything

_running = threading.Lock()
_KINDS: dict[str, type] = {"serverapp": ServerApp, "clientapp": ClientApp}


def simulate(
    server_app: ServerApp,
    client_app: ClientApp,
    num_clients: int,
    *,
    engine: str = "serial",
    seed: int = 0,
    run_config: dict[str, Any] | None = None,
    prepare: Callable[[BaseGrid], None] | None = None,
    **engine_options: Any,
) -> Context:
    """Run a Flower ServerApp and ClientApp with simulated clients in this process.

    Messages that failed are counted, and said in a line of the log `fedsim` when the server app has ended.

    Args:
        server_app: any Message-API ServerApp; its main function gets one of our grids.
        client_app: any Message-API ClientApp; clients find `partition-id` and `num-partitions` in
            `context.node_config`.
        num_clients: number of nodes; all exist before the server app starts.
        engine: name of an engine (`fedsim list engines`).
        seed: seeds the server process and every client message; the same seed gives the same run.
        run_config: what both apps find in `context.run_config`.
        prepare: called with the grid before the server app starts.
        **engine_options: keyword arguments of the engine.

    Returns:
        The server's Context.

    Raises:
        UserError: another simulation is running in this process (Flower keeps the identity of a run
            per process), an argument is wrong, or the server waits for more nodes than there are.
        NotEnoughReplies: the server app has ended, but all messages, or all to train, failed.
    """
    context, tally = run_apps(
        server_app,
        client_app,
        num_clients,
        engine=engine,
        seed=seed,
        run_config=run_config,
        prepare=prepare,
        **engine_options,
    )
    tally.close()
    return context


def check_app(found: object, part: str, what: str) -> None:
    """Make sure that something is a server app, or a client app.

    Args:
        found: it.
        part: `serverapp` or `clientapp`.
        what: to call it in the message.

    Raises:
        UserError: it is something else.
    """
    kind = _KINDS[part]
    if isinstance(found, kind):
        return
    hint = f"give an object such as app = {kind.__name__}()"
    if any(isinstance(found, other) for other in _KINDS.values()):
        hint = "are the server app and the client app swapped?"
    named = f"the class {found.__name__}" if isinstance(found, type) else f"a {type(found).__name__}"
    raise UserError(f"{what} is {named}, not a flwr.{part}.{kind.__name__}; {hint}")


def run_apps(
    server_app: ServerApp,
    client_app: ClientApp,
    num_clients: int,
    *,
    engine: str = "serial",
    seed: int = 0,
    run_config: dict[str, Any] | None = None,
    prepare: Callable[[BaseGrid], None] | None = None,
    **engine_options: Any,
) -> tuple[Context, Tally]:
    """`simulate` for a server that judges replies itself: gives back the counts and says nothing of them."""
    check_app(server_app, "serverapp", "server_app")
    check_app(client_app, "clientapp", "client_app")
    if num_clients < 1:
        raise UserError(f"num_clients must be at least 1 (got {num_clients})")
    resolved = registry.resolve("engines", engine)
    known = registry.schema(resolved.target).model_fields
    for key in engine_options:
        if key not in known:
            raise UserError(f"engine '{engine}' has no option '{key}': {nearest(key, known)}")
    if not _running.acquire(blocking=False):
        raise UserError("a simulation is already running in this process; start the second one in its own")
    grid: BaseGrid | None = None
    try:
        run_id = 1 + derive_seed("run", seed, os.getpid()) % (2**31)
        grid = resolved.target(client_app, num_clients, seed, run_config, **engine_options)
        assert grid is not None
        grid.set_run(_flwr.Run.create_empty(run_id))
        if prepare is not None:
            prepare(grid)
        context = _flwr.context(run_id, _flwr.SUPERLINK_NODE_ID, {}, RecordDict(), dict(run_config or {}))
        vain = partial(in_vain, num_clients, "the server waits for more nodes")
        with (
            _flwr.acting_as_server(run_id),
            _flwr.waits_refused(num_clients, vain),
            generators_restored(),
            for_rounds(),
        ):
            seed_everything(derive_seed("server", seed))
            try:
                server_app(grid, context)
                grid.deliver()
            except Exception as error:  # which may be but the consequence
                if losses := grid.tally.losses():
                    error.add_note(f"before that, {losses}")
                raise
        return context, grid.tally
    finally:
        if grid is not None:
            grid.close()
        _running.release()
