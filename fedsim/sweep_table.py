"""The table of a sweep: a function of its `results.json` alone, mean ± sample standard deviation by seed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean
from typing import Any

from fedsim.terminal import baselines_of, human_bytes, human_seconds, is_attack, spread

Result = dict[str, Any]

#: accuracies that a summary may have besides those of test and validation set -> column
_OTHER_ACCURACIES = {
    "local_accuracy": "local",
    "local_accuracy_spread": "local spread",
    "local_accuracy_worst": "local worst",
    "local_accuracy_start": "local start",
    "base_accuracy": "base",
    "base_accuracy_start": "base start",
    "new_accuracy": "new",
    "new_accuracy_start": "new start",
    "harmonic_accuracy": "harmonic",
}
#: clients that an accuracy leaves out -> column
_UNMEASURED = {"accuracy_unmeasured": "unmeasured", "local_accuracy_unmeasured": "local unmeasured"}


def plain(value: Any) -> str:
    """A value of a cell as a reader writes it: words bare, all else as TOML has it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def rows_of(results: Sequence[Result]) -> list[dict[str, str]]:
    """One row per combination of all keys but `seed` and `baselines`: column -> text.

    Numbers are mean ± sample standard deviation over the cells of a row (the mean alone for one cell); cells
    whose number is not finite are left out and counted.
    """
    groups: dict[str, list[Result]] = {}
    for result in results:
        keys = {key: value for key, value in result["cell"].items() if key not in ("seed", "baselines")}
        groups.setdefault(json.dumps(keys), []).append(result)
    return [_row(json.loads(keys), group) for keys, group in groups.items()]


def _row(keys: Mapping[str, Any], group: Sequence[Result]) -> dict[str, str]:
    good = [result["summary"] for result in group if "summary" in result]
    row = {key: plain(value) for key, value in keys.items()}
    failed = len(group) - len(good)
    row["n"] = f"{len(good)} ({failed} failed)" if failed else str(len(good))
    row["accuracy"] = spread([s["accuracy"] for s in good])
    held = [s["validation_accuracy"] for s in good if "validation_accuracy" in s]
    if held:
        row["validation"] = spread(held)
    row["start"] = spread([s["accuracy_start"] for s in good])
    for key in dict.fromkeys(key for s in good for key in s if _is_of_attribute(key)):
        row[key.replace("_", " ")] = spread([s[key] for s in good if key in s])
    for key, name in _OTHER_ACCURACIES.items():
        if any(key in s for s in good):
            row[name] = spread([s[key] for s in good if key in s])
    for key, name in _UNMEASURED.items():
        if any(key in s for s in good):
            row[name] = spread((s.get(key, 0) for s in good), "{:g}", "{:.1f}")
    for name in dict.fromkeys(name for s in good for name in baselines_of(s)):
        row[name] = spread([baselines_of(s)[name] for s in good if name in baselines_of(s)])
    measured = [s for s in good if "peak_bytes" in s]
    if measured:
        row["peak"] = human_bytes(mean(s["peak_bytes"] for s in measured))
        row["step"] = f"{1000 * mean(s['step_seconds'] for s in measured):.0f} ms"
    row["bytes up"] = human_bytes(mean(s["bytes_up"] for s in good)) if good else ""
    row["time"] = human_seconds(mean(s["seconds"] for s in good)) if good else ""
    return row


def _is_of_attribute(key: str) -> bool:
    """Whether a key of a summary says how well attackers read an attribute, or how groups are treated."""
    return is_attack(key) or key.startswith(("parity_gap_", "odds_gap_"))


def columns_of(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Columns in the order in which rows name them; bytes and time stay last."""
    last = ("bytes up", "time")
    found = dict.fromkeys(key for row in rows for key in row)
    return [*(key for key in found if key not in last), *(key for key in last if key in found)]


def table_of(results: Sequence[Result]) -> str:
    """The Markdown table of a sweep's results: a function of `results.json` alone."""
    rows = rows_of(results)
    columns = columns_of(rows)
    lines = [_line(columns), _line("---" for _ in columns)]
    lines += [_line(row.get(column, "") for column in columns) for row in rows]
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
