"""Usage errors: the nearest command once, and options that are keys of the experiment."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from fedsim.cli import app


def said(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    return result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (["runn"], "run"),
        (["swep", "x"], "sweep"),
        (["assets", "fetsch"], "fetch"),
        (["assets", "lst"], "list"),
    ],
)
def test_the_nearest_command_is_named_once(arguments: list[str], nearest: str) -> None:
    line = said(*arguments)
    assert line.endswith(f": did you mean '{nearest}'?")
    assert line.lower().count("did you mean") == 1


HINTS = {
    "run --rounds 5": "--set rounds=5",
    "run x.toml --rounds=5": "--set rounds=5",
    "run --seed --json": "--set seed=VALUE",
    "sweep x --seed 0,1": "--grid seed=0,1",
    "sweep x --seed 3": "--set seed=3",
    "run --strategy fedavg": "--set strategy.name=fedavg",
    "run --client.lr 0.1": "--set client.lr=0.1",
    "memory --shots 4": "--set partition.shots=4",
    "list partitions --record-updates true": "--set checkpoints.record_updates=true",
    "forget x --every 2": "--set evaluation.every=2",
}


@pytest.mark.parametrize("command", HINTS)
def test_a_key_as_an_option_is_answered_with_set(command: str) -> None:
    line = said(*command.split())
    assert line.endswith(f"; a key of the experiment is given with {HINTS[command]}")


def test_an_unknown_option_is_answered_by_what_it_looks_like() -> None:
    assert said("run", "--lr", "1").endswith("given with --set, such as --set client.lr=0.01")
    assert said("run", "--overwrit").endswith("Did you mean '--overwrite'?")
    assert "--set" not in said("resume", "x", "--seed", "3"), "resume has no --set"
