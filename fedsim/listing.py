"""What there is to choose from: names, first lines, and (verbose) the keys of every section."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.padding import Padding

from fedsim import config, registry, settings
from fedsim.errors import UserError, nearest
from fedsim.registry import Parameter
from fedsim.terminal import grid

if TYPE_CHECKING:
    from rich.console import Console

    from fedsim.config import Experiment

KINDS = {
    "strategies": "server side of a method: [strategy]",
    "clients": "client side of a method: [client]",
    "models": "backbones: [model]",
    "tuning": "which parameters train and travel: [tuning]",
    "datasets": "where samples come from: [data]",
    "partitions": "which client has which samples: [partition]",
    "engines": "where clients run: [engine]",
    "experiments": "shipped files: fedsim run NAME",
}
_SECTIONS = {kind: section for section, kind in config.NAMED.items()}
#: what stands behind the colon of a prefix name
_PREFIXES = {"npz:": "npz:PATH", "imagefolder:": "imagefolder:PATH"}


@dataclass(frozen=True)
class Entry:
    """One line of a list.

    Attributes:
        name: as it stands in an experiment file.
        text: its first docstring line, or why it cannot be used here.
        keys: of its section.
        usable: False when its import fails.
    """

    name: str
    text: str
    keys: list[Parameter] = field(default_factory=list)
    usable: bool = True


def entries(kind: str) -> list[Entry]:
    """All entries of a kind.

    Raises:
        UserError: there is no such kind.
    """
    if kind not in KINDS:
        raise UserError(f"unknown kind '{kind}': {nearest(kind, KINDS)}")
    if kind == "experiments":
        paths = sorted(config.shipped_folder().glob("*.toml"))
        return [Entry(path.stem, _first_comment(path)) for path in paths]
    return [_entry(kind, name, target) for name, target in registry.table(kind).items()]


def _entry(kind: str, name: str, target: str) -> Entry:
    shown = _PREFIXES.get(name, name)
    try:
        found = registry.load(target)
        keys = registry.describe(found)
        if name.endswith(":"):
            keys = keys[1:]  # the first one is in the name
        return Entry(shown, registry.summary(found), keys)
    except Exception as error:
        # a plug-in may fail in any way; the others are still worth listing
        reason = str(error).splitlines()[0] if str(error) else "no reason given"
        return Entry(shown, f"not usable here: {type(error).__name__}: {reason}", usable=False)


def common_keys(kind: str) -> list[Parameter]:
    """Keys that every entry of a kind has."""
    common = settings.COMMON.get(_SECTIONS.get(kind, ""))
    return registry.describe(common) if common is not None else []


def _first_comment(path: Path) -> str:
    for line in path.read_text("utf-8").splitlines():
        if line.startswith("#"):
            return line.lstrip("# ").strip()
    return ""


# ----------------------------------------------------------------------------------------- display


def show_kinds(console: Console) -> None:
    """The kinds themselves."""
    _show_pairs(console, [(name, escape(text)) for name, text in KINDS.items()])


def show(console: Console, kind: str, *, verbose: bool = False) -> None:
    """Names and first lines; with `verbose` the keys of every entry, too."""
    found = entries(kind)
    if not verbose:
        _show_pairs(console, [(entry.name, _styled(entry)) for entry in found])
        return
    for entry in found:
        console.print(f"[bold]{entry.name}[/]", highlight=False)
        console.print(Padding(_styled(entry), (0, 0, 0, 2)), highlight=False)
        _show_keys(console, entry.keys)
        console.print()
    common = common_keys(kind)
    if common:
        console.print(f"[bold]all {kind}[/]", highlight=False)
        _show_keys(console, common)


def _styled(entry: Entry) -> str:
    return escape(entry.text) if entry.usable else f"[red]{escape(entry.text)}[/]"


def _show_pairs(console: Console, pairs: list[tuple[str, str]]) -> None:
    table = grid()
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    for name, text in pairs:
        table.add_row(name, text)
    console.print(table, highlight=False)


def _show_keys(console: Console, keys: list[Parameter]) -> None:
    if not keys:
        return
    table = grid()
    table.add_column(no_wrap=True, style="cyan")
    table.add_column(style="dim", max_width=30)
    table.add_column()
    for key in keys:
        table.add_row(key.name, escape(f"{key.type}{_default(key)}"), escape(key.doc))
    console.print(Padding(table, (0, 0, 0, 4)), highlight=False)


def _default(key: Parameter) -> str:
    if key.default is inspect.Parameter.empty:
        return " (required)"
    return "" if key.default is None else f" = {_literal(key.default)}"


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


# ------------------------------------------------------------------------------------------- a split


def draw(experiment: Experiment, folder: Path) -> tuple[Iterator[str], Path]:
    """Draw how an experiment's samples are dealt out.

    Returns:
        The lines of a terminal picture, and the PNG that was written into `folder`.
    """
    from fedsim import task
    from fedsim.data.federated import draw_split, split_lines

    data = task.load_data(experiment)
    counts, classes = data.class_counts(), data.arrays.classes
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / f"{experiment.name}-split.png"
    draw_split(counts, classes, picture)
    return iter(split_lines(counts, classes)), picture
