"""What all scripts of the queue share: their arguments, the machine's name, one JSON file, use of the GPU.

A file is written anew after every measurement, so that a script that is killed loses nothing but the one that
it was at.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from fedsim.errors import UserError
from fedsim.files import write_atomic
from fedsim.version import code_digest

ROOT = Path(__file__).resolve().parents[2]
CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def arguments(
    name: str, about: str | None, seconds: int = 240, devices: Sequence[str] = ("cuda", "cpu")
) -> argparse.ArgumentParser:
    """The parser that every script begins with."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "experiments" / "results" / f"gpu_{name}.json")
    parser.add_argument("--device", choices=devices, default="cuda")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes: a rehearsal, not a measurement")
    parser.add_argument("--seconds", type=int, default=seconds, help="begin nothing new after so long")
    return parser


@dataclass
class Report:
    """The JSON file of one script.

    Args:
        given: the parsed arguments.
    """

    given: argparse.Namespace
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.given.device == "cuda" and not torch.cuda.is_available():
            raise UserError("torch finds no CUDA GPU here (fedsim doctor); rehearse with --device cpu --tiny")
        self._began = time.monotonic()
        self.machine = machine(self.given.device)
        self.save()

    def add(self, **row: Any) -> None:
        """One more measurement."""
        self.rows.append(row)
        self.save()
        print(json.dumps(row), flush=True)

    def save(self) -> None:
        """Write what there is."""
        seconds = round(time.monotonic() - self._began, 1)
        whole = {"machine": self.machine, "tiny": self.given.tiny, "seconds": seconds, "rows": self.rows}
        write_atomic(self.given.out, (json.dumps(whole, indent=1) + "\n").encode())

    def late(self) -> bool:
        """Whether the time for new measurements is over; said in the file, once."""
        over = time.monotonic() - self._began > self.given.seconds
        if over and not (self.rows and "stopped" in self.rows[-1]):
            self.add(stopped=f"after {self.given.seconds} s")
        return over


def machine(device: str) -> dict[str, Any]:
    """Card, driver and versions behind the numbers, the day, and the code."""
    found: dict[str, Any] = {
        "card": torch.cuda.get_device_name() if device == "cuda" else f"none: {device}",
        "driver": _printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": os.environ.get("FEDSIM_COMMIT") or _printed("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "code": code_digest(),
    }
    return found if device == "cuda" else {**found, "driver": None}


def _printed(*command: str) -> str | None:
    """The first line that a program prints; None if it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().split("\n")[0] or None


def settle(device: str) -> None:
    """Wait until the GPU has done what is queued."""
    if device == "cuda":
        torch.cuda.synchronize()


@contextmanager
def utilisation(device: str) -> Iterator[dict[str, float]]:
    """Inside, the driver is asked twice a second; afterwards the dictionary holds `gpu_busy`, the mean
    share of time in which a kernel ran (it does not say how much of the card that kernel filled).
    """
    found: dict[str, float] = {}
    if device != "cuda":
        yield found
        return
    command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "500"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as asked:
        try:
            yield found
        finally:
            asked.terminate()
            lines = asked.stdout.read().split() if asked.stdout else []
    values = [float(line) for line in lines if line.isdecimal()]
    if values:
        found["gpu_busy"] = round(fmean(values) / 100, 3)


def random_images(file: Path, count: int, size: int, *, tests: int = 100) -> Path:
    """An archive of random images [n, 3, size, size], labels in turn: for time and memory alone."""
    rng = np.random.default_rng(0)
    parts = {
        key: rng.integers(0, 256, (n, 3, size, size), np.uint8)
        for key, n in (("x_train", count), ("x_test", tests))
    }
    labels = {f"y_{key[2:]}": np.arange(len(x)) % len(CIFAR) for key, x in parts.items()}
    np.savez(file, **parts, **labels, classes=np.array(CIFAR))
    return file
