"""Curves of forgetting, and speed-ups over retraining, as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedsim.forgetting.speedups import AMOUNTS, Report, edited, speedups, titled

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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


def _line(axes: Axes, name: str, x: Sequence[float], y: Sequence[float], label: str = "") -> None:
    style = {"retrain": ("black", "-"), "retrain-2": ("grey", "-"), "retrain-short": ("black", ":")}.get(name)
    if style is None:
        axes.plot(x, y, marker=".", linewidth=1.2, label=label or name)
    else:
        axes.plot(x, y, marker=".", linewidth=1.2, label=label or name, color=style[0], linestyle=style[1])
