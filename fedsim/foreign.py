"""Somebody else's Flower app, unchanged, on our engine: `fedsim run FOLDER --clients 100`.

The app runs in a fresh process with its folder first on the module path, so that its modules win, even if
they are called `clients` or `strategies`. It must use Flower's Message API (`ServerApp` with a main
function, `ClientApp` with train / evaluate / query).

    python -m fedsim.foreign '{"folder": ..., "clients": ..., "engine": {...}, "seed": ..., "config": {...}}'
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedsim.errors import UserError, nearest
from fedsim.flower_project import Project
from fedsim.overrides import once, pair


def described(
    folder: Path, clients: int | None, overrides: Iterable[str], run_config: Iterable[str] = ()
) -> dict[str, Any]:
    """What the fresh process needs to know.

    Args:
        folder: of the app.
        clients: number of simulated nodes; None for the number in the app's pyproject.toml.
        overrides: `engine.KEY=VALUE` for our engine, `seed=N`, or a key of the app's own config.
        run_config: keys of the app's own config as `flwr run --run-config` takes them: `"a=1 b='x'"`, or the
            name of a TOML file.

    Returns:
        The description; `notes` are lines that the user should read.

    Raises:
        UserError: the folder names no server app or client app, nobody says how many nodes, or a key is
            unknown.
    """
    project = Project.read(folder)
    config, engine, notes = _chosen(project, overrides, run_config)
    if clients is None:
        clients = project.nodes()
        notes.append(f"{clients} nodes, as {project.file} says; --clients N takes another number")
    options, said = project.resources(engine)
    return {
        "folder": str(folder.resolve()),
        "serverapp": project.part("serverapp"),
        "clientapp": project.part("clientapp"),
        "clients": clients,
        "seed": engine.pop("seed", 0),
        "engine": {**options, **engine},
        "config": config,
        "requires": project.requires,
        "notes": [*notes, *said],
    }


def _chosen(
    project: Project, overrides: Iterable[str], run_config: Iterable[str]
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """The app's config, our engine's options (its seed among them), and what to tell the user about them."""
    own: dict[str, tuple[str, Any]] = {}  #: what was said of keys of the app, and their values
    engine: dict[str, Any] = {"name": "serial"}
    notes = []

    def choose(key: str, value: Any, said: str, known: Iterable[str]) -> None:
        if key not in project.config:
            raise UserError(f"{said}: {project.lacks(key)}: {nearest(key, known)}")
        if own.setdefault(key, (said, value)) != (said, value):
            raise UserError(f"{own[key][0]} and {said} set one key twice; keep one of them")

    for text in run_config:
        for key, value in project.values(text):
            choose(key, value, f"--run-config {key}={value}", project.config)
    for override in once(overrides):
        key, value = pair(override)
        ours = key.removeprefix("engine.")
        if ours == "seed" and type(value) is not int:
            raise UserError(f"--set {override}: a seed is a whole number")
        if ours == "seed" or ours != key:
            engine[ours] = value
        if ours != key:
            if key in project.config:
                notes.append(f"--set {override} is for our engine; --run-config {key}=... is for the app")
        elif key != "seed" or key in project.config:
            value = project.checked(key, value)
            choose(key, value, f"--set {override}", [*project.config, "engine.name", "seed"])
            if key == "seed":
                notes.append(f"--set {override} sets the app's own key 'seed' and the seed of our engine")
    return {**project.config, **{key: value for key, (_, value) in own.items()}}, engine, notes


def launch(description: Mapping[str, Any]) -> int:
    """Run an app in a fresh process, with its output on ours; returns the process's exit status."""
    paths = [description["folder"], *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-u", "-P", "-m", "fedsim.foreign", json.dumps(description)]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:  # it reached the app, too: wait for its clean end
                continue


def main(text: str) -> int:
    """The fresh process."""
    from fedsim.engine.simulate import simulate
    from fedsim.flower_names import loaded

    given = json.loads(text)
    sys.argv[:] = [given["folder"]]  # a module that parses options at import finds none
    try:
        server_app, client_app = (
            loaded(given[part], part, given["requires"]) for part in ("serverapp", "clientapp")
        )
        engine = dict(given["engine"])
        simulate(
            server_app,
            client_app,
            given["clients"],
            engine=engine.pop("name"),
            seed=given["seed"],
            run_config=given["config"],
            **engine,
        )
    except UserError as error:
        if given.get("debug"):
            traceback.print_exc()
        print(f"error: {error}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
