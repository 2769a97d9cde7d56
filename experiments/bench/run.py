"""The benchmark: all contenders interleaved in one run, medians of repetitions, ratios with their spread.

    fedsim bench                          every table row that fits this machine
    fedsim bench lenet cnn --repeat 7
    python experiments/bench/run.py ...   the same from a checkout

pfl-research takes part where FEDSIM_PFL_PYTHON names the python of an environment that has it
(`contender_pfl.py` tells how to make one).

Absolute seconds belong to the machine; the ratios, measured side by side, are what to compare.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from fedsim.files import write_atomic

HERE = Path(__file__).resolve().parent
PFL_PYTHON = "FEDSIM_PFL_PYTHON"
Seconds = dict[str, list[float]]  #: contender -> median round of each repetition


@dataclass(frozen=True)
class Row:
    """One workload: who takes part, and which ratios matter.

    Attributes:
        workload: its name.
        contenders: in the order of each repetition.
        rounds: rounds of a repetition; the first is warm-up and not counted.
        ratios: (numerator, denominator, bar): `<=` or `>=` a number, or None.
    """

    workload: str
    contenders: tuple[str, ...]
    rounds: int
    ratios: tuple[tuple[str, str, str | None], ...] = ()

    def without(self, contender: str) -> Row:
        """This row where `contender` does not take part."""
        return replace(
            self,
            contenders=tuple(name for name in self.contenders if name != contender),
            ratios=tuple(ratio for ratio in self.ratios if contender not in ratio[:2]),
        )


ROWS = (
    Row(
        "lenet",
        ("loop", "pfl", "fedsim", "fedsim-folding", "flower"),
        12,
        (
            ("fedsim", "loop", "<= 1.20"),
            ("fedsim-folding", "loop", "<= 1.20"),
            ("fedsim", "pfl", "<= 0.95"),
            ("fedsim-folding", "pfl", "<= 0.95"),
            ("flower", "fedsim", ">= 5"),
        ),
    ),
    Row(
        "cnn",
        ("loop", "pfl", "fedsim", "fedsim-folding", "flower"),
        5,
        (
            ("fedsim", "loop", "<= 1.05"),
            ("fedsim-folding", "loop", "<= 1.05"),
            ("fedsim", "pfl", "<= 1.02"),
            ("fedsim-folding", "pfl", "<= 1.02"),
            ("flower", "fedsim", None),
        ),
    ),
    Row("clip-lite-bias", ("serial", "ray"), 3, (("serial", "ray", ">= 1.7"),)),
    Row("noop-100", ("fedsim", "flower"), 10, (("flower", "fedsim", None),)),
    Row(
        "noop-1000",
        ("fedsim", "fedsim-folding", "flower"),
        4,
        (("flower", "fedsim", ">= 25"), ("flower", "fedsim-folding", ">= 50")),
    ),
    Row(
        "noop-1MB",
        ("fedsim", "fedsim-folding", "flower"),
        4,
        (("flower", "fedsim", None), ("flower", "fedsim-folding", None)),
    ),
    Row("noop-10000", ("fedsim-folding",), 4),
    Row("noop-100000", ("fedsim-folding",), 3),
    Row("noop-of-million", ("fedsim-folding",), 4),
    Row("noop-100MB", ("fedsim-folding",), 3),
)


def main(names: Sequence[str], repeat: int, out: Path) -> int:
    """Run the named rows (all if none is named), print the table, write bench.json and bench.png."""
    known = {row.workload: row for row in ROWS}
    unknown = [name for name in names if name not in known]
    if unknown:
        print(f"error: no workload '{unknown[0]}'; known: {', '.join(known)}", file=sys.stderr)
        return 2
    pfl = os.environ.get(PFL_PYTHON)
    if pfl and shutil.which(pfl) is None:
        print(f"error: {PFL_PYTHON} is '{pfl}', which is no program; unset it or correct it", file=sys.stderr)
        return 2
    results = []
    for row in [known[name] for name in names] or ROWS:
        row = row if pfl else row.without("pfl")
        result = measured(row, repeat)
        results.append(result)
        print(lines_of(result), flush=True)
        write_atomic(out / "bench.json", (json.dumps(results, indent=2) + "\n").encode())
    plot(results, out / "bench.png")
    print(f"\n{out / 'bench.json'}  {out / 'bench.png'}")
    return 0


def measured(row: Row, repeat: int) -> dict[str, object]:
    """All contenders of a row in turn, `repeat` times."""
    seconds: Seconds = {name: [] for name in row.contenders}
    runs: dict[str, list[Mapping[str, float]]] = {name: [] for name in row.contenders}
    for _ in range(repeat):
        for name in row.contenders:
            found = _contend(name, row)
            seconds[name].append(median(found["rounds"][1:]))
            runs[name].append({key: value for key, value in found.items() if key != "rounds"})
    ratios = [
        {"of": a, "to": b, "bar": bar, **spread([x / y for x, y in zip(seconds[a], seconds[b], strict=True)])}
        for a, b, bar in row.ratios
    ]
    return {
        "workload": row.workload,
        "seconds": {name: {**spread(values), "runs": runs[name]} for name, values in seconds.items()},
        "ratios": ratios,
    }


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, smallest, largest."""
    found = sorted(values)
    return {"median": median(found), "min": found[0], "max": found[-1]}


def _contend(name: str, row: Row) -> dict[str, list[float]]:
    if name == "pfl":
        script = [os.environ[PFL_PYTHON], str(HERE / "contender_pfl.py")]
    else:
        script = [sys.executable, str(HERE / "contender.py"), name]
    command = [*script, row.workload, str(row.rounds)]
    switches = {"OMP_NUM_THREADS": "1", "RAY_DEDUP_LOGS": "0", "FLWR_TELEMETRY_ENABLED": "0"}
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **switches}, timeout=1800, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{name} on {row.workload} failed:\n{done.stderr[-2000:]}")
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def lines_of(result: Mapping[str, object]) -> str:
    """One line per contender and per ratio."""
    lines = []
    seconds: Mapping[str, Mapping[str, float]] = result["seconds"]  # type: ignore[assignment]
    for name, s in seconds.items():
        lines.append(f"{result['workload']:<16} {name:<15} {_number(s)} s a round")
    ratios: Sequence[Mapping[str, float]] = result["ratios"]  # type: ignore[assignment]
    lines += [
        f"{'':<16} {r['of']} / {r['to']}  {_number(r)}" + (f"   bar {r['bar']}" if r["bar"] else "")
        for r in ratios
    ]
    return "\n".join(lines)


def _number(s: Mapping[str, float]) -> str:
    return f"{s['median']:.3g} ({s['min']:.3g} to {s['max']:.3g})"


def plot(results: Sequence[Mapping[str, object]], file: Path) -> None:
    """Seconds a round, one group of bars per workload."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(name for r in results for name in r["seconds"]))  # type: ignore[attr-defined]
    figure, axes = plt.subplots(figsize=(1.5 + 1.6 * len(results), 4))
    for at, name in enumerate(names):
        xs, ys = [], []
        for place, result in enumerate(results):
            seconds: Mapping[str, Mapping[str, float]] = result["seconds"]  # type: ignore[assignment]
            if name in seconds:
                xs.append(place + (at - (len(names) - 1) / 2) * 0.8 / len(names))
                ys.append(seconds[name]["median"])
        axes.bar(xs, ys, 0.8 / len(names), label=name)
    axes.set_yscale("log")
    axes.set_ylabel("seconds a round")
    axes.set_xticks(range(len(results)), [str(r["workload"]) for r in results], rotation=20)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workload", nargs="*")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    given = parser.parse_args()
    sys.exit(main(given.workload, given.repeat, given.out))
