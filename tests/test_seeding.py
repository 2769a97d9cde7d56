"""Seeds do not depend on when torch is imported."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fedsim.engine.clock import TimedOut, limited_time
from fedsim.seeding import generators_restored, seed_everything

_LATE = """
import sys
from fedsim.seeding import generators_restored, seed_everything, threads_restored

seed_everything(7)
assert "torch" not in sys.modules
with threads_restored(1), generators_restored():
    seed_everything(5)
    import torch
    inside = torch.rand(3), torch.get_num_threads()
print(inside[0].tolist(), inside[1], torch.rand(3).tolist())
"""

_STRANGER = """
import sys
from fedsim.seeding import generators_restored, seed_everything

with generators_restored():
    seed_everything(5)
    import torch
seed_everything(6)
print(torch.mine)
"""


def _python(code: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_torch_that_is_imported_later_has_the_seed_and_the_threads(tmp_path: Path) -> None:
    """Inside those of the client, afterwards those of the server."""
    with generators_restored():
        seed_everything(5)
        inside = torch.rand(3).tolist()
        seed_everything(7)
        outside = torch.rand(3).tolist()
    assert _python(_LATE, tmp_path) == f"{inside} 1 {outside}"


def test_a_users_own_torch_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("mine = 1")
    assert _python(_STRANGER, tmp_path) == "1"


def test_generators_come_back() -> None:
    seed_everything(3)
    before = random.random(), np.random.rand(), torch.rand(()).item()
    seed_everything(3)
    with generators_restored():
        seed_everything(4)
        assert (random.random(), np.random.rand(), torch.rand(()).item()) != before
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == before


def test_an_alarm_that_was_set_before_still_rings() -> None:
    rung: list[int] = []
    handler = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(TimedOut), limited_time(0.1):
            time.sleep(0.2)
        assert not rung
        end = time.monotonic() + 10
        while not rung and time.monotonic() < end:
            time.sleep(0.01)
        assert rung == [1]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
