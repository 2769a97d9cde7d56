"""Client apps that misbehave, for the tests of RayGrid (workers import them)."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord
from flwr.clientapp import ClientApp

from fedsim import messages


def noisy_app() -> ClientApp:
    """Adds noise that follows from the seed of the message, counts its calls in the client's state, and
    adds up what else it is sent."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        record = message.content["arrays"]
        assert isinstance(record, ArrayRecord)
        calls = counted(context)
        noise = np.random.rand() + random.random()
        values = {k: (a.numpy() * 0.5 + noise + calls).astype(a.dtype) for k, a in record.items()}
        who = int(context.node_config["partition-id"])
        metrics = {messages.EXAMPLES: 1 + who, "calls": calls, "noise": noise}
        if "more" in message.content:
            metrics["more"] = float(message.content.array_records["more"]["more"].numpy().sum())
        return messages.reply(message, messages.arrays_of(values), metrics)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        seen = {"devices": os.environ.get("CUDA_VISIBLE_DEVICES", "?")}
        metrics = {"calls": counted(context), "pid": os.getpid()}
        return messages.reply(message, metrics=metrics, config=seen)

    return app


def slow_app(folder: str, seconds: float = 0.05) -> ClientApp:
    """The noisy app with clients that take a while and leave their process's id in a folder."""
    app, noisy = ClientApp(), noisy_app()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        Path(folder, str(os.getpid())).touch()
        time.sleep(seconds)
        return noisy(message, context)

    return app


def busy_app(folder: str) -> ClientApp:
    """Clients that leave a file when they are called, sleep as long as they are told, wait for a file (a
    minute at most), and answer with how often they were called and what they found."""
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        said = message.content.config_records.get("config", {})
        who = int(context.node_config["partition-id"])
        Path(folder, f"{who}-{time.monotonic_ns()}").touch()
        end = time.monotonic() + 60
        if said.get("wait-for", -1) == who:
            while not Path(folder, "go").exists() and time.monotonic() < end:
                time.sleep(0.01)
        while said.get("stubborn", -1) == who and time.monotonic() < end:
            with suppress(BaseException):
                time.sleep(1)
        if said.get("sleeper", -1) == who:
            time.sleep(60)
        if said.get("loses", -1) == who:
            raise ValueError("the sensor is broken")
        seen = {"tag": str(context.node_config.get("tag", "")), "mode": str(context.run_config["mode"])}
        context.node_config["tag"] = f"{seen['tag']}{who}"
        if said.get("mode"):
            context.run_config["mode"] = said["mode"]
        metrics = {"calls": counted(context), "who": who, "x": float(said.get("x", 0)), "p": random.random()}
        return messages.reply(message, metrics=metrics, config=seen)

    return app


def importing_app() -> ClientApp:
    """Clients that import torch when they are asked, and draw from it."""
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        late = "torch" not in sys.modules
        import torch

        drawn = {"t": torch.rand(()).item(), "threads": torch.get_num_threads(), "late": int(late)}
        return messages.reply(message, metrics=drawn)

    return app


def counted(context: Context) -> int:
    """How often this client was called, from its state."""
    record = context.state.get("calls", MetricRecord({"n": 0}))
    calls = int(record["n"]) + 1  # type: ignore[arg-type]
    context.state["calls"] = MetricRecord({"n": calls})
    return calls


def faulty_app(fault: str, who: int, folder: str) -> ClientApp:
    """Client `who` does something bad; the others return what they got plus one."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        record = message.content["arrays"]
        assert isinstance(record, ArrayRecord)
        values = {k: a.numpy() + np.ones((), a.dtype) for k, a in record.items()}
        client = int(context.node_config["partition-id"])
        Path(folder, f"{client}-{os.getpid()}-{time.monotonic_ns()}").touch()
        if client == who:
            values = FAULTS[fault](values, Path(folder))
        return messages.reply(message, messages.arrays_of(values), {messages.EXAMPLES: 1})

    return app


def _die_once(values: Any, folder: Path) -> Any:
    if not (folder / "died").exists():
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return values


def _raise(values: Any, folder: Path) -> Any:
    raise ValueError("the sensor is broken")


def _exhaust(values: Any, folder: Path) -> Any:
    hoard = []
    while True:
        hoard.append(np.ones(2**24))


FAULTS: dict[str, Any] = {
    "raises": _raise,
    "exits": lambda v, f: sys.exit(3),
    "dies": lambda v, f: os._exit(1),
    "killed": lambda v, f: os.kill(os.getpid(), signal.SIGKILL),
    "dies once": _die_once,
    "hangs": lambda v, f: time.sleep(600),
    "NaN": lambda v, f: {k: a * np.nan for k, a in v.items()},
    "wrong names": lambda v, f: {f"{k}.": a for k, a in v.items()},
    "wrong shapes": lambda v, f: {k: a[:-1] for k, a in v.items()},
    "absurd size": lambda v, f: dict.fromkeys(v, np.zeros(10**7)),
    "out of memory": _exhaust,
}


def meeting_app(folder: str, workers: int) -> ClientApp:
    """Clients that wait (a minute at most) until as many workers are at work at the same time."""
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        Path(folder, str(os.getpid())).touch()
        until = time.monotonic() + 60
        while len(os.listdir(folder)) < workers and time.monotonic() < until:
            time.sleep(0.02)
        seen = {"devices": os.environ.get("CUDA_VISIBLE_DEVICES", "?")}
        return messages.reply(message, metrics={"pid": os.getpid()}, config=seen)

    return app
