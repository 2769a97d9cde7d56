"""`report.json` as a page, a terminal table and pictures: functions of the JSON alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsim.files import write_atomic
from fedsim.forgetting.pictures import draw_curves, draw_speedup
from fedsim.forgetting.speedups import (
    AMOUNTS,
    BARE,
    UNTRAINED,
    Report,
    edited,
    near_retraining,
    speedup,
    times,
    titled,
)
from fedsim.forgetting.verdict import UNTOLD, sentence
from fedsim.terminal import grid, human_bytes, human_seconds

if TYPE_CHECKING:
    from rich.table import Table

#: heading -> figure
FIGURES = {
    "forget train": "forget_train",
    "forget test": "forget_test",
    "retain train": "retain_train",
    "retain test": "retain_test",
    "probe": "probe",
    "MIA loss": "mia_loss",
    "MIA model": "mia_model",
    "JS": "js",
    "relearn": "relearn",
    "backdoor": "backdoor",
}
#: the same on a terminal
_SHORT = {
    "forget": "forget_test",
    "retain": "retain_test",
    "MIA": "mia_loss",
    "probe": "probe",
    "relearn": "relearn",
}
ACCURACIES = ("forget_train", "forget_test", "retain_train", "retain_test")


def write(report: Report, folder: Path) -> list[Path]:
    """`report.md`, `curves.png` and, beside retraining, `speedup.png`; returns their paths."""
    page, curves = folder / "report.md", folder / "curves.png"
    write_atomic(page, markdown(report).encode())
    draw_curves(report, curves)
    if "retrain" not in report["models"]:
        return [page, curves]
    draw_speedup(report, folder / "speedup.png")
    return [page, curves, folder / "speedup.png"]


def markdown(report: Report) -> str:
    """The whole report as a page."""
    before = [f"{key} {', '.join(map(str, ids))}" for key, ids in report["before"].items() if ids]
    lines = [f"# {report['origin']} without {', '.join(report['words'])}", ""]
    if before:
        lines += [f"Left out before: {'; '.join(before)}.", ""]
    heads = _heads(report)
    rows = [_figures(name, model, heads) for name, model in report["models"].items()]
    if report["floor"]:
        widths = {key: floor["width"] for key, floor in report["floor"].items()}
        widths["js"] = report["js_between"]
        rows.append(["noise floor ±", *(_shown(widths, key) for key in heads.values()), ""])
    lines += _table(["model", *heads, "ToW"], rows)
    lines += ["", *verdicts(report), "", *_differences(report)]
    lines += _table(
        ["model", "rounds", "samples", "client seconds", "bytes", "server storage"],
        [_costs(name, model) for name, model in report["models"].items()],
    )
    sizes = [f"- {name}: {_size(m['size'])}" for name, m in report["models"].items() if "size" in m]
    lines += [
        "",
        *_speedup_table(report),
        *sizes,
        "",
        *_attacks(report),
        "",
        *_notes(report),
        "",
        "![curves](curves.png)",
        "",
    ]
    return "\n".join(lines)


def verdicts(report: Report) -> list[str]:
    """One sentence a method."""
    if not report["floor"]:
        return [report["unknown"]]
    if not report.get("telling", True):
        return [UNTOLD]
    return [f"- {sentence(name, m)}" for name, m in report["models"].items() if name not in BARE]


def terminal_table(report: Report) -> Table:
    """The figures that matter most, and what they cost."""
    table = grid()
    table.show_header, table.header_style = True, "dim"
    for name in ("model", *_SHORT, "rounds", "samples", "time"):
        table.add_column(name, justify="left" if name == "model" else "right", no_wrap=True)
    for name, model in report["models"].items():
        figures = {"forget_test": model["figures"]["forget_train"], **model["figures"]}  # clients: own data
        cost = model["cost"]
        table.add_row(
            name,
            *(_shown(figures, key) for key in _SHORT.values()),
            str(cost["rounds"]),
            _thousands(cost["samples"]),
            human_seconds(cost["client_seconds"]),
        )
    return table


def _heads(report: Report) -> dict[str, str]:
    """The figures that somebody has: a client leaves no class to probe, and few runs a trigger."""
    return {
        head: key
        for head, key in FIGURES.items()
        if any(key in model["figures"] for model in report["models"].values())
    }


def _figures(name: str, model: Mapping[str, Any], heads: Mapping[str, str]) -> list[str]:
    found = model["figures"]
    return [name, *(_shown(found, key) for key in heads.values()), _shown(model, "tow")]


def _costs(name: str, model: Mapping[str, Any]) -> list[str]:
    cost = model["cost"]
    return [
        name,
        str(cost["rounds"]),
        f"{cost['samples']:,}",
        f"{cost['client_seconds']:.1f}",
        human_bytes(cost["bytes"]),
        human_bytes(cost["storage"]) if cost.get("storage") else "",
    ]


def _differences(report: Report) -> list[str]:
    """Accuracies less those of retraining."""
    if "retrain" not in report["models"]:
        return []
    reference = report["models"]["retrain"]["figures"]
    keys = {head: key for head, key in FIGURES.items() if key in ACCURACIES and key in reference}
    rows = [
        [name, *(f"{model['figures'][key] - reference[key]:+.3f}" for key in keys.values())]
        for name, model in report["models"].items()
        if name != "retrain"
    ]
    return ["Less those of retraining:", "", *_table(["model", *keys], rows), ""]


def _speedup_table(report: Report) -> list[str]:
    """What retraining took to be within a point of its final retained accuracy, in units of each method."""
    if "retrain" not in report["models"]:
        return []
    level = near_retraining(report)
    rows = []
    for name in edited(report):
        ratios = [speedup(report, name, level, amount) for amount in AMOUNTS]
        rows.append([titled(report, name), *(times(ratio) for ratio in ratios)])
    said = (
        f"Retraining's cost of a retained accuracy of {level:.3f} (a point below its end), over the method's:"
    )
    return [said, "", *_table(["model", *AMOUNTS.values()], rows), ""]


def _attacks(report: Report) -> list[str]:
    names = list(next(iter(report["models"].values()))["attacks"])
    models = report["models"]
    rates = [m["attacks"][a]["tpr"] for m in models.values() for a in names]
    said = "Membership inference: AUC (true positive rate at 1 % false positives); 0.5 is chance."
    if None in rates:
        said = (
            "Membership inference: AUC; 0.5 is chance. The true positive rate at 1 % false positives cannot "
            "be measured: it needs 100 unseen samples, and there are fewer."
        )
    lines = [said, ""]
    rows = [[name, *(_attack(m["attacks"][a]) for a in names)] for name, m in models.items()]
    return [*lines, *_table(["model", *names], rows)]


def _attack(found: Mapping[str, float | None]) -> str:
    rate = found["tpr"]
    return f"{found['auc']:.3f}" + ("" if rate is None else f" ({rate:.2f})")


def _notes(report: Report) -> list[str]:
    notes = [
        "*probe* is the accuracy of a fresh linear classifier on frozen features of the class's test data; "
        "*JS* the divergence of outputs from the nearer retrained model; *relearn* the rounds with the data "
        "back until 90 % of the original accuracy on it (one more than were run: not reached).",
    ]
    rebound = [
        name
        for name, m in report["models"].items()
        if name not in UNTRAINED and _rebound(m.get("curve", [])) > 0.05
    ]
    if rebound:
        notes += [
            "",
            f"Rebound (what was to go came back while recovering): {', '.join(rebound)}.",
        ]
    return notes


def _rebound(curve: Sequence[Mapping[str, float]]) -> float:
    """How far accuracy on the forgotten data rose again after its lowest point."""
    values = [point["forget_accuracy"] for point in curve]
    if not values:
        return 0.0
    low = int(np.argmin([value if math.isfinite(value) else math.inf for value in values]))
    return max(values[low:]) - values[low]


def _size(size: Mapping[str, int]) -> str:
    parameters = 1 - size["parameters_compact"] / size["parameters"]
    flops = 1 - size["flops_compact"] / size["flops"]
    return f"taking pruned channels out saves {parameters:.1%} of the parameters and {flops:.1%} of the FLOPs"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *rows)]


def _shown(figures: Mapping[str, float], key: str) -> str:
    """A figure of a model as text, nothing where it has none."""
    if key not in figures:
        return ""
    return f"{figures[key]:.0f}" if key == "relearn" else f"{figures[key]:.3f}"


def _thousands(count: float) -> str:
    return f"{count / 1000:.0f} k" if count >= 10_000 else f"{count:.0f}"
