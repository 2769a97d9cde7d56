"""What the pyproject.toml of a Flower app says, and how a user of `flwr run` changes it."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim.errors import UserError
from fedsim.files import text_of
from fedsim.overrides import dotted, pair

#: `a=1 b="two words" c='x'`, as Flower takes it
_PAIR = re.compile(r"""([^\s=]+)\s*=\s*("[^"]*"|'[^']*'|[^\s"']+)(?:\s+|$)""")


@dataclass(frozen=True)
class Project:
    """A Flower app's pyproject.toml.

    Attributes:
        file: where it is.
        tables: what it says.
        config: `[tool.flwr.app.config]`, flat.
    """

    file: Path
    tables: Mapping[str, Any]
    config: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Project:
        """The one in a folder.

        Raises:
            UserError: there is none, or it is not that of a Flower app.
        """
        file = folder / "pyproject.toml"
        try:
            tables = tomllib.loads(text_of(file))
        except FileNotFoundError:
            tables = {}
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"{file}: not valid TOML: {error}") from error
        if "app" not in tables.get("tool", {}).get("flwr", {}):
            raise UserError(f"{folder} holds no Flower app (no pyproject.toml with [tool.flwr.app])")
        return cls(file, tables, dotted(tables["tool"]["flwr"]["app"].get("config", {})))

    @property
    def requires(self) -> str:
        """The Flower that it names among its dependencies, or ""."""
        named = self.tables.get("project", {}).get("dependencies", [])
        return next((text for text in named if re.match(r"flwr(?![\w.-])", text)), "")

    def part(self, name: str) -> str:
        """`"module:object"` of its `serverapp` or `clientapp`.

        Raises:
            UserError: it does not say.
        """
        reference = self.tables["tool"]["flwr"]["app"].get("components", {}).get(name, "")
        if ":" not in str(reference):
            raise UserError(f'{self.file}: [tool.flwr.app.components] needs {name} = "module:object"')
        return str(reference)

    def lacks(self, key: str) -> str:
        """What to say of an unknown key."""
        return f"the app in {self.file.parent} has no key '{key}'"

    def values(self, text: str) -> list[tuple[str, Any]]:
        """Keys and values of a `--run-config`.

        Raises:
            UserError: it is neither pairs nor a TOML file, or a value is none that Flower knows.
        """
        if text.endswith(".toml") and "=" not in text:
            found = list(self._of_file(Path(text)).items())
        else:
            end, found = 0, []
            for match in _PAIR.finditer(text.strip()):
                if match.start() != end:
                    break
                end = match.end()
                found.append(pair(match[0], "--run-config"))
            if end < len(text.strip()) or not found:
                rest = text.strip()[end:]
                raise UserError(f"--run-config {text}: '{rest}' is no KEY=VALUE (nor a .toml file)")
        return [(key, self.checked(key, value)) for key, value in found]

    def _of_file(self, file: Path) -> dict[str, Any]:
        try:
            return dotted(tomllib.loads(text_of(file)))
        except FileNotFoundError as error:
            raise UserError(f"--run-config {file}: there is no such file") from error
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"--run-config {file}: not valid TOML: {error}") from error

    def checked(self, key: str, value: Any) -> Any:
        """A value for the app's config.

        Raises:
            UserError: Flower's configs do not hold its like.
        """
        if not isinstance(value, bool | int | float | str):
            raise UserError(
                f"'{key}' of the app in {self.file.parent}: a Flower app's values are numbers, true, false "
                f"or text, not {type(value).__name__}"
            )
        return value

    # ------------------------------------------------------------------- [tool.flwr.federations]

    def nodes(self) -> int:
        """`num-supernodes` of the federation that is simulated by default.

        Raises:
            UserError: it does not say.
        """
        count = self._simulation().get("num-supernodes")
        if type(count) is not int or count < 1:
            raise UserError(f"how many nodes? fedsim run {self.file.parent} --clients 10")
        return count

    def resources(self, engine: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """The engine's options for the `client-resources`, and what to tell the user about them.

        Args:
            engine: options that the user gave; they win.
        """
        wanted = self._simulation().get("backend", {}).get("client-resources", {})
        given = {"threads": wanted.get("num-cpus", 1), "gpu_fraction": wanted.get("num-gpus", 0)}
        usual = {"threads": 1, "gpu_fraction": 0}
        options = {k: value for k, value in given.items() if value != usual[k] and k not in engine}
        if not options:
            return {}, []
        where = f"the client-resources in {self.file}"
        if engine["name"] != "ray":
            return {}, [f"{where} are for workers with resources of their own: --set engine.name=ray"]
        for key, value in options.items():
            fits = type(value) is int and value > 0 if key == "threads" else 0 <= value <= 1
            if not fits:
                raise UserError(f"{where}: {value} is no engine.{key}; give one with --set engine.{key}=1")
        text = ", ".join(f"engine.{key}={value}" for key, value in options.items())
        return options, [f"{text}, from {where}"]

    def _simulation(self) -> dict[str, Any]:
        """The options of the default federation, or of the only one; all keys with hyphens."""
        tables = self.tables["tool"]["flwr"].get("federations", {})
        federations = {name: table for name, table in tables.items() if isinstance(table, dict)}
        only = next(iter(federations)) if len(federations) == 1 else ""
        chosen = federations.get(tables.get("default", only), {})
        options = _hyphened(chosen.get("options", {}))
        assert isinstance(options, dict)
        return options


def _hyphened(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key.replace("_", "-"): _hyphened(inner) for key, inner in value.items()}
