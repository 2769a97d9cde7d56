"""Lines carry what they are given, whole, and say when the other end is gone."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from fedsim import messages
from fedsim.averaging import WeightedAverage
from fedsim.engine import line as lines
from fedsim.engine import objects
from fedsim.engine.line import Bell, Door, HungUp, Line
from tests.engine.ray_apps import noisy_app
from tests.engine.test_ray import rounds


def echo(door: Door) -> None:
    for line, (head, buffers) in door.orders():
        line.send((bytes(head), [pickle.PickleBuffer(buffer) for buffer in buffers]))


def test_what_is_sent_arrives_whole_and_aligned() -> None:
    """More buffers than one call of the system takes, empty ones, and more bytes than a socket holds."""
    door = Door()
    thread = threading.Thread(target=echo, args=[door])
    thread.start()
    line = Line.to(door.path)
    rng = np.random.default_rng(0)
    sizes = [*rng.integers(0, 300, 2000).tolist(), 0, 3_000_000]
    sent: dict[str, Any] = {"text": "x", "arrays": [rng.standard_normal(size) for size in sizes]}
    for _ in range(3):
        line.send(objects.pack(sent))
    for _ in range(3):
        found = objects.unpack(line.receive())
        assert found["text"] == "x"
        assert all(map(np.array_equal, found["arrays"], sent["arrays"]))
        assert all(array.flags.aligned for array in found["arrays"])
    line.close()
    thread.join(timeout=10)
    assert not thread.is_alive()


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
    assert objects.unpack(line.receive()) == "hello"
    line.close()
    thread.join(timeout=10)


def test_half_a_message_is_none() -> None:
    door = Door()
    line = Line.to(door.path)
    line._end.sendall(np.array([1, 100], np.int64).tobytes() + b"too little")
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
def test_small_and_large_contents_take_turns() -> None:
    """Over lines, through Ray's store, over lines again: no bit differs from the serial engine's."""
    sizes = [0, 700_000, 0, 700_000]
    near: list[bool] = []

    def play(**engine: Any) -> Any:
        def enlarge(grid: Any) -> None:
            send, left = grid.send_and_receive, iter(sizes)

            def larger(out: Iterable[Message], **options: Any) -> Any:
                more = messages.arrays_of({"more": np.ones(next(left), np.float32)})
                instructions = [*out]
                for message in instructions:
                    message.content["more"] = more
                found = send(instructions, **options)
                if hasattr(grid, "pool"):
                    near.append(any(slot.line is not None for slot in grid.pool._slots))
                return found

            grid.send_and_receive = larger

        return vars(rounds(noisy_app(), WeightedAverage(), count=len(sizes), on_start=enlarge, **engine))

    assert play(engine="ray", workers=2) == play(engine="serial")
    assert near == [True, False, True, False]
