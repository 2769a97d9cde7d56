"""What there is to choose from: names, first lines, and (verbose) the keys of every section."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.padding import Padding

from fedsim import config, registry, settings
from fedsim.errors import UserError, nearest
from fedsim.files import place_for
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
    "local": "how a backbone is trained in less memory: [local]",
    "detachers": "what takes an attribute out of representations: [detacher]",
    "engines": "where clients run: [engine]",
    "edits": "what fedsim forget does to a model: [strategy.edit]",
    "experiments": "shipped files: fedsim run NAME",
}
_SECTIONS = {kind: section for section, kind in config.NAMED.items()}


@dataclass(frozen=True)
class Entry:
    """One line of a list.

    Attributes:
        name: as it stands in an experiment file.
        text: its first docstring line, or why it cannot be used here.
        more: what else its docstring says, a paragraph each.
        keys: of its section; of a prefix name, first what stands behind the colon.
        usable: False when its import fails.
    """

    name: str
    text: str
    more: list[str] = field(default_factory=list)
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
    try:
        found = registry.load(target)
        keys = registry.describe(found)
        shown = name
        if name.endswith(":"):  # the first key is in the name
            keys[0] = replace(keys[0], name=keys[0].name.upper())
            shown += keys[0].name
        return Entry(shown, registry.summary(found), registry.description(found)[1:], keys)
    except Exception as error:
        # a plug-in may fail in any way; the others are still worth listing
        reason = str(error).splitlines()[0] if str(error) else "no reason given"
        return Entry(name, f"not usable here: {type(error).__name__}: {reason}", usable=False)


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
        for paragraph in (_styled(entry), *map(escape, entry.more)):
            console.print(Padding(paragraph, (0, 0, 0, 2), expand=False), highlight=False)
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
    console.print(Padding(table, (0, 0, 0, 4), expand=False), highlight=False)


def _default(key: Parameter) -> str:
    if key.default is inspect.Parameter.empty:
        return " (required)"
    return " (optional)" if key.default is None else f" = {_literal(key.default)}"


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
    from fedsim import building
    from fedsim.data.federated import draw_split, split_lines

    picture = place_for(folder / f"{experiment.name}-split.png", "--folder")
    data = building.load_data(experiment)
    counts, classes = data.class_counts(), data.arrays.classes
    draw_split(counts, classes, picture)
    card = [f"data: {line}" for line in data.arrays.card()] if data.arrays.notes else []
    return iter([*card, *split_lines(counts, classes)]), picture
