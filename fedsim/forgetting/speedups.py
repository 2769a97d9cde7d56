"""What a method spends, as a fraction of what retraining spends for the same retained accuracy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fedsim.unlearning.metrics import amount_at

Report = Mapping[str, Any]

#: models that are no methods
BARE = ("retrain", "retrain-2", "original")
#: these begin with a model that knows nothing: what they learn is no rebound
UNTRAINED = ("retrain", "retrain-2", "retrain-short", "roll-back", "federaser")
#: what a speed-up is counted in -> heading; samples first, because rounds and seconds depend on the cohort
AMOUNTS = {"samples": "samples", "round": "rounds", "client_seconds": "client seconds", "bytes": "bytes"}


def edited(report: Report) -> list[str]:
    """Models that began as the original one: whose cost is compared with retraining's."""
    return [name for name, model in report["models"].items() if name not in BARE and model.get("curve")]


def titled(report: Report, name: str) -> str:
    """A method's name, marked where forgetting is not shown: what it saves is no speed-up."""
    shown = name in UNTRAINED or report["models"][name].get("forgotten", True)
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
