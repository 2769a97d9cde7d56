"""A long run of clients that do nothing: does memory or the number of open files grow?

    python experiments/bench/soak.py [ROUNDS]      2,000 rounds of 100 clients on two workers, about a minute

Prints a line per kind of process: private memory after a tenth of the rounds and at the end, its slope from
there on (least squares), and open files at both points.
"""

from __future__ import annotations

import sys
import time

import apps
import numpy as np
import psutil
import workloads
from flwr.serverapp.strategy import FedAvg

from fedsim import simulate

KINDS = {"ray::Worker": "workers", "raylet": "raylet", "gcs_server": "gcs"}
Sample = dict[str, tuple[float, int]]  #: kind -> (private memory of all its processes, MB; open files)


def sample() -> Sample:
    """What the processes of this run have now."""
    found: Sample = {}
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        name = process.cmdline()[0] if process is not me and process.cmdline() else process.name()
        kind = "driver" if process is me else next((k for n, k in KINDS.items() if n in name), None)
        if kind is not None:
            memory, files = found.get(kind, (0.0, 0))
            found[kind] = (memory + process.memory_full_info().uss / 1e6, files + process.num_fds())
    return found


class Watched(FedAvg):
    """FedAvg that takes a sample every hundredth of the run."""

    rounds = 2000
    samples: list[Sample] = []  # noqa: RUF012 (one run a process)

    def aggregate_train(self, server_round, replies):  # type: ignore[no-untyped-def]
        """As FedAvg."""
        if server_round % (self.rounds // 100) == 0:
            self.samples.append(sample())
        return super().aggregate_train(server_round, replies)


def main(rounds: int) -> None:
    """Run and print."""
    Watched.rounds = rounds
    workload = workloads.WORKLOADS["noop-100"]
    started = time.perf_counter()
    app = apps.server_app(workload, rounds, lambda times: None, Watched)
    simulate(app, apps.client_app(workload), workload.clients, engine="ray", workers=2)
    print(f"{rounds} rounds of {workload.cohort} clients in {time.perf_counter() - started:.0f} s")
    tenth = Watched.samples[len(Watched.samples) // 10 :]
    at = np.linspace(rounds / 10, rounds, len(tenth))
    for kind in tenth[-1]:
        memory = [s[kind][0] for s in tenth]
        slope = np.polyfit(at, memory, 1)[0]
        print(
            f"{kind:<8} {memory[0]:7.1f} -> {memory[-1]:7.1f} MB, slope {1000 * slope:+.2f} MB per 1,000 "
            f"rounds, files {tenth[0][kind][1]} -> {tenth[-1][kind][1]}"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000)
