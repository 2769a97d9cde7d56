"""Ray as we need it: quiet, on this machine unless an address is given, and no worker that cannot run."""

from __future__ import annotations

import logging
import os
import socket
import tempfile
import warnings
from math import floor
from typing import Any

import ray

from fedsim.errors import UserError

#: Of a Ray that we start (a cluster that others started keeps its own). What is smaller than 4 MiB, not 100
#: KB, goes from process to process, not through the object store, whose own process has to wait for a core
#: while workers train; and nobody looks at the history of calls and the counters that Ray would gather.
SWITCHES = {
    "max_direct_call_object_size": 4 * 2**20,
    "task_events_report_interval_ms": 0,
    "enable_metrics_collection": False,
}

#: what Ray appends to its folder for its longest socket, and the bytes that the name of a socket may have
_SOCKET = "/session_2026-11-27_15-21-17_304162_1234567/sockets/plasma_store.1"
_LONGEST = 107

#: node id and CPUs of the instance that this process started
_own: tuple[str, int] | None = None


def connect(address: str | None, cpus: int) -> None:
    """Join the Ray instance of this process, or start one, or join a cluster.

    An instance that this process started stays for its later simulations and ends with the process.

    Args:
        address: None for this machine, else what `ray.init` takes (`"auto"`, `"10.0.0.1:6379"`).
        cpus: CPUs that an instance on this machine must offer.

    Raises:
        UserError: there is no cluster at the address, or Ray does not start.
    """
    global _own  # noqa: PLW0603 (the process has one Ray)
    if ray.is_initialized():
        if _own is None or _own[0] != here() or _own[1] >= cpus:
            return
        ray.shutdown()
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        check_folder()
        options |= {"address": "local", "include_dashboard": False, "num_cpus": max(cpus, cores())}
        options |= {"_system_config": SWITCHES}
    else:
        _check_that_it_answers(address)
        options |= {"address": address}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(**options)
    except Exception as error:  # Ray's own class is the bare Exception: it gives itself 30 seconds
        if isinstance(error, ConnectionError):
            if address is not None:
                raise _nobody(address) from error
        elif isinstance(error, OSError):
            raise _unfit(str(error)) from error
        raise UserError(
            f"Ray did not start ({error}); try again when the machine is less busy, or use the serial engine"
        ) from error
    _own = (here(), options["num_cpus"]) if address is None else None


def check_folder() -> None:
    """Make sure that Ray can put its sockets and logs where it will: it says little when it cannot.

    Raises:
        UserError: the folder cannot be written, or its name is too long for a socket in it.
    """
    folder = os.path.join(_temporary(), "ray")
    longest = len(os.fsencode(folder + _SOCKET))
    if longest > _LONGEST:
        raise _unfit(f"its name is {longest - _LONGEST} bytes too long for sockets in it")
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise _unfit(error.strerror or str(error)) from error


def _temporary() -> str:
    """The folder of which Ray takes the part `ray`."""
    return os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"


def _unfit(why: str) -> UserError:
    variable = next((name for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)), "the default")
    return UserError(
        f"Ray cannot use the temporary folder '{_temporary()}' ({variable}): {why}; set RAY_TMPDIR to a "
        "short path that you may write to and that has room, or use the serial engine"
    )


def _check_that_it_answers(address: str) -> None:
    """Ray itself tries for minutes."""
    place = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    host, _, port = place.rpartition(":")
    if not host or not port.isdigit():
        return  # what that means is for Ray to say
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise _nobody(place) from error


def _nobody(address: str) -> UserError:
    return UserError(
        f"engine.address = '{address}': no Ray cluster answers there; start one with 'ray start --head' or "
        "leave engine.address out"
    )


def is_alone() -> bool:
    """True where Ray has one node, this machine."""
    return [node["NodeID"] for node in ray.nodes() if node["Alive"]] == [here()]


def here() -> str:
    """Id of the node that this process is on."""
    return str(ray.get_runtime_context().get_node_id())


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def room(threads: int, gpu_fraction: float) -> int:
    """How many workers fit on the nodes that are alive.

    A share of a GPU must fit on *one* GPU: two GPUs hold four workers of 0.4, not five.

    Args:
        threads: CPUs of a worker (of a worker without a GPU).
        gpu_fraction: its share of a GPU, or 0.
    """
    total = 0
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        has = node["Resources"]
        if gpu_fraction > 0:
            total += int(has.get("GPU", 0)) * floor(1 / gpu_fraction + 1e-9)
        else:
            total += int(has.get("CPU", 0)) // threads
    return total


def resources(threads: int, gpu_fraction: float) -> dict[str, float]:
    """What Ray sets aside for one worker."""
    return {"num_cpus": 0, "num_gpus": gpu_fraction} if gpu_fraction > 0 else {"num_cpus": threads}


def size(workers: int | None, threads: int, gpu_fraction: float) -> int:
    """Number of workers: as asked, or as many as fit.

    Raises:
        UserError: more than fit, or none.
    """
    fit = room(threads, gpu_fraction)
    if fit == 0:
        what = "GPU" if gpu_fraction > 0 else f"node with {threads} CPUs"
        key = (
            'engine.gpu_fraction = 0 and compute.device = "cpu"'
            if gpu_fraction > 0
            else "a smaller engine.threads"
        )
        raise UserError(f"Ray has no {what} for a worker; set {key}")
    if workers is not None and workers > fit:
        per = f"engine.gpu_fraction = {gpu_fraction}" if gpu_fraction > 0 else f"engine.threads = {threads}"
        raise UserError(
            f"engine.workers = {workers}, but with {per} only {fit} fit on Ray's nodes; lower one of them"
        )
    return fit if workers is None else workers
