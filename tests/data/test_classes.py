"""Class names: names before positions, and a node's labels as the server's whatever its order."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedsim.building import OwnData, build, load_data
from fedsim.config import Experiment
from fedsim.data.classes import as_the_server, position_of, positions_of, written
from fedsim.data.sources import DIGIT_WORDS, Arrays, digits
from fedsim.errors import UserError
from tests.helpers import run, tiny

FOLDERS = ("0", "1", "10", "11", "2")  # as sorted names of folders
ANIMALS = ("cat", "dog", "emu")


@pytest.mark.parametrize(
    ("word", "names", "position"),
    [
        ("2", FOLDERS, 4),
        (2, FOLDERS, 4),
        ("10", FOLDERS, 2),
        ("index:2", FOLDERS, 2),
        ("1", ("1", "2", "3"), 0),
        (9, DIGIT_WORDS, 9),
        ("nine", DIGIT_WORDS, 9),
        ("index:9", DIGIT_WORDS, 9),
        ("1", ANIMALS, 1),
        ("index:1", ("x", "y", "index:1"), 2),  # a name comes first, whatever it looks like
        ("-1", ("1", "-1"), 1),
    ],
)
def test_names_come_before_positions(word: str | int, names: tuple[str, ...], position: int) -> None:
    assert position_of(word, names, "--class") == position


@pytest.mark.parametrize(
    ("word", "names", "said"),
    [
        ("4", FOLDERS, r"--class 4: no class is named '4'.*index:4 for the class at that position, '2'"),
        (0, ("1", "2"), "index:0 for the class at that position, '1'"),
        ("1", ("01", "02"), "did you mean '01'.*index:1 .* '02'"),
        ("2", ("0", "1", "unknown"), "'unknown'"),
        ("12", FOLDERS, "no such class; by number index:0 to index:4, or by name"),
        ("3", ANIMALS, "no such class; by number 0 to 2, or by name"),
        (-1, ANIMALS, "no such class"),
        ("index:3", ANIMALS, "no such class"),
        ("index:", ANIMALS, "no such class"),
        ("index:²", ANIMALS, "no such class"),
        ("dig", ANIMALS, "did you mean 'dog'"),
        ("cat", ("cat", "dog", "cat"), "2 classes have this name; write index:0 or index:2"),
    ],
)
def test_what_could_mean_two_classes_or_none_is_refused(
    word: str | int, names: tuple[str, ...], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        position_of(word, names, "--class")


@pytest.mark.parametrize(
    "names", [FOLDERS, DIGIT_WORDS, ("1", "2", "3"), ("07", "7"), ("cat", "5", "cat"), ("0", "1", "2")]
)
def test_what_is_written_down_is_read_back(names: tuple[str, ...]) -> None:
    words = [written(position, names) for position in range(len(names))]
    assert positions_of(words, names, "") == list(range(len(names)))
    assert positions_of([*words, *words], names, "") == list(range(len(names)))


def test_the_shortest_word_is_written() -> None:
    assert [written(p, FOLDERS) for p in (1, 2, 4)] == [1, "10", "2"]
    assert written(9, DIGIT_WORDS) == 9
    assert written(2, ("cat", "5", "cat")) == "index:2"


# ------------------------------------------------------------------------------- a node's own data


def arrays(classes: tuple[str, ...], train: list[int], test: list[int]) -> Arrays:
    x = np.zeros((9, 1, 2, 2), np.uint8)
    return Arrays(x[: len(train)], np.array(train), x[: len(test)], np.array(test), classes)


def test_labels_become_those_of_the_server() -> None:
    mine = as_the_server(arrays(("emu", "cat"), [0, 1, 1], [1, 0]), ANIMALS, "mine.npz")
    assert mine.classes == ANIMALS
    assert mine.train_y.tolist() == [2, 0, 0]
    assert mine.test_y.tolist() == [0, 2]
    assert mine.train_y.dtype == np.int64
    same = arrays(ANIMALS, [0, 2], [1])
    assert as_the_server(same, ANIMALS, "mine.npz") is same


def test_a_name_without_samples_is_of_no_account() -> None:
    """Unnamed labels 0 and 4 have the names 0 to 4, of which the server need not know 1 to 3."""
    mine = as_the_server(arrays(("0", "1", "2", "3", "4"), [0, 4], [4]), ("4", "0"), "mine.npz")
    assert mine.train_y.tolist() == [1, 0]
    assert mine.test_y.tolist() == [0]


@pytest.mark.parametrize(
    ("own", "server", "said"),
    [
        (
            ("cat", "eel"),
            ANIMALS,
            r"mine.npz: the server knows no class 'eel'; its classes are cat, dog, emu;",
        ),
        (("Cat", "Dog"), ANIMALS, r"no class 'Cat' \(nor 1 more\)"),
        (("0", "1"), ANIMALS, "no class '0'.*an array \"classes\""),
        (("cat", "cat"), ANIMALS, "class 'cat' occurs twice"),
        (("cat", "dog"), ("dog", "cat", "cat"), "class 'cat' occurs twice"),
        (("a", "b"), tuple(f"c{i}" for i in range(30)), r"c18, c19, \.\.\. \(30 in all\)"),
    ],
)
def test_classes_that_cannot_be_matched_are_named(
    own: tuple[str, ...], server: tuple[str, ...], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        as_the_server(arrays(own, [0, 1], [0]), server, "mine.npz")


def test_a_class_only_in_the_test_set_must_be_known_too() -> None:
    with pytest.raises(UserError, match="no class 'eel'"):
        as_the_server(arrays(("cat", "eel"), [0], [1]), ANIMALS, "mine.npz")


def folders(root: Path, counts: Mapping[str, int], *, size: int = 8) -> Path:
    """Grey images; every class has its own brightness."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            grey = np.full((size, size, 3), 40 + 20 * (sum(map(ord, name)) % 9), np.uint8)
            Image.fromarray(grey).save(root / name / f"{number}.png")
    return root


def on_folders(root: Path, *overrides: str, **tables: Any) -> Experiment:
    return tiny(*overrides, data={"name": f"imagefolder:{root}", "size": 8}, **tables)


def test_a_folder_without_a_class_trains_the_classes_that_it_has(tmp_path: Path) -> None:
    server = folders(tmp_path / "server", {"ant": 8, "bee": 8, "cow": 8})
    mine = folders(tmp_path / "mine", {"cow": 6, "bee": 3})
    experiment = on_folders(server, "partition.shots=2", "partition.clients=2")
    whole = build(experiment)
    classes = whole.data.arrays.classes
    ours = build(experiment, OwnData(str(mine), 1, classes=classes))
    assert ours.data.arrays.classes == ("ant", "bee", "cow")
    rows = ours.data.client(1)
    assert np.bincount(ours.data.arrays.train_y[rows], minlength=3).tolist() == [0, 2, 5]
    ours.load(whole.shared())  # one head for all
    lost = build(experiment.replace('forget.classes=["cow"]'), OwnData(str(mine), 1, classes=classes))
    assert set(lost.data.arrays.train_y[lost.data.client(1)]) == {1}


def test_a_node_need_not_have_the_new_classes(tmp_path: Path) -> None:
    server = folders(tmp_path / "server", {"ant": 8, "bee": 8, "cow": 8})
    mine = folders(tmp_path / "mine", {"bee": 5, "ant": 5})
    experiment = on_folders(server, "partition.new_classes=1", "partition.clients=2", "partition.shots=2")
    classes = load_data(experiment).arrays.classes
    ours = build(experiment, OwnData(str(mine), 0, classes=classes))
    assert len(ours.data.client(0)) == 8
    assert {"base_accuracy"} == {
        key for key in ours.evaluate_split("test") if key.startswith(("base", "new"))
    }


def test_text_features_of_a_node_are_in_the_order_of_the_server(tmp_path: Path) -> None:
    """A zero-shot head is made of the names: the same frozen model, and as good on the node's own labels."""
    found = digits()
    order = [4, 9, 0, 1]
    rows, tests = (np.flatnonzero(np.isin(y, order)) for y in (found.train_y, found.test_y))
    turned = np.zeros(10, np.int64)
    turned[order] = range(4)
    np.savez(
        tmp_path / "mine.npz",
        x_train=found.train_x[rows],
        y_train=turned[found.train_y[rows]],
        x_test=found.test_x[tests],
        y_test=turned[found.test_y[tests]],
        classes=np.array([DIGIT_WORDS[label] for label in order]),
    )
    experiment = tiny(model={"name": "tiny-clip"}, tuning={"name": "bias"})
    ours = build(experiment, OwnData(str(tmp_path / "mine.npz"), 0, classes=DIGIT_WORDS))
    assert ours.frozen_digest == build(experiment).frozen_digest
    assert ours.evaluate_split("test")["accuracy"] > 0.9


# ------------------------------------------------------------------------ keys that name a class


def test_keys_of_an_experiment_name_classes_as_the_command_line_does(tmp_path: Path) -> None:
    root = folders(tmp_path / "server", dict.fromkeys(FOLDERS, 10))

    def forgotten(key: str) -> tuple[int, ...]:
        lost = build(on_folders(root, f"forget.classes={key}", "partition.shots=1")).data.forgotten
        assert lost is not None
        return lost.classes

    few = ("backdoor.client=0", "partition.shots=1")
    assert forgotten("[2]") == forgotten('["2"]') == forgotten('["index:4"]') == (4,)
    assert forgotten('["index:2", 10]') == (2,)
    with pytest.raises(UserError, match=r"\[forget\] classes 4: no class is named '4'"):
        forgotten("[4]")
    triggered = load_data(on_folders(root, *few, "backdoor.label=2", "backdoor.share=1.0"))
    assert set(triggered.arrays.train_y[triggered.client(0)]) == {4}
    with pytest.raises(UserError, match=r"\[backdoor\] label 3: no class is named '3'"):
        load_data(on_folders(root, *few, "backdoor.label=3"))
    words = load_data(tiny("backdoor.client=1", "backdoor.label=seven"))
    numbers = load_data(tiny("backdoor.client=1", "backdoor.label=7"))
    assert words.arrays.digest == numbers.arrays.digest


def test_a_run_records_the_names_of_the_classes_that_its_keys_mean(tmp_path: Path) -> None:
    keys = ["rounds=1", "forget.classes=[3]", "partition.new_classes=2", "backdoor.client=0"]
    summary = run(tiny(*keys), tmp_path).summary
    assert summary["forgotten_classes"] == ["three"]
    assert summary["new_classes"] == ["eight", "nine"]
    assert summary["backdoor_class"] == "zero"
