"""server_app and client_app: what `fedsim run`, `flwr run .` and docker compose all execute.

The server resolves the experiment and sends it (about 1 kB) inside each instruction; clients read no
file. On our engines the grid is used as it is, a foreign grid is wrapped in `WireGrid`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedsim import _flwr, config, messages, overrides
from fedsim.config import Experiment
from fedsim.engine.grid import BaseGrid
from fedsim.errors import UserError
from fedsim.hooks import Hook
from fedsim.seeding import derive_seed, seed_everything
from fedsim.version import code_digest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fedsim.building import OwnData
    from fedsim.runs import Run
    from fedsim.task import Task

log = logging.getLogger("fedsim")


# ----------------------------------------------------------------------------------- client


class FederatedClientApp(ClientApp):
    """Hands every message to the client that its experiment names."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _begin_anew, ()

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer one message (see `clients/training.py` for what happens inside)."""
        from fedsim import payload

        instruction = messages.config_of(message)
        if message.metadata.message_type == messages.HELLO:
            mine = _partition_id(context)
            return messages.reply(message, config={messages.CODE: code_digest(), messages.PARTITION: mine})
        if instruction[messages.CODE] != code_digest():
            raise RuntimeError(
                f"this node runs fedsim {code_digest()}, the server {instruction[messages.CODE]!s}; "
                "install the same version on both"
            )
        experiment = config.from_json(str(instruction[messages.EXPERIMENT]))
        told: Any = instruction.get(messages.PARTITION)
        who = _partition_id(context) if told is None else int(told)
        if not 0 <= who < experiment.clients:
            raise RuntimeError(
                f"partition-id {who} is not one of the experiment's {experiment.clients} clients; "
                "check --node-config and partition.clients"
            )
        context.node_config["partition-id"] = who
        with running(
            experiment,
            derive_seed(experiment.seed, instruction[messages.ROUND], message.metadata.message_type, who),
        ):
            path = str(context.node_config.get("data-path", ""))
            text = str(instruction[messages.EXPERIMENT])
            if device := context.node_config.get("device"):
                text = experiment.replace(f"compute.device={device}").json()
            if budget := context.node_config.get("memory-budget"):
                text = with_budget(config.from_json(text), _megabytes(budget)).json()
            task, app = _client(text, _own_data(path, who, instruction) if path else None)
            _same_backbone(task, str(instruction[messages.FROZEN]))
            packed = payload.LAYOUT in message.content
            reply = app(_flwr.with_content(message, payload.unpack(message.content)), context)
            if packed and reply.has_content():
                reply = _flwr.with_content(reply, payload.pack(reply.content, task.half))
            return reply


def _partition_id(context: Context) -> int:
    """The partition id of a node's config, -1 where it has none.

    Raises:
        UserError: it is no whole number.
    """
    said = context.node_config.get("partition-id", -1)
    try:
        return int(str(said))
    except ValueError as error:
        raise UserError(
            f'--node-config: partition-id is {said!r}, not a whole number such as "partition-id=0"'
        ) from error


def _megabytes(said: object) -> float:
    try:
        return float(str(said))
    except ValueError as error:
        raise UserError(
            f'--node-config: memory-budget is {said!r}, not a number of megabytes such as "memory-budget=64"'
        ) from error


def with_budget(experiment: Experiment, megabytes: float) -> Experiment:
    """The experiment on a node with so much memory, which then decides how many blocks it has."""
    document = experiment.document()
    kept = {key: value for key, value in document["local"].items() if key not in ("blocks", "cuts")}
    document["local"] = {**kept, "budgets": [megabytes]}
    return config.from_tables(document, source="this node's memory-budget", folders=experiment.folders)


def _begin_anew() -> ClientApp:
    """The app in a worker process, which must see data and modules as they are now."""
    _forget()
    return client_app


def _forget() -> None:
    from fedsim import building

    building.cached.cache_clear()
    _client.cache_clear()


def _own_data(path: str, who: int, instruction: ConfigRecord) -> OwnData:
    """The node's own data and what the server says of its own."""
    from fedsim.building import OwnData

    classes: Any = instruction[messages.CLASSES]
    attributes, ranges = (str(instruction.get(key, "")) for key in (messages.ATTRIBUTES, messages.RANGES))
    return OwnData(path, who, attributes, ranges, classes=tuple(classes))


@lru_cache(maxsize=2)
def _client(text: str, own: OwnData | None) -> tuple[Task, ClientApp]:
    """Task and client app of an experiment (with the node's own data, if it has some); built once."""
    from fedsim import building

    task = building.cached(text) if own is None else building.cached(text, own)
    if own is not None:
        for line in task.data.arrays.card():
            print(f"data of client {own.client}: {line}", flush=True)
    app: ClientApp = task.experiment.build("client", task)
    return task, app


def _same_backbone(task: Task, expected: str) -> None:
    if expected != task.frozen_digest:
        raise RuntimeError(
            f"the frozen part of this client's model (digest {task.frozen_digest}) is not the server's "
            f"({expected}): the weights of model '{task.experiment['model'].name}' differ"
        )


@contextmanager
def running(experiment: Experiment, seed: int) -> Iterator[None]:
    """Seeded, and with the experiment's thread count, which belongs to the result; threads are restored."""
    import torch

    before = torch.get_num_threads()
    threads = int(experiment["engine"].options.get("threads", 1))
    if before != threads:
        torch.set_num_threads(threads)
    seed_everything(seed)
    try:
        yield
    finally:
        if before != threads:
            torch.set_num_threads(before)


# ----------------------------------------------------------------------------------- server


def make_server_app(
    experiment: Experiment | None = None, run: Run | None = None, hooks: Sequence[Hook] = ()
) -> ServerApp:
    """A ServerApp for one experiment, or (None) for the one that the run config names."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            chosen = experiment if experiment is not None else experiment_of(context.run_config)
            serve(chosen, grid, run, hooks)
        except UserError as error:
            if experiment is None:  # Flower buries the message in a traceback
                print(f"error: {error}", flush=True)
            raise

    return app


def experiment_of(run_config: dict[str, Any] | Any) -> Experiment:
    """The experiment of a Flower run config (`experiment="..." overrides="rounds=3"`).

    A relative path is looked up in the app that Flower unpacked, then among the shipped experiments.
    """
    import sys

    unpacked = [Path(entry) for entry in sys.path if entry and (Path(entry) / "pyproject.toml").is_file()]
    return config.load(
        str(run_config.get("experiment", "quickstart")),
        overrides.split(str(run_config.get("overrides", ""))),
        folders=unpacked or [Path.cwd()],
    )


def serve(experiment: Experiment, grid: Grid, run: Run | None, hooks: Sequence[Hook]) -> None:
    """The server side of one run on any grid; leaves a finished run folder."""
    from fedsim import building
    from fedsim.finish import close
    from fedsim.rounds import Loop
    from fedsim.runs import FolderHook, Run
    from fedsim.wire import WireGrid

    # a second run of this process must see data and modules as they are now
    _forget()
    with running(experiment, derive_seed("server", experiment.seed)):
        task = building.cached(experiment.json())
        strategy = experiment.build("strategy")
        if isinstance(grid, BaseGrid):
            ours: BaseGrid | WireGrid = grid
        else:
            from fedsim.progress import LogHook

            ours = WireGrid(grid, experiment.clients, task.half)
            hooks = [LogHook(), *hooks]
            if experiment.baselines:
                hooks[0].notice(f"baselines ({', '.join(experiment.baselines)}) run under `fedsim run` only")
        run = run or Run.create(experiment)
        if isinstance(ours, WireGrid):
            run.made_on_nodes()
        watchers = [FolderHook(run, task.half), *hooks]
        with run.lock():
            try:
                loop = Loop(strategy, ours, task, run, watchers)
                summary = close(loop, loop.execute())
                for hook in watchers:
                    hook.finish(summary)
            finally:
                for hook in watchers:
                    hook.close()


#: what pyproject.toml names for `flwr run`
server_app = make_server_app()
client_app = FederatedClientApp()

__all__ = ["UserError", "client_app", "make_server_app", "server_app"]
