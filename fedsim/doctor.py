"""`fedsim doctor`: is everything here that a run needs? Every ✗ comes with its fix."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from fedsim.terminal import human_bytes, plural

_LEAST_FREE = 200_000_000  #: bytes below which the cache's disk is called full

#: small, but through every part of a run
_SMOKE = {
    "name": "doctor",
    "rounds": 1,
    "data": {"name": "digits"},
    "partition": {"name": "iid", "clients": 2, "shots": 8},
    "model": {"name": "mlp"},
    "tuning": {"name": "full"},
    "strategy": {"name": "fedavg"},
    "engine": {"name": "serial"},
}


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        title: what was looked at.
        text: what was found.
        fix: what to do about it; None when all is well.
    """

    title: str
    text: str
    fix: str | None = None


def examine(*, debug: bool = False) -> Iterator[Finding]:
    """All findings, one after the other; a check that fails unexpectedly is a finding, too.

    Args:
        debug: raise what a check raises instead.
    """
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("python", _python),
        ("packages", _packages),
        ("flower", _flower),
        ("torch", _torch),
        ("gpu", _gpu),
        ("ray", _ray),
        ("cache", _cache),
        ("assets", _assets),
        ("experiments", _experiments),
        ("smoke run", _smoke_run),
    ]
    for title, check in checks:
        try:
            yield check()
        except Exception as error:
            if debug:
                raise
            reason = str(error).splitlines()[0] if str(error) else "no reason given"
            yield Finding(title, f"{type(error).__name__}: {reason}", "fedsim doctor --debug shows where")


def _python() -> Finding:
    # older Pythons cannot even import this file: pip refuses them
    return Finding("python", f"{platform.python_version()}, {os.cpu_count()} CPU cores")


def _packages() -> Finding:
    from packaging.requirements import Requirement

    wrong, count = [], 0
    for text in requires("fedsim") or []:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        count += 1
        try:
            found = version(wanted.name)
        except PackageNotFoundError:
            wrong.append(f"{wanted.name} is missing")
            continue
        if not wanted.specifier.contains(found, prereleases=True):
            wrong.append(f"{wanted.name} {found} is not {wanted.specifier}")
    if wrong:
        return Finding("packages", "; ".join(wrong), "pip install --upgrade fedsim, or pip install -e .")
    return Finding("packages", f"{count} required packages in the right versions")


def _flower() -> Finding:
    try:
        from fedsim import _flwr
    except (ImportError, AttributeError) as error:
        return Finding("flower", str(error), "pip install 'flwr[simulation]>=1.41,<1.43'")
    missing = [name for name in _flwr.__all__ if not hasattr(_flwr, name)]
    if missing:
        return Finding("flower", f"private names moved: {', '.join(missing)}", "install a supported flwr")
    return Finding("flower", f"{version('flwr')}, the names that engines need are there")


def _torch() -> Finding:
    import torch

    return Finding("torch", f"{torch.__version__}, {plural(torch.get_num_threads(), 'thread')}")


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("gpu", "none, runs use the CPU")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Finding("gpu", ", ".join(names))


def _ray() -> Finding:
    try:
        return Finding("ray", version("ray"))
    except PackageNotFoundError:
        return Finding("ray", "not installed", "pip install 'flwr[simulation]'")


def _cache() -> Finding:
    from fedsim.data.store import cache_folder
    from fedsim.errors import UserError

    fix = "set FEDSIM_CACHE to a folder you may write to"
    try:
        folder = cache_folder("data").parent
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, UserError) as error:
        return Finding("cache", str(error), fix)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(folder).free
    text = f"{folder}, {human_bytes(size)}, {human_bytes(free)} free"
    return Finding("cache", text, "free some disk space" if free < _LEAST_FREE else None)


def _assets() -> Finding:
    """Names and sizes of files only: reading them all (`fedsim assets verify`) takes too long here."""
    from fedsim.data import assets
    from fedsim.errors import UserError

    try:
        folder, entries = assets.assets_folder(), assets.entries()
    except UserError as error:
        return Finding("assets", str(error), "set FEDSIM_ASSETS to a folder you may write to")
    here = [f"{entry.name} {human_bytes(entry.nbytes())}" for entry in entries if entry.folder]
    damaged = [entry.name for entry in entries if entry.damaged]
    absent = [entry.name for entry in entries if not entry.folder and not entry.damaged]
    text = f"{folder}, {len(here)} of {len(entries)} are here"
    if here:
        text += f": {', '.join(here)} (fedsim assets verify reads them from end to end)"
    if absent:
        text += f"; to get the others: fedsim assets fetch {' '.join(absent)}"
    if damaged:
        text += f"; damaged, or of another version of fedsim: {', '.join(damaged)}"
    return Finding("assets", text, f"fedsim assets fetch {' '.join(damaged)}" if damaged else None)


def _experiments() -> Finding:
    from fedsim import config
    from fedsim.errors import UserError

    paths = sorted(config.shipped_folder().glob("*.toml"))
    for path in paths:
        try:
            config.load(path)
        except UserError as error:
            return Finding("experiments", str(error), "reinstall fedsim, or mend the file")
    if not paths:
        return Finding("experiments", "none are shipped", "reinstall fedsim")
    return Finding("experiments", f"{len(paths)} shipped, all valid")


def _smoke_run() -> Finding:
    from fedsim import config
    from fedsim.finish import run_experiment
    from fedsim.runs import Run

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        experiment = config.from_tables(_SMOKE, source="doctor")
        run = Run.create(experiment, Path(folder))
        summary = run_experiment(experiment, run).summary
    took = time.perf_counter() - started
    return Finding("smoke run", f"1 round, 2 clients, accuracy {summary['accuracy']:.2f}, {took:.1f} s")
