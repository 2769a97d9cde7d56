"""`report.json` as a page, a terminal table and pictures: functions of the JSON alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsim.files import write_atomic
from fedsim.forgetting.verdict import UNTOLD, sentence
from fedsim.terminal import grid, human_bytes, human_seconds
from fedsim.unlearning.metrics import amount_at

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

Report = Mapping[str, Any]

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
_BARE = ("retrain", "retrain-2", "original")
#: these begin with a model that knows nothing: what they learn is no rebound
_UNTRAINED = ("retrain", "retrain-2", "retrain-short", "roll-back", "federaser")
#: what a speed-up is counted in -> heading; samples first, because rounds and seconds depend on the cohort
AMOUNTS = {"samples": "samples", "round": "rounds", "client_seconds": "client seconds", "bytes": "bytes"}


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
    return [f"- {sentence(name, m)}" for name, m in report["models"].items() if name not in _BARE]


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
    lines = ["Membership inference: AUC (true positive rate at 1 % false positives); 0.5 is chance.", ""]
    rows = [
        [name, *(f"{m['attacks'][a]['auc']:.3f} ({m['attacks'][a]['tpr']:.2f})" for a in names)]
        for name, m in report["models"].items()
    ]
    return [*lines, *_table(["model", *names], rows)]


def _notes(report: Report) -> list[str]:
    notes = [
        "*probe* is the accuracy of a fresh linear classifier on frozen features of the class's test data; "
        "*JS* the divergence of outputs from the nearer retrained model; *relearn* the rounds with the data "
        "back until 90 % of the original accuracy on it (one more than were run: not reached).",
    ]
    rebound = [
        name
        for name, m in report["models"].items()
        if name not in _UNTRAINED and _rebound(m.get("curve", [])) > 0.05
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
    low = int(np.argmin(values))
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


# -------------------------------------------------------------------------------------- pictures


def draw_curves(report: Report, path: Path) -> None:
    """Accuracy on forgotten and on retained test data against samples processed at clients."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, key in zip(figure.subplots(1, 2), ("forget_accuracy", "retain_accuracy"), strict=True):
        for name, model in report["models"].items():
            if curve := model.get("curve"):
                _line(axes, name, [p["samples"] for p in curve], [p[key] for p in curve])
        axes.set(xlabel="samples processed by clients", ylabel=key.replace("_", " "), ylim=(-0.02, 1.02))
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def draw_speedup(report: Report, path: Path) -> None:
    """How many times less than retraining, against the retained accuracy to be reached."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    figure = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    for axes, (amount, heading) in zip(panels.flat, AMOUNTS.items(), strict=True):
        found = speedups(report, amount)
        for name in edited(report):  # those without points, too: a method has one colour in all panels
            points = found.get(name, [])
            amounts = [ratio for _, ratio in points]
            _line(axes, name, [level for level, _ in points], amounts, titled(report, name))
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set(ylabel=f"{heading} of retraining / own")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())  # 6, not 6·10⁰
        axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 1)))
    for axes in panels[1]:
        axes.set(xlabel="retained test accuracy to be reached")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=120)


def edited(report: Report) -> list[str]:
    """Models that began as the original one: whose cost is compared with retraining's."""
    return [name for name, model in report["models"].items() if name not in _BARE and model.get("curve")]


def titled(report: Report, name: str) -> str:
    """A method's name, marked where forgetting is not shown: what it saves is no speed-up."""
    shown = name in _UNTRAINED or report["models"][name].get("forgotten", True)
    return name if shown else f"{name} (forgetting not shown)"


def near_retraining(report: Report) -> float:
    """A retained accuracy a point below that of the end of retraining."""
    end: float = report["models"]["retrain"]["curve"][-1]["retain_accuracy"]
    return end - 0.01


def times(ratio: float | None) -> str:
    """A speed-up as text."""
    if ratio is None:
        return "never"
    return f"{ratio:.1f}x" if math.isfinite(ratio) else "costs nothing"


def speedups(report: Report, amount: str = "samples") -> dict[str, list[tuple[float, float]]]:
    """Method -> points (retained accuracy, `speedup`)."""
    levels = [step / 200 for step in range(100, 201)]  # 0.5 to 1
    found = {}
    for name in edited(report):
        ratios = [(level, speedup(report, name, level, amount)) for level in levels]
        points = [(level, ratio) for level, ratio in ratios if ratio is not None and math.isfinite(ratio)]
        if points:
            found[name] = points
    return found


def speedup(report: Report, name: str, level: float, amount: str) -> float | None:
    """What retraining had spent when it first had a retained accuracy, over what a method had.

    Args:
        report: with a retrained model.
        name: of the method; its curve counts from its first round on, the start is not its own.
        level: retained test accuracy.
        amount: `samples`, `round`, `client_seconds` or `bytes`.

    Returns:
        None where one of them never gets there; infinite where the method spends nothing.
    """
    slow, own = report["models"]["retrain"]["curve"], report["models"][name]["curve"][1:]
    spent = [
        amount_at([p[amount] for p in one], [p["retain_accuracy"] for p in one], level) for one in (slow, own)
    ]
    if spent[0] is None or spent[1] is None:
        return None
    return spent[0] / spent[1] if spent[1] else math.inf


def _line(axes: Axes, name: str, x: Sequence[float], y: Sequence[float], label: str = "") -> None:
    style = {"retrain": ("black", "-"), "retrain-2": ("grey", "-"), "retrain-short": ("black", ":")}.get(name)
    if style is None:
        axes.plot(x, y, marker=".", linewidth=1.2, label=label or name)
    else:
        axes.plot(x, y, marker=".", linewidth=1.2, label=label or name, color=style[0], linestyle=style[1])
