"""Lines carry what they are given, whole, and say when the other end is gone."""

from __future__ import annotations

import os
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
from fedsim.engine.sheet import Stock, laid_out
from tests.engine.ray_apps import noisy_app
from tests.engine.test_ray import rounds


def echo(door: Door) -> None:
    for line, (head, buffers), sheets in door.orders():
        found = objects.unpack((head, buffers)), [objects.unpack(sheet) for sheet in sheets]
        line.send(objects.pack(found))


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
        found, _ = objects.unpack(packed)
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
    door, stock = Door(), Stock()
    orders: list[Any] = []

    def read() -> None:
        for line, message, sheets in door.orders():
            orders.append((objects.unpack(message), [objects.unpack(sheet) for sheet in sheets]))
            line.send(objects.pack("read"))

    thread = threading.Thread(target=read)
    thread.start()
    line = Line.to(door.path)
    state = [np.arange(5.0), np.ones((2, 3), np.float32)]
    sheet = stock.written(laid_out(objects.pack(state)))
    for size in (1, 1_000_000):
        line.send(objects.pack(np.zeros(size)), [sheet])
        line.receive()
        message, [found] = orders.pop()
        assert message.shape == (size,)
        assert all(map(np.array_equal, found, state))
        assert not found[0].flags.writeable
        sheet._bytes[:] = sheet._bytes[::-1]
        assert not np.array_equal(found[0], state[0])  # the same memory
        sheet._bytes[:] = sheet._bytes[::-1]
        del message, found
    sheet.give_back()
    stock.close()
    line.close()
    thread.join(timeout=10)
    assert os.listdir("/proc/self/fd") == files


def test_a_sheet_is_written_again_when_nobody_reads_it() -> None:
    """What is kept stays as it is, and is sent anew elsewhere; the rest takes no memory more than once."""
    door = Door()
    thread = threading.Thread(target=echo, args=[door])
    thread.start()
    line = Line.to(door.path)
    kept: list[tuple[int, Any]] = []
    for number in range(30):
        line.send(objects.pack(np.full(300_000, float(number))))
        found, _ = objects.unpack(line.receive()[0])
        assert found.flags.writeable
        assert (found == number).all()
        if number in (3, 4, 20):
            kept.append((number, found[:1000]))
        del found
    assert all((found == number).all() for number, found in kept)
    assert len(line._mapped) <= len(kept) + 2
    assert len(line._stock._sheets) <= 3
    line.close()
    thread.join(timeout=10)
    assert all((found == number).all() for number, found in kept)


def test_a_sheet_that_grows_replaces_a_smaller_one() -> None:
    stock = Stock()
    first = stock.written([memoryview(bytes(100))])
    first.give_back()
    second = stock.written([memoryview(bytes(50))])
    assert second is first
    third = stock.written([memoryview(b"x" * 200)])
    assert third is not first
    second.give_back()
    third.give_back()
    fourth = stock.written([memoryview(bytes(300))])
    assert third.closed
    assert not first.closed
    fourth.share()
    fourth.give_back(stale=True)  # a reader that is gone may still look at it
    fourth.give_back()
    assert fourth.closed
    assert stock.written([memoryview(bytes(10))]) is first
    stock.close()
    assert first.closed


def test_the_largest_sheets_are_used_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsim.engine.sheet._LARGEST", 100)
    stock = Stock()
    small, large = (stock.written([memoryview(bytes(size))]) for size in (100, 101))
    small.give_back()
    large.give_back()
    assert [small.closed, large.closed] == [False, True]
    stock.close()


def test_who_hangs_up_is_heard_though_a_forked_child_has_the_socket() -> None:
    door = Door()
    thread = threading.Thread(target=echo, args=[door])
    thread.start()
    line = Line.to(door.path)
    copy = os.dup(line.fileno())
    line.close()
    thread.join(timeout=10)
    os.close(copy)
    assert not thread.is_alive()


def test_an_order_that_cannot_be_sent_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    door = Door()
    thread = threading.Thread(target=echo, args=[door])
    thread.start()
    line = Line.to(door.path)

    def fails(*_: object) -> None:
        raise OSError("Too many references")

    monkeypatch.setattr("fedsim.engine.line._write", fails)
    with pytest.raises(HungUp, match="Too many references"):
        line.send(objects.pack("order"))
    with pytest.raises(HungUp):
        line.receive()
    thread.join(timeout=10)
    line.close()
    assert not thread.is_alive()


def test_more_sheets_than_may_be_kept_are_used_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsim.engine.sheet._KEPT", 1)
    stock = Stock()
    sheets = [stock.written([memoryview(bytes(10))]) for _ in range(3)]
    for sheet in sheets:
        sheet.give_back()
    assert [sheet.closed for sheet in sheets] == [False, True, True]
    stock.close()


def test_more_sheets_than_may_be_open_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsim.engine.sheet._MAPPED", 2)
    door = Door()
    thread = threading.Thread(target=echo, args=[door])
    thread.start()
    line = Line.to(door.path)
    kept = []
    for number in range(6):
        line.send(objects.pack(np.full(300_000, float(number))))
        kept.append(objects.unpack(line.receive()[0])[0])
        kept[-1][0] += 1  # a copy may be written to as well
    assert [found[0] for found in kept] == [number + 1 for number in range(6)]
    assert [found[1] for found in kept] == [*range(6)]
    assert len(line._mapped) < 3
    line.close()
    thread.join(timeout=10)


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
    assert objects.unpack(line.receive()[0]) == ("hello", [])
    line.close()
    thread.join(timeout=10)


def test_half_a_message_is_none() -> None:
    door = Door()
    line = Line.to(door.path)
    line._end.sendall(np.array([0, 0, 100], np.int64).tobytes() + b"too little")
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

    monkeypatch.setattr("fedsim.engine.cargo.MOST", 1)
    assert play(engine="ray", workers=2) == play(engine="serial")
    assert near == [True, True, True, True, False, True]
