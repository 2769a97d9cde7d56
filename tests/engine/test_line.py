"""Lines carry what they are given, whole, and say when the other end is gone."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict

from fedsim import messages
from fedsim.averaging import WeightedAverage
from fedsim.engine import line as lines
from fedsim.engine import objects
from fedsim.engine.line import Bell, Door, HungUp, Line
from fedsim.engine.sheet import Sheet
from tests.engine.ray_apps import noisy_app
from tests.engine.test_ray import rounds


def echo(door: Door) -> None:
    for line, (head, buffers), sheets in door.orders():
        line.send((bytes(head), [pickle.PickleBuffer(buffer) for buffer in buffers]), sheets)
        for sheet in sheets:
            sheet.close()


@pytest.mark.parametrize("size", [30_000, 3_000_000])
def test_what_is_sent_arrives_whole_and_aligned(size: int) -> None:
    """More buffers than one call of the system takes, empty ones, more bytes than a socket holds; a sheet."""
    door = Door()
    thread = threading.Thread(target=echo, args=[door])
    thread.start()
    line = Line.to(door.path)
    rng = np.random.default_rng(0)
    sizes = [*rng.integers(0, 300, 2000).tolist(), 0, size]
    sent: dict[str, Any] = {"text": "x", "arrays": [rng.standard_normal(size) for size in sizes]}
    for _ in range(3):
        line.send(objects.pack(sent))
    for _ in range(3):
        packed, sheets = line.receive()
        found = objects.unpack(packed)
        assert not sheets
        assert found["text"] == "x"
        assert all(map(np.array_equal, found["arrays"], sent["arrays"]))
        assert all(array.flags.aligned for array in found["arrays"])
    line.close()
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_sheets_come_along_and_leave_nothing_open() -> None:
    """Beside a small message and beside one that is a sheet itself; the same memory for whoever reads."""
    files = os.listdir("/proc/self/fd")
    door = Door()
    thread = threading.Thread(target=echo, args=[door])
    thread.start()
    line = Line.to(door.path)
    state = [np.arange(5.0), np.ones((2, 3), np.float32)]
    with Sheet.of(objects.pack(state)) as sheet:
        for size in (1, 1_000_000):
            line.send(objects.pack(np.zeros(size)), [sheet, sheet])
            packed, back = line.receive()
            assert objects.unpack(packed).shape == (size,)
            assert len(back) == 2
            read = [objects.unpack(one.read(shared=True)) for one in back]
            assert all(np.array_equal(a, b) for found in read for a, b in zip(found, state, strict=True))
            assert not read[0][0].flags.writeable
            mine = objects.unpack(sheet.read())
            mine[0][3] = state[0][3] = 10.0 * size
            assert read[1][0][3] == 10.0 * size
            for one in back:
                one.close()
            del packed, read, mine
    line.close()
    thread.join(timeout=10)
    assert os.listdir("/proc/self/fd") == files


def test_more_sheets_than_may_be_open_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsim.engine.sheet._MAPPED", 1)
    with Sheet.of(objects.pack(np.arange(9.0))) as sheet:
        found = [objects.unpack(sheet.read(shared=True)) for _ in range(2)]
        objects.unpack(sheet.read())[0] = 7.0  # a copy, too
    assert [len(one) for one in found] == [9, 9]
    assert found[0][0] == found[1][0] == 0.0
    assert not any(one.flags.writeable for one in found)


def test_who_hangs_up_is_heard() -> None:
    door, bell = Door(), Bell()
    ended = threading.Event()

    def listen() -> None:
        assert not [*door.orders()]
        ended.set()

    thread = threading.Thread(target=listen)
    thread.start()
    line = Line.to(door.path)
    assert lines.wait([line], bell, 0.01) == ([], False)
    bell.ring()
    assert lines.wait([line], bell, 10) == ([], True)
    assert lines.wait([line], bell, 0.01) == ([], False)
    line.close()
    assert ended.wait(10)
    thread.join(timeout=10)
    bell.close()
    bell.ring()  # from a thread that comes too late
    with pytest.raises(OSError, match="refused"):
        Line.to(door.path)


def test_somebody_else_is_not_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    door, users = Door(), iter([os.getuid() + 1, os.getuid()])
    stranger, line = Line.to(door.path), Line.to(door.path)
    monkeypatch.setattr("os.getuid", lambda: next(users))
    thread = threading.Thread(target=echo, args=[door])
    thread.start()
    with pytest.raises(HungUp):
        stranger.receive()
    line.send(objects.pack("hello"))
    assert objects.unpack(line.receive()[0]) == "hello"
    line.close()
    thread.join(timeout=10)


def test_half_a_message_is_none() -> None:
    door = Door()
    line = Line.to(door.path)
    line._end.sendall(np.array([0, 100], np.int64).tobytes() + b"too little")
    line.close()
    assert not [*door.orders()]
    other = Door()
    line = Line.to(other.path)
    other._listening.accept()[0].close()
    other.close()
    with pytest.raises(HungUp):
        line.receive()
    line.close()


@pytest.mark.usefixtures("shared_ray")
def test_contents_of_all_sizes_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    """For everybody or for one client; where there are too many sheets, through Ray: no bit differs."""
    larger = [(0, 1), (700_000, 1), (700_000, 13), (0, 2), (700_000, 2), (0, 1)]
    near: list[bool] = []

    def play(**engine: Any) -> Any:
        def enlarge(grid: Any) -> None:
            send, left = grid.send_and_receive, iter(larger)

            def enlarged(out: Iterable[Message], **options: Any) -> Any:
                instructions = [*out]
                size, kinds = next(left)
                more = [messages.arrays_of({"more": np.full(size, k, np.float32)}) for k in range(kinds)]
                for number, message in enumerate(instructions):
                    content = RecordDict(dict(message.content))
                    content["more"] = more[number % kinds]
                    message.content = content
                found = send(instructions, **options)
                if hasattr(grid, "pool"):
                    near.append(any(slot.line is not None for slot in grid.pool._slots))
                return found

            grid.send_and_receive = enlarged

        return vars(rounds(noisy_app(), WeightedAverage(), count=len(larger), on_start=enlarge, **engine))

    monkeypatch.setattr("fedsim.engine.ray.MOST", 1)
    assert play(engine="ray", workers=2) == play(engine="serial")
    assert near == [True, True, True, True, False, True]
