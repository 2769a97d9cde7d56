"""From figures to a verdict: is this model one that could have been trained without the data?

Two models retrained with different seeds differ, too. Their distance in a figure, plus what one sample (of an
AUC: two standard errors) makes, is the noise floor of that figure; of the divergence of outputs it is the one
between the two. A method has forgotten when every figure of forgetting lies inside; else the report names
those that do not. Without retrained models nothing of the kind can be said, nor where the original model
itself lies inside: then these figures cannot tell one that saw the data from one that did not.

The rule is strict: with figures that have no resolution of their own, as the divergence, a third honest
retraining lies inside twice in three times (its distance is the largest of three as often as the others).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.forgetting.methods import RETRAIN
from fedsim.unlearning.metrics import Floor, js_divergence, tow

Tables = dict[str, Any]

#: figures that speak of the forgotten data; those of the retained data are the price
FORGETTING = ("forget_train", "forget_test", "probe", "mia_loss", "mia_model", "js", "relearn", "backdoor")
PRICE = ("retain_train", "retain_test")

UNTOLD = (
    "cannot be told: the original model itself is inside the noise floor in every figure, so these figures "
    "do not show whether a model saw the data"
)
UNKNOWN = (
    "unknown without retraining: what these figures are for a model that never saw the data, so neither "
    "whether they are low enough nor whether they are too low, and what was saved"
)


def judged(
    report: Tables, outputs: Mapping[str, NDArray[np.float64]], resolution: Callable[[str], float]
) -> Tables:
    """The report with distances to retraining, noise floors and verdicts."""
    models = report["models"]
    first, second = RETRAIN
    if first not in models or second not in models:
        return {**report, "floor": None, "unknown": UNKNOWN}
    between = js_divergence(outputs[first], outputs[second])
    reference = models[first]["figures"]
    for name, model in models.items():
        others = [other for other in RETRAIN if other != name]
        apart = [js_divergence(outputs[name], outputs[other]) for other in others]
        model["figures"]["js"] = float(np.min(apart))  # NaN where one of them is
        model["tow"] = tow(*[[m[key] for key in _TOW] for m in (model["figures"], reference)])
    floors = {
        key: Floor(reference[key], models[second]["figures"][key], resolution(key))
        for key in (*FORGETTING, *PRICE)
        if key != "js" and key in reference and key in models[second]["figures"]
    }
    for name, model in models.items():
        if name not in RETRAIN:
            figures = model["figures"]
            outside = [
                key for key, floor in floors.items() if key in figures and not floor.inside(figures[key])
            ]
            outside += [] if figures["js"] <= between else ["js"]  # NaN lies outside
            model["outside"] = outside
    telling = bool(set(models["original"]["outside"]) & set(FORGETTING))
    for name, model in models.items():
        if name not in RETRAIN:
            model["forgotten"] = telling and not set(model["outside"]) & set(FORGETTING)
    shown = {
        key: {"retrain": floor.first, "retrain-2": floor.second, "width": floor.width}
        for key, floor in floors.items()
    }
    return {**report, "floor": shown, "js_between": between, "telling": telling}


_TOW = ("forget_train", "retain_train", "retain_test")


def sentence(name: str, model: Mapping[str, Any]) -> str:
    """The verdict on one method, in words."""
    if model["forgotten"]:
        rest = [key for key in model["outside"] if key in PRICE]
        price = f"; the price: {', '.join(rest)} outside" if rest else ""
        without = "" if "relearn" in model["figures"] else " (rounds to relearn were not measured)"
        return f"{name}: forgotten: every figure of forgetting is inside the noise floor{without}{price}"
    outside = ", ".join(key for key in model["outside"] if key in FORGETTING)
    return f"{name}: not shown to have left: outside the noise floor in {outside}"
