"""What `pga` takes a client to weigh: its share among those who trained in its last round with others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedsim.errors import UserError
from fedsim.forgetting.methods import Plan, _share
from fedsim.forgetting.request import Origin, Request
from fedsim.runs import Run
from tests.helpers import tiny


def plan(folder: Path, rounds: list[dict[int, Any]], *overrides: str, ids: tuple[int, ...] = (2,)) -> Plan:
    """A run whose clients said these examples (or an error) round by round."""
    folder.mkdir(exist_ok=True)
    rows: list[dict[str, Any]] = []
    for number, said in enumerate(rounds, start=1):
        for client, examples in said.items():
            row = {"round": number, "client": client, "phase": "train"}
            rows.append(row | (examples if isinstance(examples, dict) else {"num-examples": examples}))
            rows.append({**row, "phase": "evaluate", "num-examples": 1000})
    (folder / "clients.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Plan(Origin(Run(folder), tiny(*overrides), ()), Request("client", ids), 1, folder)


def test_only_those_who_took_part_count_by_their_examples(tmp_path: Path) -> None:
    refused = {"error": "out of memory"}, {"num-examples": None}
    rounds = [{0: 10, 1: 10, 2: 60}, {1: 40, 2: 60, 3: refused[0], 4: refused[1]}, {0: 10, 3: 10}]
    assert _share(plan(tmp_path, rounds), 2) == 0.6
    assert _share(plan(tmp_path, rounds), 0) == 0.5


def test_it_follows_the_weighting_of_the_run(tmp_path: Path) -> None:
    rounds = [{k: {"num-examples": n, "samples": s} for k, n, s in ((0, 10, 32), (1, 30, 32), (2, 60, 16))}]
    assert _share(plan(tmp_path, rounds, "strategy.weighting=uniform"), 2) == pytest.approx(1 / 3)
    assert _share(plan(tmp_path, rounds, "strategy.weighting=samples-seen"), 2) == 0.2
    assert _share(plan(tmp_path, rounds), 2) == 0.6


def test_clients_forgotten_before_are_no_longer_in_the_mean(tmp_path: Path) -> None:
    rounds = [{0: 50, 1: 30, 2: 20}]
    assert _share(plan(tmp_path, rounds, ids=(0, 2)), 2) == 0.4
    assert _share(plan(tmp_path, rounds, "forget.clients=[1]"), 2) == pytest.approx(2 / 7)


def test_a_client_that_trained_alone_or_never_has_no_share(tmp_path: Path) -> None:
    assert _share(plan(tmp_path, [{0: 5, 2: 5}, {2: 5}]), 2) == 0.5  # the last round with others
    for rounds in ([{2: 5}], [{0: 5, 1: 5}], [{0: 0, 2: 5}]):
        with pytest.raises(UserError, match="client 2 never trained in a round with others"):
            _share(plan(tmp_path, rounds), 2)
