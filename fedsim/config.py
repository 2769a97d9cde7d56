"""Experiment = validated text: one TOML file, its overrides, and an error for every mistake.

    x.toml + --set a.b=c ──> plain tables ──> defaults of the strategy ──> every section checked against
    the signature of what its name resolves to ──> Experiment (complete: all defaults filled in)

A section with a `name` is an object of the registry and its other keys are keyword arguments. The
sections without a name (`evaluation`, `checkpoints`, `schedule`, `payload`) are the dataclass-like
functions in `fedsim/settings.py`: their signatures are the schema, too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import tomllib
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim import json_text, registry, settings
from fedsim.errors import UserError, nearest
from fedsim.files import text_of
from fedsim.overrides import applied, dotted, key_of, once

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

#: section -> kind in the registry
NAMED = {
    "data": "datasets",
    "partition": "partitions",
    "model": "models",
    "tuning": "tuning",
    "client": "clients",
    "strategy": "strategies",
    "local": "local",
    "detacher": "detachers",
    "engine": "engines",
}
_TOP = ("name", "seed", "rounds", "baselines")


@dataclass(frozen=True)
class Section:
    """One named section: which object, and its keyword arguments (complete, validated)."""

    name: str
    options: Mapping[str, Any]
    common: Mapping[str, Any] = field(default_factory=dict)

    def table(self) -> dict[str, Any]:
        """The section as in the file."""
        return {"name": self.name, **self.common, **self.options}


class _Source(str):
    """What to blame in a message: the file, or the `--set` that a key came from."""

    def __new__(cls, text: str, overrides: Iterable[str]) -> _Source:
        made = super().__new__(cls, text)
        made.given = {key_of(override): f"--set {override}" for override in overrides}
        return made

    given: dict[str, str]

    def of(self, section: str, key: str = "") -> str:
        """The file, or the override that set `section.key` (or the top-level key `section`)."""
        return self.given.get(f"{section}.{key}" if key else section, str(self))


@dataclass(frozen=True)
class Experiment:
    """A complete, validated experiment. Immutable; `replace` makes a changed one."""

    name: str
    seed: int
    rounds: int
    baselines: tuple[str, ...]
    sections: Mapping[str, Section]
    settings: Mapping[str, Mapping[str, Any]]
    sweep: Mapping[str, list[Any]]
    folders: tuple[str, ...]
    given: Mapping[str, Any]

    def __getitem__(self, section: str) -> Section:
        return self.sections[section]

    @property
    def clients(self) -> int:
        """Number of clients that take part (1 when the data are pooled)."""
        common = self["partition"].common
        return 1 if common["pooled"] else int(common["clients"])

    @property
    def roots(self) -> tuple[Path, ...]:
        """Where relative paths are looked up: the experiment's folders, then the current one."""
        return (*map(Path, self.folders), Path.cwd())

    def build(self, section: str, *platform: Any) -> Any:
        """Call what the section names with the platform's positional arguments and the file's keys."""
        chosen = self.sections[section]
        resolved = registry.resolve(NAMED[section], chosen.name)
        return resolved.target(*platform, **{**resolved.fixed, **chosen.options})

    def function(self, section: str) -> Any:
        """What the section names: a function, or a class."""
        return registry.resolve(NAMED[section], self.sections[section].name).target

    def unsaid(self) -> list[str]:
        """A line for the data and the model, where the file and its overrides name none."""
        return [
            f"no [{section}] is named: taking {section}.name={self[section].name}"
            for section in ("data", "model")
            if "name" not in self.given.get(section, {})
        ]

    def document(self) -> dict[str, Any]:
        """Everything as plain tables (what `experiment.toml` of a run folder holds)."""
        return _without_none(
            {
                "name": self.name,
                "seed": self.seed,
                "rounds": self.rounds,
                "baselines": list(self.baselines),
                **{name: section.table() for name, section in self.sections.items()},
                **{name: dict(values) for name, values in self.settings.items()},
            }
        )

    def toml(self) -> str:
        """The document as TOML text."""
        import tomli_w

        text: str = tomli_w.dumps(self.document())
        return text

    def json(self) -> str:
        """The document and its folders as one line of JSON: what travels inside every instruction."""
        whole = {**self.document(), "folders": self.folders}
        return json.dumps(whole, separators=(",", ":"), sort_keys=True)

    def digest(self) -> str:
        """sha256 (16 hex digits) over everything that can change a result."""
        document = self.document()
        for irrelevant in ("name", "checkpoints", "baselines"):
            document.pop(irrelevant, None)
        document["engine"] = {"threads": document["engine"].get("threads", 1)}
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]

    def replace(self, *overrides: str) -> Experiment:
        """The same experiment with `"a.b=value"` overrides."""
        return from_tables(self.given, source=self.name, folders=self.folders, overrides=overrides)


# ------------------------------------------------------------------------------------- reading


def load(
    where: str | os.PathLike[str] | None = None,
    overrides: Iterable[str] = (),
    *,
    folders: Iterable[Path] = (),
) -> Experiment:
    """Read an experiment by path or by the name of a shipped one (`None`: the quickstart).

    Args:
        where: path of a TOML file, or a shipped name such as `"quickstart"`.
        overrides: `"section.key=value"` strings; values are TOML, bare words are strings.
        folders: where relative paths are looked up (default: the current folder).

    Raises:
        UserError: names the file, the key and the nearest right one.
    """
    overrides = once(overrides)
    path = find(where or "quickstart", folders)
    given = read(path)
    places = (str(path.resolve().parent), *_origin(path), str(Path.cwd()))
    return from_tables(given, source=str(path), folders=places, overrides=overrides)


def _origin(path: Path) -> list[str]:
    """Of the experiment in a run folder: where it was started, and so finds its modules and data."""
    record = path.with_name("origin.json")
    if path.name != "experiment.toml" or not record.is_file():
        return []
    try:
        return [str(folder) for folder in json.loads(text_of(record)).get("folders", [])]
    except ValueError as error:
        raise UserError(f"{record}: damaged ({error})") from error


def read(path: Path) -> dict[str, Any]:
    """The tables of a TOML file; raises UserError where it is none, or holds nothing."""
    try:
        tables = tomllib.loads(text_of(path))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from error
    if not tables:
        raise UserError(
            f"{path} is empty: an experiment names its [data], [model] and [strategy], such as "
            "fedsim run quickstart"
        )
    return tables


def find(where: str | os.PathLike[str], folders: Iterable[Path] = ()) -> Path:
    """The file behind a path or a shipped name."""
    text = os.fspath(where)
    for folder in [*folders] or [Path.cwd()]:
        candidate = folder / text
        if candidate.is_file():
            return candidate
    shipped = shipped_folder()
    by_name = shipped / f"{Path(text).name.removesuffix('.toml')}.toml"
    if by_name.is_file() and Path(text).parent.name in ("", "experiments"):
        return by_name
    names = sorted(path.stem for path in shipped.glob("*.toml"))
    raise UserError(f"no experiment file '{text}'; shipped experiments: {', '.join(names)}")


@cache
def shipped_folder() -> Path:
    """`experiments/`: beside the checkout, or package data of an installed wheel."""
    beside = Path(__file__).resolve().parent.parent / "experiments"
    return beside if beside.is_dir() else Path(__file__).resolve().parent / "experiments"


def from_json(text: str) -> Experiment:
    """The inverse of `Experiment.json` (cached: clients call it once per message)."""
    return _from_json(text)


@cache
def _from_json(text: str) -> Experiment:
    source = "the server's experiment"
    try:
        given = json_text.received(text, source)
    except ValueError as error:
        raise UserError(str(error)) from error
    folders = given.pop("folders", []) if isinstance(given, dict) else None
    if not isinstance(folders, list) or not all(isinstance(folder, str) for folder in folders):
        raise UserError(f"{source} is no table with a list of folders")
    return from_tables(given, source=source, folders=folders)


def from_tables(
    given: Mapping[str, Any], *, source: str, folders: Iterable[str] = (), overrides: Iterable[str] = ()
) -> Experiment:
    """Validate plain tables.

    Args:
        given: top-level keys and sections as in a file.
        source: what to call them in error messages.
        folders: the experiment's own and the current one at that time: appended to `sys.path` so that a
            user's modules are found, and searched for relative paths (of data and weights).
        overrides: as in `load`.
    """
    folders = tuple(folders)
    extend_path(folders)
    overrides = list(overrides)
    tables = applied(given, overrides)
    _check_numbers(tables, _Source(source, overrides))
    explicit = deepcopy(tables)
    source = _Source(source, overrides)
    sweep = _check_sweep(tables.pop("sweep", {}), source)
    known = {*_TOP, *NAMED, *settings.SETTINGS, "sweep"}
    for key in tables:
        if key not in known:
            place = next((g for k, g in source.given.items() if k.split(".")[0] == key), str(source))
            raise UserError(f"{place}: unknown key or section '{key}': {nearest(key, known)}")
    for key in (*NAMED, *settings.SETTINGS):
        if not isinstance(tables.setdefault(key, {}), dict):
            hint = f"set {key}.name" if key in NAMED else f"it is written [{key}]"
            raise UserError(f"{source.of(key)}: '{key}' is a section: {hint}")
    tables["strategy"].setdefault("name", settings.DEFAULT_NAMES["strategy"])
    _fill_strategy_defaults(tables, source)
    sections = {name: _named_section(name, tables[name], source) for name in NAMED}
    fixed = {name: _settings(name, tables[name], source) for name in settings.SETTINGS}
    top = _check(registry.schema(settings.top_keys), {k: tables[k] for k in _TOP if k in tables}, source, "")
    check_name(top["name"], f"{source.of('name')}: name")
    return Experiment(
        name=top["name"],
        seed=top["seed"],
        rounds=top["rounds"],
        baselines=tuple(top.get("baselines", [])),
        sections=sections,
        settings=fixed,
        sweep=sweep,
        folders=folders,
        given=explicit,
    )


def _check_numbers(tables: Mapping[str, Any], source: _Source) -> None:
    """Whole numbers beyond 64 bits, the most that TOML promises: messages cannot carry them."""
    for key, value in dotted(tables).items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, int) and not -(2**63) <= one < 2**63:
                raise UserError(f"{source.of(key)}: {key} = {one}: whole numbers have 64 bits at most")


def _fill_strategy_defaults(tables: dict[str, Any], source: _Source) -> None:
    """A strategy may bring sections of its own (`defaults`); the file's keys win."""
    chosen = _resolve("strategy", tables["strategy"], source)
    for section, values in getattr(chosen.target, "defaults", {}).items():
        mine = tables[section]
        if "name" in values and mine.get("name", values["name"]) != values["name"]:
            if section in getattr(chosen.target, "tied", ()) and ":" not in str(mine["name"]):
                place = source.given.get(f"{section}.name") or source.of("strategy", "name")
                raise UserError(
                    f"{place}: strategy '{chosen.name}' is a method for [{section}] name = "
                    f'"{values["name"]}", not "{mine["name"]}"; set {section}.name={values["name"]}, or '
                    "another strategy"
                )
            continue
        tables[section] = {**values, **mine}
    for section, name in settings.DEFAULT_NAMES.items():
        tables[section].setdefault("name", name)


def _resolve(section: str, values: Mapping[str, Any], source: _Source) -> registry.Resolved:
    name = values["name"]
    if not isinstance(name, str):
        raise UserError(f"{source}: [{section}] name must be a string")
    try:
        return registry.resolve(NAMED[section], name)
    except UserError as error:
        raise UserError(f"{source.of(section, 'name')}: [{section}] {error}") from error


def _named_section(section: str, values: Mapping[str, Any], source: _Source) -> Section:
    resolved = _resolve(section, values, source)
    keys = {key: value for key, value in values.items() if key != "name"}
    common: dict[str, Any] = {}
    known = set(registry.schema(resolved.target).model_fields) - set(resolved.fixed)
    if section in settings.COMMON:
        model = registry.schema(settings.COMMON[section])
        known |= set(model.model_fields)
        own = {key: keys.pop(key) for key in list(keys) if key in model.model_fields}
        common = _check(model, own, source, section)
    where = f"{section}] ({resolved.name}"
    for key in keys:
        if key not in known:
            place = source.of(section, key)
            raise UserError(f"{place}: unknown key '{key}' in [{where}): {nearest(key, known | {'name'})}")
    options = _check(registry.schema(resolved.target), {**keys, **resolved.fixed}, source, section)
    for key in resolved.fixed:
        options.pop(key)
    return Section(name=resolved.name, options=options, common=common)


def _settings(section: str, values: Mapping[str, Any], source: _Source) -> dict[str, Any]:
    return _check(registry.schema(settings.SETTINGS[section]), values, source, section)


def _check(
    model: type[BaseModel], values: Mapping[str, Any], source: _Source, section: str
) -> dict[str, Any]:
    """Validate one table; the first mistake becomes a UserError naming file, section and key."""
    from pydantic import ValidationError

    try:
        checked = model.model_validate(dict(values))
    except ValidationError as error:
        raise UserError(_explain(error, model, source, section)) from error
    return {key: getattr(checked, key) for key in model.model_fields if getattr(checked, key) is not None}


def _explain(error: ValidationError, model: type[BaseModel], source: _Source, section: str) -> str:
    problem = error.errors()[0]
    key = str(problem["loc"][0]) if problem["loc"] else "?"
    blamed = source.of(section, key) if section else source.of(key)
    place = f"{blamed}: [{section}] {key}" if section else f"{blamed}: {key}"
    if problem["type"] == "extra_forbidden":
        return f"{blamed}: unknown key '{key}' in [{section}]: {nearest(key, model.model_fields)}"
    if problem["type"] == "missing":
        return f"{place} is missing; add it to the file or give --set {section}.{key}=..."
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{place}: {message} (got {problem.get('input')!r})"


def _check_sweep(sweep: Any, source: str) -> dict[str, list[Any]]:
    if not isinstance(sweep, dict):
        raise UserError(f"{source}: [sweep] must be a section of 'key' = [values]")
    for key, values in sweep.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{source}: [sweep] '{key}' must be a list of values")
        tables = [value for value in values if isinstance(value, dict)]
        if tables and (len(tables) < len(values) or not all(tables)):
            raise UserError(
                f"{source}: [sweep] '{key}' mixes tables of keys with plain values, or has an empty one"
            )
    return dict(sweep)


# ---------------------------------------------------------------------------------- paths, names


def extend_path(folders: Iterable[str]) -> None:
    """Append folders to `sys.path`, behind everything that is installed (never in front of ours)."""
    sys.path += [entry for entry in dict.fromkeys(folders) if entry not in sys.path and Path(entry).is_dir()]


def check_name(name: str, what: str) -> None:
    """Raise UserError unless `name` is safe as the name of a folder."""
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise UserError(
            f"{what} '{name}' must begin with a letter or digit and go on with letters, digits, . _ + -"
        )


def _without_none(tables: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, Mapping) else value
        for key, value in tables.items()
        if value is not None
    }
