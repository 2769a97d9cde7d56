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
import tomllib
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from fedsim.errors import UserError, nearest
from fedsim.files import text_of
from fedsim.overrides import dotted, key_of, once, toml_value


def is_app(folder: Path) -> bool:
    """Whether a folder holds a Flower app (a pyproject.toml with `[tool.flwr.app]`)."""
    return "app" in _document(folder).get("tool", {}).get("flwr", {})


def described(folder: Path, clients: int, overrides: Iterable[str]) -> dict[str, Any]:
    """What the fresh process needs to know.

    Args:
        folder: of the app.
        clients: number of simulated nodes.
        overrides: `engine.KEY=VALUE` for our engine, `seed=N`, or a key of the app's own config.

    Raises:
        UserError: the folder names no server app or client app, or a key is unknown.
    """
    app = _document(folder)["tool"]["flwr"]["app"]
    parts = app.get("components", {})
    for part in ("serverapp", "clientapp"):
        if ":" not in str(parts.get(part, "")):
            raise UserError(
                f'{folder}/pyproject.toml: [tool.flwr.app.components] needs {part} = "module:object"'
            )
    config = dotted(app.get("config", {}))
    engine: dict[str, Any] = {"name": "serial"}
    seed = 0
    for override in once(overrides):
        key, value = key_of(override), toml_value(override.partition("=")[2].strip())
        if key.startswith("engine."):
            engine[key.removeprefix("engine.")] = value
        elif key in config:
            config[key] = value
        elif key == "seed":
            seed = value
        else:
            known = [*config, "engine.name", "seed"]
            raise UserError(
                f"--set {override}: the app in {folder} has no key '{key}': {nearest(key, known)}"
            )
    return {
        "folder": str(folder.resolve()),
        "serverapp": parts["serverapp"],
        "clientapp": parts["clientapp"],
        "clients": clients,
        "engine": engine,
        "seed": seed,
        "config": config,
    }


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

    given = json.loads(text)
    try:
        server_app, client_app = (_object(given[part]) for part in ("serverapp", "clientapp"))
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
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _object(reference: str) -> Any:
    module, _, name = reference.partition(":")
    try:
        found: Any = import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise UserError(f"cannot load '{reference}' ({error}); is what the app needs installed?") from error
    return found


def _document(folder: Path) -> dict[str, Any]:
    file = folder / "pyproject.toml"
    try:
        return tomllib.loads(text_of(file))
    except FileNotFoundError:
        return {}
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{file}: not valid TOML: {error}") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
