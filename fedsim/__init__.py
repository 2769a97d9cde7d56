"""fedsim: tune, prompt, un-learn and locally train foundation models across federated clients.

import fedsim
result = fedsim.run("quickstart", rounds=5)
print(result.history)

fedsim.simulate(server_app, client_app, num_clients=10)      # any Flower Message-API app
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fedsim.environment  # noqa: F401  (switches that libraries read when they are imported)

if TYPE_CHECKING:
    from fedsim.engine.simulate import simulate
    from fedsim.finish import Result

__all__ = ["run", "simulate"]


def run(
    experiment: str | os.PathLike[str] | None = None,
    *,
    overwrite: bool = False,
    folder: str | os.PathLike[str] | None = None,
    **overrides: Any,
) -> Result:
    """Run an experiment and return its result.

    Args:
        experiment: path of a TOML file or name of a shipped one (default: the quickstart).
        overwrite: replace a run folder of the same name instead of adding a suffix.
        folder: where run folders are made (default: `FEDSIM_RUNS` or `runs`).
        **overrides: keys of the experiment: `rounds=5`, `client={"lr": 0.01}`, `**{"client.lr": 0.01}`.

    Returns:
        A Result with `.history` (a table with a row per round), `.summary`, `.state()` and `.run`.

    Raises:
        fedsim.errors.UserError: the experiment has a mistake; the message says which and how to mend it.
    """
    from fedsim import config
    from fedsim._flwr import quiet
    from fedsim.finish import run_experiment
    from fedsim.overrides import from_values
    from fedsim.runs import Run

    chosen = config.load(experiment, from_values(overrides))
    where = Path(folder) if folder else None
    with quiet(), Run.fresh(chosen, where, overwrite=overwrite) as made:
        return run_experiment(chosen, made)


def __getattr__(name: str) -> Any:
    # kept out of the module's import: `import fedsim` must not load flwr
    if name == "simulate":
        from fedsim.engine.simulate import simulate

        return simulate
    raise AttributeError(f"module 'fedsim' has no attribute '{name}'")
