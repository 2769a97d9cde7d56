"""Toy clients and a grid, so that a strategy's unit test runs in milliseconds and needs no model.

def shift(client, arrays, config):                      # what a toy client answers
    return {"w": arrays["w"] + client}, {"num-examples": 10 * (client + 1), "loss": 0.0}

played = play(MyStrategy(), {"w": np.zeros(3, np.float32)}, shift, clients=4, rounds=2)
played.arrays["w"], played.metrics, played.cohorts
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from fedsim import messages
from fedsim.engine.simulate import simulate

Arrays = dict[str, NDArray[Any]]
#: (client, arrays, config) -> (arrays, metrics); `num-examples` must be among the metrics
Answer = Callable[[int, Arrays, Mapping[str, Any]], tuple[Arrays, dict[str, float]]]


@dataclass
class Played:
    """What a strategy did.

    Attributes:
        arrays: the shared state at the end.
        metrics: aggregated training metrics of every round.
        cohorts: clients that were asked to train, per round.
        strategy: the strategy after the last round.
    """

    arrays: Arrays
    metrics: list[dict[str, Any]]
    cohorts: list[list[int]]
    strategy: Strategy
    history: list[Arrays] = field(default_factory=list)  #: the shared state after every round


def average_of_ones(
    client: int, arrays: Arrays, config: Mapping[str, Any]
) -> tuple[Arrays, dict[str, float]]:
    """A toy answer: adds 1 to every floating entry; client k trained on 10·(k+1) examples."""
    moved = {k: v + np.ones((), v.dtype) if v.dtype.kind == "f" else v for k, v in arrays.items()}
    return moved, {messages.EXAMPLES: 10 * (client + 1), "loss": 1.0 / (client + 1)}


def toy_client_app(answer: Answer = average_of_ones) -> ClientApp:
    """A ClientApp whose `train` is a plain function of numpy arrays; an exception makes an error reply."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        record = message.content[messages.ARRAYS]
        assert isinstance(record, ArrayRecord)
        arrays = {name: array.numpy() for name, array in record.items()}
        config = dict(messages.config_of(message).items())
        values, metrics = answer(int(context.node_config["partition-id"]), arrays, config)
        return messages.reply(message, messages.arrays_of(values), metrics)

    return app


def play(
    strategy: Strategy,
    start: Mapping[str, NDArray[Any]],
    answer: Answer = average_of_ones,
    *,
    clients: int = 4,
    rounds: int = 1,
    first_round: int = 1,
    seed: int = 0,
    reorder: Callable[[list[Message]], list[Message]] = lambda replies: replies,
    engine: str = "serial",
) -> Played:
    """Run a strategy's training rounds against toy clients.

    Args:
        strategy: any Flower strategy.
        start: initial shared state.
        answer: what a client does.
        clients: how many there are.
        rounds: how many rounds are played.
        first_round: number of the first one (to go on with an earlier play).
        seed: of the run (sampling).
        reorder: changes the list of replies before the strategy sees it.
        engine: name of the engine.

    Returns:
        What came out.
    """
    played = Played({}, [], [], strategy)
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        arrays = messages.arrays_of(start)
        who = messages.roster(grid)
        for number in range(first_round, first_round + rounds):
            config = ConfigRecord({messages.ROUND: number, messages.SEED: seed})
            out = list(strategy.configure_train(number, arrays, config, grid))
            played.cohorts.append(sorted(who.client(m.metadata.dst_node_id) for m in out))
            replies = reorder(list(grid.send_and_receive(out)))
            changed, metrics = strategy.aggregate_train(number, replies)
            arrays = arrays if changed is None else changed
            played.metrics.append(dict((metrics or {}).items()))
            played.history.append({k: np.array(v) for k, v in messages.views_of(arrays).items()})
        played.arrays = {k: np.array(v) for k, v in messages.views_of(arrays).items()}

    simulate(app, toy_client_app(answer), clients, engine=engine, seed=seed)
    return played
