"""The table that shows strategies driving locally supervised clients: one line each, one column a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean, stdev
from typing import Any

Results = list[dict[str, Any]]

STEPS = ("bp", "dgl", "man++")


def mission(read: Callable[[str], Results]) -> str:
    """The table.

    Args:
        read: name of a JSON file in `results/` -> what is in it.
    """
    averaging, tuning = read("local_methods_cifar10"), read("local_fedtune_cifar10")
    pruning = [read(f"forget_digits_vgg-prune15{'' if step == 'bp' else f'-{step}'}") for step in STEPS]
    pruned = [[report["models"]["prune"]["figures"] for report in reports] for reports in pruning]
    lines = [
        ["strategy", "figure", *STEPS],
        ["---"] * (2 + len(STEPS)),
        ["plain averaging", "accuracy", *(_accuracies(averaging, step) for step in STEPS)],
        ["FedTune, biases", "accuracy", *(_accuracies(tuning, step) for step in STEPS)],
        *(
            [f"recovery from pruning{end}", figure, *(_spread([f[key] for f in found]) for found in pruned)]
            for key, figure, end in (
                ("retain_test", "accuracy on what is kept", ""),
                ("forget_test", "accuracy on class 9", ", the same"),
            )
        ),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _accuracies(results: Results, step: str) -> str:
    """Of the cells with Dirichlet clients (where a sweep has others) and K = 4 (1 for back-propagation)."""
    found = [
        result["summary"]["accuracy"]
        for result in results
        if result["cell"]["local.name"] == step
        and result["cell"]["local.blocks"] == (1 if step == "bp" else 4)
        and result["cell"].get("partition.name", "dirichlet") == "dirichlet"
    ]
    return _spread(found)


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.3f} ± {stdev(values):.3f}"
