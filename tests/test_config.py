"""Experiment files: complete, strict, and every error names file, key and the nearest right one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fedsim import config
from fedsim.errors import UserError
from fedsim.finish import baseline


@pytest.mark.parametrize("path", sorted(config.shipped_folder().glob("*.toml")), ids=lambda p: p.stem)
def test_every_shipped_experiment_is_valid_and_survives_a_round_trip(path: Path) -> None:
    loaded = config.load(path)
    assert loaded.name == path.stem.replace("_", "-")
    assert config.from_json(loaded.json()).document() == loaded.document()
    assert path.read_text("utf-8").startswith("#"), "a shipped file says what it is and how to run it"


def test_found_by_name_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (None, "quickstart", "quickstart.toml", "experiments/quickstart.toml"):
        assert config.load(name).name == "quickstart"
    with pytest.raises(UserError, match="no experiment file 'nope'"):
        config.load("nope")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("partition.alhpa=1.0", r"unknown key 'alhpa' in \[partition\] \(dirichlet\): did you mean 'alpha'"),
        ("strategy.name=fedtun", "did you mean 'fedtune'"),
        ("data.name=digit", "did you mean 'digits'"),
        ("tuning.name=biases", "did you mean 'bias'"),
        ("tuning.name=BIAS", "did you mean 'bias'"),
        ("tuning=bias", "--set tuning=bias: 'tuning' is a section: set tuning.name"),
        ("tuning.nam=bias", "did you mean 'name'"),
        ("model.name=resnet99", r"\[model\] unknown name 'resnet99'"),
        ("partition.alpha=0.0", r"alpha: input should be greater than 0 \(got 0\.0\)"),
        ("partition.alpha=-1.0", "greater than 0"),
        ("partition.clients=0", "greater than or equal to 1"),
        ("rounds=ten", "rounds: input should be a valid integer"),
        ("rounds=1.5", "rounds: input should be"),
        ('client.lr="fast"', "lr: input should be a valid number"),
        ("client.optimizer=sdg", "optimizer: input should be 'sgd' or 'adamw'"),
        ("client.epochs=true", "epochs: input should be"),
        (
            "strategy.name=promptfl",
            r'promptfl\' is a method for \[tuning\] name = "prompt", not "bias"; set tuning',
        ),
        ("sedd=3", "unknown key or section 'sedd': did you mean 'seed'"),
        ("evaluation.evry=3", r"unknown key 'evry' in \[evaluation\]: did you mean 'every'"),
        ("name=a/b", "must begin with a letter or digit"),
        ("strategy.name=os:path", "'os:path' is a module, not a class or function"),
        ("rounds", "expected KEY=VALUE"),
        ("rounds.x=1", "'rounds' is a value, not a section"),
        ("client.name=nowhere.module:make", "cannot import 'nowhere.module:make'"),
    ],
)
def test_mistakes(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        config.load("quickstart", [override])
    assert "\n" not in str(caught.value)
    if "=" in override:
        assert override in str(caught.value).partition(": ")[0], "the override is blamed, not the file"


def test_file_mistakes_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("rounds = \n")
    with pytest.raises(UserError, match=r"mine\.toml: not valid TOML"):
        config.load(path)
    path.write_text("[client]\nlearning_rate = 1\n")
    with pytest.raises(UserError, match=r"mine\.toml: unknown key 'learning_rate'"):
        config.load(path)
    path.write_text("client = 3\n")
    with pytest.raises(UserError, match=r"'client' is a section: set client"):
        config.load(path)


def test_overrides_are_toml_and_bare_words() -> None:
    loaded = config.load(
        "quickstart", ["rounds=3", "client.lr=1e-3", "tuning.name=full", "partition.clients=4"]
    )
    assert loaded.rounds == 3
    assert loaded["client"].options["lr"] == 1e-3
    assert loaded["tuning"].name == "full"
    assert loaded.clients == 4


def test_another_name_drops_the_keys_of_the_former_object_and_keeps_the_common_ones() -> None:
    loaded = config.load("quickstart", ["partition.name=iid"])
    assert "alpha" not in loaded["partition"].options
    assert loaded["partition"].common["clients"] == 10


def test_the_order_of_overrides_does_not_matter() -> None:
    for overrides in (["client.lr=0.5", "client.name=standard"], ["client.name=standard", "client.lr=0.5"]):
        options = config.load("quickstart", overrides)["client"].options
        assert options["lr"] == 0.5
        assert options["optimizer"] == "adamw", "the name was the default already: the file's keys stay"


def test_strategy_defaults_fill_and_the_file_wins(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('[strategy]\nname = "fedtune"\n')
    assert config.load(path)["tuning"].name == "bias"
    path.write_text('[strategy]\nname = "fedtune"\n[tuning]\nname = "head"\n')
    assert config.load(path)["tuning"].name == "head"
    path.write_text('[strategy]\nname = "local-only"\n')
    assert config.load(path).settings["payload"]["personal"] == ["*"]
    path.write_text('[strategy]\nname = "centralised"\n[partition]\nclients = 7\n')
    assert config.load(path).clients == 1


def test_a_baseline_differs_in_its_strategy_alone() -> None:
    whole = config.load("quickstart", ["strategy.fraction=0.5"])
    alone = baseline(whole, "local-only")
    assert alone["tuning"] == whole["tuning"]
    assert alone["client"] == whole["client"]
    assert alone["strategy"].options["fraction"] == 0.5
    assert alone.settings["payload"]["personal"] == ["*"]
    assert baseline(whole, "centralised").clients == 1


def test_digest_ignores_what_cannot_change_a_result() -> None:
    base = config.load("quickstart").digest()
    same = config.load("quickstart", ["name=other", "checkpoints.every=5", "baselines=[]"])
    assert same.digest() == base
    for change in ("seed=1", "client.lr=0.001", "rounds=3", "engine.threads=2"):
        assert config.load("quickstart", [change]).digest() != base


def test_a_users_own_modules_are_found_and_never_shadow_ours(tmp_path: Path) -> None:
    (tmp_path / "my_strategy.py").write_text(
        "from fedsim.averaging import WeightedAverage\n\n"
        "class Mine(WeightedAverage):\n"
        '    """Mine."""\n\n'
        "    def __init__(self, scale: float = 1.0) -> None:\n"
        "        super().__init__()\n"
        "        self.scale = scale\n"
    )
    (tmp_path / "strategies").mkdir()
    (tmp_path / "strategies" / "__init__.py").write_text("raise RuntimeError('shadowed')\n")
    path = tmp_path / "mine.toml"
    path.write_text('[strategy]\nname = "my_strategy:Mine"\nscale = 2.0\n')
    loaded = config.load(path)
    assert loaded.build("strategy").scale == 2.0
    assert sys.path.index(str(tmp_path)) > 0
    path.write_text('[strategy]\nname = "my_strategy:Mine"\nscael = 2.0\n')
    with pytest.raises(UserError, match="did you mean 'scale'"):
        config.load(path)


def test_sweep_section_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text('[sweep]\nseed = [0, 1]\n"client.lr" = [0.1]\n')
    assert config.load(path).sweep == {"seed": [0, 1], "client.lr": [0.1]}
    path.write_text("[sweep]\nseed = 3\n")
    with pytest.raises(UserError, match="must be a list"):
        config.load(path)
