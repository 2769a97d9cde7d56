"""One contender on one workload in a process of its own; prints its seconds per round as JSON.

python contender.py {loop|fedsim|fedsim-folding|flower} WORKLOAD ROUNDS
python contender.py {serial|ray} clip-lite-bias ROUNDS
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import apps
import loop
import numpy as np
import workloads

CORES = 2


def main(contender: str, name: str, rounds: int) -> None:
    """Run and print."""
    times: list[float] = []
    more: dict[str, Any] = {}
    if name == "clip-lite-bias":
        print(json.dumps({"rounds": _experiment(contender, rounds)}))
        return
    workload = workloads.WORKLOADS[name]
    if workload.model is not None:
        workloads.images()
    started = time.perf_counter()
    if contender == "loop":
        times = loop.seconds_per_round(name, rounds, CORES)
    elif contender == "flower":
        _flower(workload, rounds, times)
    else:
        _fedsim(workload, rounds, times, more, folding=contender.endswith("folding"))
    more["start"] = time.perf_counter() - started - sum(times)
    more["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"rounds": times, **more}))


def _fedsim(
    workload: workloads.Workload, rounds: int, times: list[float], more: dict[str, Any], *, folding: bool
) -> None:
    from flwr.serverapp.strategy import FedAvg

    from fedsim import simulate
    from fedsim.averaging import WeightedAverage

    def averaging(**options: Any) -> WeightedAverage:
        return WeightedAverage(fraction=options["fraction_train"], fraction_evaluate=0.0)

    def prepare(grid: Any) -> None:
        more["idle"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if folding:
            grid.folding = "examples"

    app = apps.server_app(workload, rounds, times.extend, averaging if folding else FedAvg, prepare)
    simulate(app, apps.client_app(workload), workload.clients, engine="ray", workers=CORES)


def _experiment(engine: str, rounds: int) -> list[float]:
    """Rounds of `fedtune_bias_cifar10.toml` without evaluation, which comes with the first and the last."""
    from fedsim import config
    from fedsim.finish import run_experiment
    from fedsim.hooks import Hook, Round
    from fedsim.runs import Run

    ends: list[float] = []

    class Clock(Hook):
        def round(self, result: Round) -> None:
            ends.append(time.perf_counter())

    switches = [
        f"rounds={rounds + 1}",
        f"evaluation.every={rounds + 1}",
        "data.test_samples=100",
        f"engine.name={engine}",
        *([f"engine.workers={CORES}"] if engine == "ray" else []),
    ]
    text = config.load(Path(__file__).parents[1] / "fedtune_bias_cifar10.toml", switches)
    with tempfile.TemporaryDirectory() as folder:
        run_experiment(text, Run.create(text, Path(folder)), [Clock()])
    return np.diff(ends)[:-1].tolist()  # type: ignore[no-any-return]


def _flower(workload: workloads.Workload, rounds: int, times: list[float]) -> None:
    from flwr.simulation import run_simulation

    run_simulation(
        server_app=apps.server_app(workload, rounds, times.extend),
        client_app=apps.client_app(workload),
        num_supernodes=workload.clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": CORES, "include_dashboard": False},
        },
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
