"""What watches a run: lines, the live display, and how numbers are written."""

from __future__ import annotations

import io
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from fedsim.hooks import Round
from fedsim.progress import LiveHook, LogHook, PlainHook, round_line
from fedsim.terminal import human_bytes, human_seconds, sparkline
from tests.helpers import run, tiny


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (99_940, "99.9 kB"),
        (99_960, "100 kB"),
        (999_600, "1.0 MB"),
        (5e9, "5.0 GB"),
        (2e15, "2000.0 TB"),
    ],
)
def test_bytes(count: float, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.7, "1 min 00 s"),
        (192, "3 min 12 s"),
        (7500, "2 h 05 min"),
    ],
)
def test_seconds(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


def test_sparkline() -> None:
    assert sparkline([]) == ""
    assert sparkline([1, 1]) == "▁▁"
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline(list(range(800)), width=8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0.5], span=(0, 1)) == "▅"
    assert len(sparkline(list(range(10)), width=7)) == 7
    assert sparkline([float("nan"), 1.0, 2.0, float("inf")]) == "×▁█×"
    assert sparkline([float("nan"), 1.0, 1.0], width=2) == "×▁"
    assert sparkline([float("-inf"), 0.5], span=(0, 1)) == "×▅"


def test_a_round_is_one_line_of_80_columns() -> None:
    full = Round(100, 0.98765, 12.3456, 1.0, clients=100, bytes_up=123_456_789, seconds=42)
    assert len(round_line(full, 100)) <= 80
    assert round_line(Round(3, 0.5, 1.25, clients=4, bytes_up=1500, seconds=0.25), 10) == (
        "round  3/10  accuracy 0.5000  loss 1.2500  4 clients  up 1.5 kB  0.2 s"
    )
    assert round_line(Round(3, train_loss=0.5, clients=4, refused=1), 3) == (
        "round 3/3  training loss 0.5000  4/5 clients  up 0 B  0.0 s"
    )


def test_plain_lines_of_a_run_and_its_baseline(tmp_path: Path) -> None:
    lines: list[str] = []
    experiment = tiny("rounds=2", baselines=["local-only"])
    result = run(experiment, tmp_path, PlainHook(lines.append, experiment))
    assert lines[0] == "tiny: fedavg · mlp · full · 4 clients · 2 rounds"
    assert [line[:9] for line in lines[1:4]] == ["round 0/2", "round 1/2", "round 2/2"]
    assert lines[4].startswith(f"local-only: accuracy {result.summary['accuracy_local_only']:.4f} after ")
    assert len(lines) == 5


def test_many_notices_of_a_round_are_counted() -> None:
    lines: list[str] = []
    hook = PlainHook(lines.append)
    hook.start(tiny(), 0)
    for number in range(10):
        hook.notice(f"client {number}")
    hook.round(Round(1))
    assert lines[1:4] == ["note: client 0", "note: client 1", "note: client 2"]
    assert lines[4] == "note: and 7 more of this kind (see clients.jsonl)"
    hook.notice("again")
    assert lines[-1] == "note: again"


def test_log_lines_are_flushed_one_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    hook = LogHook()
    hook.notice("before the start")
    hook.start(tiny(), 3)
    hook.round(Round(3, 0.5, 1.0, clients=4))
    assert capsys.readouterr().out.splitlines() == [
        "note: before the start",
        "note: going on after round 2",
        "tiny: fedavg · mlp · full · 4 clients · 3 rounds",
        "round 3/3  accuracy 0.5000  loss 1.0000  4 clients  up 0 B  0.0 s",
    ]


def test_the_live_display_fits_and_shows_where_the_run_is() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=25)
    hook = LiveHook(console, tiny("rounds=100"))
    assert "loading" in _picture(hook)
    hook.start(tiny("rounds=100"), 0)
    for number in range(60):
        sent = {"bytes_up": 10**7, "bytes_down": 10**7}
        hook.round(Round(number, 0.01 * number, 1.0, clients=4, seconds=1500, **sent))
    hook.sent(60, "train", 4)
    hook.reply(60, "train", 0, None)  # type: ignore[arg-type]
    picture = _picture(hook)
    assert "59/100" in picture
    assert "1/4" in picture
    assert "training" in picture
    assert "0.590" in picture
    assert "↑ 10.0 MB  ↓ 10.0 MB" in picture
    assert "h 05 min left" in picture or "h 04 min left" in picture
    hook.finish({})
    hook.start(tiny("rounds=100", name="local-only"), 0)
    hook.round(Round(0, 0.25, 1.0))
    picture = _picture(hook)
    assert "local-only" in picture
    assert "accuracy 0.250" in picture
    assert "training" not in picture
    assert all(len(line.rstrip()) <= 80 and "…" not in line for line in picture.splitlines())


def test_the_live_display_vanishes_and_leaves_notices() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with LiveHook(console) as hook:
        hook.start(tiny(), 0)
        hook.notice("client 3 is late [/no markup]")
    assert "client 3 is late [/no markup]" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_reply_costs_microseconds() -> None:
    hook = LiveHook(Console(file=io.StringIO(), force_terminal=True))
    hook.start(tiny(), 0)
    started = time.perf_counter()
    for client in range(10_000):
        hook.reply(1, "train", client, None)  # type: ignore[arg-type]
    assert time.perf_counter() - started < 0.1


def _picture(hook: LiveHook) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(hook)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_the_data_card_comes_once_before_the_first_round(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    file = tmp_path / "mine.npz"
    np.savez(file, train_images=rng.integers(0, 256, (40, 5, 5)), train_labels=np.arange(40) % 2 + 7)
    experiment = tiny("rounds=1", data={"name": f"npz:{file}"}, baselines=["local-only"])
    for watch in (True, False):
        lines: list[str] = []
        console = Console(file=io.StringIO(), width=200)
        hook = PlainHook(lines.append, experiment) if watch else LiveHook(console, experiment)
        summary = run(experiment, tmp_path / f"runs{watch}", hook).summary
        if not watch:
            lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        shown = [line for line in lines if "data: " in line]
        assert [line.split("data: ")[1] for line in shown] == summary["data_card"]
        assert "32 training and 8 test samples, uint8 [1, 5, 5], 2 classes: 7, 8" in shown[0]
        if watch:
            assert lines.index(shown[0]) < next(n for n, line in enumerate(lines) if "round 0" in line)
    lines = []
    assert "data_card" not in run(tiny("rounds=1"), tmp_path / "bundled", PlainHook(lines.append)).summary
    assert not any("data: " in line for line in lines)
