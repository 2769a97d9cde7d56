"""Write the tables of the README files from the JSON behind them.

    python experiments/tables.py            rewrite
    python experiments/tables.py --check    exit 1 if a table is not what its JSON says

A table stands between a comment that describes it and `<!-- end -->`:

    <!-- table: quickstart -->                        all results of experiments/results/quickstart.json
    <!-- table: modes where model.name=minilm keys=tuning.name -->           some of them, fewer columns
    <!-- table: modes rows=tuning.name columns=partition.name,partition.shots value=accuracy -->   crosswise
    <!-- table: modes keys=tuning.name show=accuracy,local -->                   some of the columns
    <!-- table: forget_digits_vgg pace -->             cost of retraining over that of a method (first seed)

`value` is a column of the plain table, or `reach:0.6`: bytes that all clients had sent when the test accuracy
was 0.6 for the first time (mean over seeds; "never" if one seed did not get there). An underscore in `value`
and `show` stands for a blank.

A JSON file is the `results.json` of a sweep, or what `forgetting.py`, `bench/features.py`,
`bench/local_steps.py` or `fedsim bench` wrote. `mission` is made of several: strategies by the step that
their clients take (see `mission.py`).
Keys that a table of a sweep leaves out must not tell its rows apart.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from mission import mission

from fedsim.forgetting.tables import over_seeds, pace, rules
from fedsim.sweep_table import rows_of, table_of
from fedsim.terminal import human_bytes

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "experiments" / "README.md")
_BLOCK = re.compile(r"(<!-- table: ([\w-]+)(.*?) -->\n).*?(<!-- end -->)", re.DOTALL)

Results = list[dict[str, Any]]


def read(name: str) -> Results:
    """A JSON file of results."""
    found: Results = json.loads((ROOT / "experiments" / "results" / f"{name}.json").read_text("utf-8"))
    return found


def rendered(text: str) -> str:
    """A page with every table made anew."""

    def table(match: re.Match[str]) -> str:
        if match[2] == "mission":
            return f"{match[1]}{mission(read)}{match[4]}"
        results = read(match[2])
        return f"{match[1]}{made(results, match[3].split())}{match[4]}"

    return _BLOCK.sub(table, text)


def made(results: Results, words: list[str]) -> str:
    """One table: `where KEY=VALUE ...` chooses results, the other words say what it looks like."""
    if "models" in results[0]:
        return pace(results[0]) if words == ["pace"] else over_seeds(results)
    if "rules" in results[0]:
        return rules(results)
    if "workload" in results[0]:
        return benchmark(results)
    if "ratio" in results[0]:
        return steps(results)
    if "setting" in results[0]:
        return cached_features(results)
    given = dict(word.split("=", 1) for word in words if "=" in word)
    known = ("keys", "rows", "columns", "value", "show")
    shape = {key: given.pop(key).split(",") for key in known if key in given}
    chosen = [r for r in results if all(str(r["cell"].get(key)) == value for key, value in given.items())]
    if "rows" in shape:
        value = shape.get("value", ["accuracy"])[0].replace("_", " ")
        return crosswise(chosen, shape["rows"], shape["columns"], value)
    kept = narrowed(chosen, shape["keys"]) if "keys" in shape else chosen
    return some_columns(kept, shape["keys"], shape["show"]) if "show" in shape else table_of(kept)


def benchmark(results: Results) -> str:
    """Seconds a round of every contender of `fedsim bench`, then the ratios with their bars."""
    lines = [["workload", "seconds a round", "ratios: median (least to most), bar"], ["---"] * 3]
    for row in results:
        seconds = [f"{name} {found['median']:.3g}" for name, found in row["seconds"].items()]
        ratios = [
            f"{r['of']} / {r['to']} {r['median']:.3g} ({r['min']:.3g} to {r['max']:.3g})"
            + (f", {r['bar']}" if r["bar"] else "")
            for r in row["ratios"]
        ]
        lines.append([row["workload"], "<br>".join(seconds), "<br>".join(ratios)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def steps(results: Results) -> str:
    """Time of a step over back-propagation's by method and K, one column a network."""
    networks = list(dict.fromkeys(row["network"] for row in results))
    lines = [["method", "K", *networks], ["---"] * (2 + len(networks))]
    for method, blocks in dict.fromkeys((row["method"], row["blocks"]) for row in results):
        found = {r["network"]: r for r in results if (r["method"], r["blocks"]) == (method, blocks)}
        ratios = [f"{found[name]['ratio']:.1f}x" if name in found else "" for name in networks]
        lines.append([method, str(blocks), *ratios])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cached_features(results: Results) -> str:
    """Seconds a round without and with the cache of features, and what the cache costs once."""
    heads = [
        "setting",
        "round, off",
        "on",
        "ratio",
        "training, off",
        "on",
        "ratio",
        "once",
        "accuracy, off",
        "on",
    ]
    lines = [heads, ["---"] * len(heads)]
    for row in results:
        whole = [row[key][0] for key in ("off", "on")]
        line = [row["setting"]]
        for off, on in (whole, [row[f"training_{key}"] for key in ("off", "on")]):
            line += [f"{off:.3g} s", f"{on:.3g} s", f"{off / on:.3g}"]
        line.append(f"{row['once'][0]:.3g} s, {row['megabytes']:.0f} MB")
        lines.append([*line, *(f"{row[key]:.4f}" for key in ("accuracy_off", "accuracy_on"))])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def narrowed(results: Results, keys: list[str]) -> Results:
    """The results with these keys (and the seed) alone.

    Raises:
        ValueError: two results that differ otherwise would fall into one row.
    """
    seen: dict[str, set[str]] = {}
    out = []
    for result in results:
        kept = {key: result["cell"][key] for key in [*keys, "seed"] if key in result["cell"]}
        group = json.dumps(kept)
        seen.setdefault(group, set()).add(json.dumps(result["cell"], sort_keys=True))
        out.append({**result, "cell": kept})
    twice = [group for group, cells in seen.items() if len(cells) > 1]
    if twice:
        raise ValueError(f"more than one cell is {twice[0]}: name another key")
    return out


def some_columns(results: Results, keys: list[str], names: list[str]) -> str:
    """The plain table with fewer columns."""
    columns = [*keys, *(name.replace("_", " ") for name in names)]
    heads = [column.removesuffix(".name").rpartition(".")[2] for column in columns]
    lines = [heads, ["---"] * len(columns)]
    lines += [[row.get(column, "") for column in columns] for row in rows_of(results)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def bytes_to(results: Results, accuracy: float) -> str:
    """Bytes sent up until the accuracy was reached, mean over results."""
    reached = [next((up for _, up, found in r["curve"] if found >= accuracy), None) for r in results]
    counts = [up for up in reached if up is not None]
    return human_bytes(sum(counts) / len(counts)) if len(counts) == len(reached) > 0 else "never"


def crosswise(results: Results, rows: list[str], columns: list[str], value: str) -> str:
    """One line per value of the row keys, one column per value of the column keys, bytes at the end."""
    groups: dict[tuple[str, str], Results] = {}
    sent: dict[str, str] = {}
    for narrow, result in zip(narrowed(results, rows + columns), results, strict=True):
        line = " ".join(_named(key, result["cell"][key]) for key in rows if key in result["cell"])
        head = " ".join(str(result["cell"][key]) for key in columns if key in result["cell"])
        groups.setdefault((line, head), []).append(narrow)
        if "summary" in result:
            summary = result["summary"]
            asked = summary["clients"] * result["cell"].get("strategy.fraction", 1)
            sent[line] = human_bytes(summary["bytes_up"] / summary["rounds"] / asked)
    heads = dict.fromkeys(head for _, head in groups)
    lines = [["/".join(key.removesuffix(".name").rpartition(".")[2] for key in rows[:1]), *heads, "sent"]]
    lines.append(["---"] * len(lines[0]))
    for line, bytes_sent in sent.items():
        cells = (groups.get((line, head), []) for head in heads)
        lines.append([line, *(_cell(found, value) for found in cells), bytes_sent])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _named(key: str, value: Any) -> str:
    """The name that a section has; other values with their key: a line of its own must say what it is."""
    return str(value) if key.endswith(".name") else f"{key.rpartition('.')[2]}={value}"


def _cell(found: Results, value: str) -> str:
    if not found:
        return ""
    if value.startswith("reach:"):
        return bytes_to(found, float(value.removeprefix("reach:")))
    return rows_of(found)[0].get(value, "")


def main(check: bool) -> int:
    """Rewrite the pages, or say which are stale."""
    stale = 0
    for page in PAGES:
        before = page.read_text("utf-8")
        after = rendered(before)
        if after != before:
            stale += 1
            print(f"{page.relative_to(ROOT)}: {'stale' if check else 'written'}")
            if not check:
                page.write_text(after, "utf-8")
    return int(check and stale > 0)


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
