"""How numbers and a finished run look on a terminal (80 columns, quiet, aligned)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

_BLOCKS = "▁▂▃▄▅▆▇█"
_NOT_FINITE = "×"
_NO_BASELINES = ("accuracy_start", "accuracy_spread", "accuracy_worst")
_UNMEASURED = "_unmeasured"  #: `messages.UNMEASURED`; that module takes long to import


def human_bytes(count: float) -> str:
    """`1234567` -> `"1.2 MB"` (decimal units)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def human_seconds(seconds: float) -> str:
    """`0.43` -> `"0.4 s"`, `192` -> `"3 min 12 s"`, `7500` -> `"2 h 05 min"`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def plural(count: int, noun: str) -> str:
    """`1 round`, `2 rounds`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def human_traffic(up: float, down: float) -> str:
    """Bytes sent by clients and to clients."""
    return f"↑ {human_bytes(up)}  ↓ {human_bytes(down)}"


def sparkline(values: Sequence[float], width: int = 24, span: tuple[float, float] | None = None) -> str:
    """A curve in one line of block characters.

    Args:
        values: the curve; more values than `width` are averaged in groups. A group with NaN or infinity in
            it is a cross.
        width: longest line.
        span: values of the lowest and the highest block (default: those of the curve).
    """
    if not values:
        return ""
    columns = min(width, len(values))
    edges = [len(values) * i // columns for i in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = span or extent(means)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_block((v - low) * scale) for v in means)


def _block(height: float) -> str:
    if not math.isfinite(height):
        return _NOT_FINITE
    return _BLOCKS[max(0, min(len(_BLOCKS) - 1, round(height)))]


def extent(values: Iterable[float]) -> tuple[float, float]:
    """Smallest and largest of the finite values; 0 and 1 where there are none."""
    finite = [value for value in values if math.isfinite(value)]
    return (min(finite), max(finite)) if finite else (0.0, 1.0)


def spread(values: Iterable[float | str | None], form: str = "{:.3f}", deviation: str = "{:.3f}") -> str:
    """Mean ± sample standard deviation of the finite values; the others are counted: `0.912 ± 0.004 (1 nan)`.

    Args:
        values: numbers, as they are or as JSON has them ("NaN"; older files: null).
        form: of the mean.
        deviation: of the deviation, which is left out where there is one value.
    """
    numbers = [math.nan if value is None else float(value) for value in values]
    finite = [number for number in numbers if math.isfinite(number)]
    odd = [str(number) for number in numbers if not math.isfinite(number)]
    parts = [form.format(statistics.mean(finite))] if finite else []
    if len(finite) > 1:
        parts.append(f"± {deviation.format(statistics.stdev(finite))}")
    if odd:
        counts = ", ".join(f"{odd.count(word)} {word}" for word in dict.fromkeys(odd))
        parts.append(f"({counts})" if finite or len(odd) > 1 else odd[0])
    return " ".join(parts)


def measured(history: Iterable[Mapping[str, Any]], key: str = "accuracy") -> list[Mapping[str, Any]]:
    """The rows of metrics.jsonl whose rounds measured something."""
    return [row for row in history if row.get(key) is not None]


def curve(history: Iterable[Mapping[str, Any]], key: str = "accuracy") -> list[float]:
    """One metric over the rounds that measured it, from the rows of metrics.jsonl."""
    return [float(row[key]) for row in measured(history, key)]


def baselines_of(summary: Mapping[str, Any]) -> dict[str, float]:
    """Baseline -> accuracy, from a run's closing object (`accuracy_local_only` -> `local-only`)."""
    return {
        key.removeprefix("accuracy_").replace("_", "-"): float(value)
        for key, value in summary.items()
        if key.startswith("accuracy_") and key not in _NO_BASELINES and not key.endswith(_UNMEASURED)
    }


def is_attack(key: str) -> bool:
    """Whether a key of a summary says how well attackers read an attribute."""
    return key.startswith(("attack_", "audit_")) and not key.endswith("_error")


def attacks_of(summary: Mapping[str, Any]) -> list[str]:
    """What says how well attackers read an attribute at the cut: `attack_mlp_gender`, `audit_gender_mlp`."""
    return [key for key in summary if is_attack(key) and "@" not in key]


def chance_of(summary: Mapping[str, Any], key: str) -> float:
    """What an attacker who knows nothing reaches, for a key of `attacks_of`."""
    if key.startswith("attack_"):  # attack_KIND_NAME
        name = key.split("_", 2)[2]
    else:  # audit_NAME_KIND
        name = key.removeprefix("audit_").rpartition("_")[0]
    return float(summary[f"chance_{name}"])


def grid() -> Table:
    """The borderless table that everything on the screen uses."""
    from rich.table import Table

    return Table.grid(padding=(0, 2))


def closing_table(summary: Mapping[str, Any], history: Iterable[Mapping[str, Any]]) -> Table:
    """What a finished run achieved: start → end, baselines, bytes, seconds."""
    table = grid()
    table.add_column(style="dim", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(style="cyan", no_wrap=True)
    rows = list(history)
    change = f"{summary['accuracy_start']:.3f} → [bold]{summary['accuracy']:.3f}[/]"
    table.add_row("accuracy", change, f"{sparkline(curve(rows))}{_left_out(summary, 'accuracy')}")
    for name in ("local", "base", "new"):
        if f"{name}_accuracy" in summary:
            start, end = summary[f"{name}_accuracy_start"], summary[f"{name}_accuracy"]
            worst = summary.get(f"{name}_accuracy_worst")
            beside = "" if worst is None else f"worst client {worst:.3f}"
            beside += _left_out(summary, f"{name}_accuracy")
            table.add_row(f"{name} test", f"{start:.3f} → {end:.3f}", beside)
    for name, accuracy in baselines_of(summary).items():
        mean = " mean" if name == "local-only" else ""
        left_out = _left_out(summary, f"accuracy_{name.replace('-', '_')}")
        table.add_row(f"{name}{mean}", f"        {accuracy:.3f}", left_out)
    for key in attacks_of(summary):
        seen = curve(rows, key)
        before = f"{seen[0]:.3f} → " if len(seen) > 1 else "        "
        chance = f"[dim]chance {chance_of(summary, key):.3f}[/]"
        beside = f"{sparkline(seen)}  {chance}" if len(seen) > 1 else chance
        table.add_row(key.replace("_", " "), f"{before}{summary[key]:.3f}", beside)
    table.add_row("loss", f"        {summary['loss']:.3f}")
    table.add_row("sent up", human_bytes(summary["bytes_up"]))
    table.add_row("sent down", human_bytes(summary["bytes_down"]))
    table.add_row("time", human_seconds(summary["seconds"]))
    if "not_finite" in summary:
        table.add_row("not finite", f"        {plural(summary['not_finite'], 'figure')}", "see metrics.jsonl")
    return table


def _left_out(summary: Mapping[str, Any], key: str) -> str:
    """How many clients a mean leaves out, where it does."""
    count = summary.get(key + _UNMEASURED)
    return "" if count is None else f"  {plural(count, 'client')} not measured"
