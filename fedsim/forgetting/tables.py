"""Reports of several seeds as one Markdown table: mean ± sample standard deviation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedsim.forgetting.methods import RETRAIN
from fedsim.forgetting.report import FIGURES
from fedsim.forgetting.speedups import AMOUNTS, edited, near_retraining, speedup, times, titled
from fedsim.terminal import spread

Report = Mapping[str, Any]


def over_seeds(reports: Sequence[Report]) -> str:
    """Figures and samples by model; `inside` counts seeds with all figures of forgetting inside the floor."""
    names = dict.fromkeys(name for report in reports for name in report["models"])
    heads = {
        head: key
        for head, key in FIGURES.items()
        if any(key in model["figures"] for report in reports for model in report["models"].values())
    }
    lines = [["model", *heads, "ToW", "rounds", "samples", "inside"]]
    for name in names:
        models = [report["models"][name] for report in reports if name in report["models"]]
        inside = sum(bool(model.get("forgotten")) for model in models)
        lines.append(
            [
                name,
                *(_spread(m["figures"].get(key) for m in models) for key in heads.values()),
                _spread(m.get("tow") for m in models),
                _spread((m["cost"]["rounds"] for m in models), "{:.0f}"),
                _spread((m["cost"]["samples"] / 1000 for m in models), "{:.1f} k"),
                "" if name == "original" or name in RETRAIN else f"{inside} of {len(models)}",
            ]
        )
    return _markdown(lines)


def rules(results: Sequence[Report]) -> str:
    """Forget and retained accuracy right after pruning, by rule."""
    lines = [["rule", "forget", "retain"]]
    for name in results[0]["rules"]:
        found = [result["rules"][name] for result in results]
        good = [one for one in found if "error" not in one]
        note = f" ({len(found) - len(good)} emptied a layer)" if len(good) < len(found) else ""
        lines.append(
            [
                f"{name}{note}",
                _spread(one["forget_accuracy"] for one in good),
                _spread(one["retain_accuracy"] for one in good),
            ]
        )
    return _markdown(lines)


def pace(report: Report) -> str:
    """Retraining's cost over a method's: in samples for several retained accuracies, then in all units."""
    end = near_retraining(report)
    names = edited(report)
    levels = [step / 20 for step in range(10, 20) if step / 20 < end]  # 0.5, 0.55, ...
    wanted = [(level, "samples") for level in levels] + [(end, amount) for amount in AMOUNTS]
    lines = [["retained accuracy reached", "counted in", *(titled(report, name) for name in names)]]
    for level, amount in wanted:
        ratios = [speedup(report, name, level, amount) for name in names]
        lines.append([f"{level:.3f}", AMOUNTS[amount], *(times(ratio) for ratio in ratios)])
    return _markdown(lines)


def _spread(found: Iterable[float | None], form: str = "{:.3f}") -> str:
    """Of figures that are there; equal ones have no deviation."""
    values = [value for value in found if value is not None]
    return spread(values[:1] if len(set(values)) == 1 else values, form, "{:.2f}")


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *rows = lines
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *rows))
