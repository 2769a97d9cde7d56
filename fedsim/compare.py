"""Finished runs side by side: what they reached, and the experiment keys in which they differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedsim.errors import UserError
from fedsim.overrides import dotted
from fedsim.runs import Run
from fedsim.terminal import (
    attacks_of,
    chance_of,
    curve,
    extent,
    grid,
    human_bytes,
    human_seconds,
    measured,
    sparkline,
)

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Group
    from rich.table import Table

_MISSING = "–"


def comparison(runs: Sequence[Run]) -> Group:
    """Everything `fedsim compare` shows.

    Raises:
        UserError: fewer than two runs, or one that is not finished.
    """
    from rich.console import Group
    from rich.text import Text

    if len(runs) < 2:
        raise UserError("nothing to compare with; give two run folders: fedsim compare runs/a runs/b")
    summaries = [run.summary() for run in runs]
    labels = labels_of(runs)
    parts: list[Any] = [_results(labels, summaries), Text(), _curves(labels, runs)]
    if attacks := dict.fromkeys(key for summary in summaries for key in attacks_of(summary)):
        parts += [Text(), _attacks(labels, summaries, list(attacks))]
    documents = [run.experiment().document() for run in runs]
    for document in documents:
        document.pop("name")
    found = differing(documents)
    if found:
        parts += [Text(), _settings(labels, found)]
    else:
        parts += [Text(), Text("the experiments are the same", style="dim")]
    same = len({(summary["digest"], summary.get("digest_personal")) for summary in summaries}) == 1
    parts += [Text(), Text(f"final states: {'identical' if same else 'different'}", style="dim")]
    return Group(*parts)


def draw_curves(runs: Sequence[Run], path: Path) -> None:
    """A picture of runs as PNG: accuracy against rounds, and against the bytes that clients sent.

    Args:
        runs: finished or not.
        path: the file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    by_round, by_bytes = figure.subplots(1, 2, sharey=True)
    for label, run in zip(labels_of(runs), runs, strict=True):
        rows = measured(run.history())
        accuracy = [row["accuracy"] for row in rows]
        by_round.plot([row["round"] for row in rows], accuracy, marker=".", label=label)
        by_bytes.plot([row["bytes_up"] / 1e6 for row in rows], accuracy, marker=".")
    by_round.set(xlabel="round", ylabel="accuracy")
    by_bytes.set(xlabel="megabytes that clients sent")
    by_bytes.set_xscale("symlog", linthresh=0.1)
    by_round.legend(frameon=False)
    figure.savefig(path, dpi=120)


def labels_of(runs: Sequence[Run]) -> list[str]:
    """Folder names, with as many parents as it takes to tell the runs apart."""
    paths = [run.folder.resolve().parts for run in runs]
    for depth in range(1, max(map(len, paths)) + 1):
        labels = ["/".join(parts[-depth:]) for parts in paths]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{parts[-1]} ({number})" for number, parts in enumerate(paths, start=1)]  # a run given twice


def differing(documents: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Dotted keys whose values are not all equal -> the value of each document (None: it has no such key)."""
    flat = [dotted(document) for document in documents]
    keys = dict.fromkeys(key for one in flat for key in one)
    values = {key: [one.get(key) for one in flat] for key in keys}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


def _results(labels: Sequence[str], summaries: Sequence[Mapping[str, Any]]) -> Table:
    table = grid()
    table.add_column("run", overflow="ellipsis", no_wrap=True, max_width=20)
    for name in ("accuracy", "loss", "up", "down", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("digest", no_wrap=True, style="dim")
    table.show_header = True
    table.header_style = "dim"
    for label, summary in zip(labels, summaries, strict=True):
        table.add_row(
            label,
            f"{summary['accuracy_start']:.3f} → [bold]{summary['accuracy']:.3f}[/]",
            f"{summary['loss']:.3f}",
            human_bytes(summary["bytes_up"]),
            human_bytes(summary["bytes_down"]),
            human_seconds(summary["seconds"]),
            summary["digest"][:8],
        )
    return table


def _attacks(labels: Sequence[str], summaries: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> Table:
    """What attackers read of attributes, by run."""
    table = grid()
    table.show_header = True
    table.header_style = "dim"
    table.add_column("balanced accuracy", no_wrap=True)
    for label in labels:
        table.add_column(label, overflow="ellipsis", no_wrap=True, max_width=20)
    table.add_column("chance", style="dim")
    for key in keys:
        chance = next(f"{chance_of(summary, key):.3f}" for summary in summaries if key in summary)
        found = (f"{summary[key]:.3f}" if key in summary else _MISSING for summary in summaries)
        table.add_row(key.replace("_", " "), *found, chance)
    return table


def _curves(labels: Sequence[str], runs: Sequence[Run]) -> Table:
    """Accuracy against rounds, all on one scale."""
    curves = [curve(run.history()) for run in runs]
    span = extent(value for one in curves for value in one)
    table = grid()
    table.add_column(overflow="ellipsis", no_wrap=True, max_width=20)
    table.add_column(style="cyan", no_wrap=True)
    for label, one in zip(labels, curves, strict=True):
        table.add_row(label, sparkline(one, 50, span))
    table.add_row("", f"[dim]accuracy by round, from {span[0]:.3f} to {span[1]:.3f}[/]")
    return table


def _settings(labels: Sequence[str], found: Mapping[str, Sequence[Any]]) -> Table:
    table = grid()
    table.show_header = True
    table.header_style = "dim"
    table.add_column("key", no_wrap=True)
    for label in labels:
        table.add_column(label, overflow="fold", max_width=24)
    for key, values in found.items():
        table.add_row(key, *(_text(value) for value in values))
    return table


def _text(value: Any) -> str:
    if value is None:
        return _MISSING
    return value if isinstance(value, str) else json.dumps(value)
