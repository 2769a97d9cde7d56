"""Attributes of drawn, real and own data: exact values, the chosen correlation, helpful errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedsim.data.attributes import Attribute, check, coded, conformed, from_json, positions, to_json
from fedsim.data.drawn import tinted_digits
from fedsim.data.faces import LOOKS, avatars, draw
from fedsim.data.federated import load
from fedsim.data.store import load_arrays
from fedsim.errors import UserError


def test_the_tint_is_in_the_pixels_and_independent_of_the_digit() -> None:
    found = tinted_digits()
    assert found.train_x.shape == (1197, 2, 8, 8)
    assert found.attributes == (Attribute("tint", ("first", "second")),)
    assert found.train_z is not None
    assert found.test_z is not None
    z, y = found.train_z[:, 0], found.train_y
    brightness = found.train_x.astype(float).sum((2, 3))
    guessed = brightness[:, 1] > brightness[:, 0]
    assert 0.9 < (guessed == z).mean() < 1.0  # noisy on purpose
    assert abs(np.corrcoef(z, y >= 5)[0, 1]) < 0.08


@pytest.mark.parametrize("correlation", [-0.8, 0.5, 1.0])
def test_the_correlation_with_the_label_is_the_chosen_one(correlation: float) -> None:
    found = tinted_digits(correlation=correlation)
    assert found.train_z is not None
    reached = np.corrcoef(found.train_z[:, 0], found.train_y >= 5)[0, 1]
    assert reached == pytest.approx(correlation, abs=0.06)


def test_avatars_show_what_their_labels_say() -> None:
    """Faces that differ in one property only differ where that property is."""
    plain = dict.fromkeys(LOOKS, 0)

    def face(**changes: int) -> np.ndarray:
        return draw({**plain, **changes}, 0.5, 64, np.random.default_rng(0)).astype(int)

    assert face().shape == (3, 64, 64)
    changed = {name: np.abs(face(**{name: 1}) - face()).sum(0).sum(1) for name in LOOKS}
    rows = {name: float((np.arange(64) * c).sum() / c.sum()) for name, c in changed.items()}
    assert rows["hat"] < rows["glasses"] < rows["smile"]
    assert min(c.sum() for c in changed.values()) > 1000


def test_avatars_are_drawn_from_their_keys_alone() -> None:
    keys: dict[str, Any] = {"train_samples": 60, "test_samples": 20, "size": 16}
    found, again = avatars(**keys), avatars(**keys)
    assert found.digest == again.digest != avatars(**keys, correlation=0.5).digest
    assert found.classes == ("no", "yes")
    assert [a.name for a in found.attributes] == ["glasses", "beard", "hat", "skin", "hair", "width"]
    assert found.attributes[3].groups == 4
    assert found.attributes[5].groups == 0
    other = avatars(**keys, label="hair")
    assert len(other.classes) == 4
    assert "smile" in [a.name for a in other.attributes]
    many = avatars(train_samples=400, test_samples=1, size=8, correlation=0.6)
    assert many.train_z is not None
    assert np.corrcoef(many.train_z[:, 0], many.train_y)[0, 1] == pytest.approx(0.6, abs=0.1)


def test_correlating_with_a_tone_is_refused() -> None:
    with pytest.raises(UserError, match="must be one of smile, beard, hat, not 'skin'"):
        avatars(label="glasses", correlated_with="skin", correlation=0.5)


def archive(path: Path, **changes: np.ndarray) -> str:
    rng = np.random.default_rng(0)
    contents = {
        "x": rng.integers(0, 255, (40, 1, 4, 4), np.uint8),
        "y": np.arange(40) % 2,
        "z_gender": np.arange(40) % 3 - 1,
        "z_age": rng.random(40) * 80,
        "z_town": np.array(["Ulm", "Bonn", "", "Ulm"] * 10),
        **changes,
    }
    np.savez(path, **contents)
    return f"npz:{path}"


def test_an_archive_has_attributes_of_every_kind(tmp_path: Path) -> None:
    name = archive(tmp_path / "mine.npz")
    for found in (load_arrays(name, {}), load_arrays(name, {})):  # decoded, then from the cache
        assert found.attributes == (
            Attribute("gender", ("0", "1")),
            Attribute("age"),
            Attribute("town", ("Bonn", "Ulm")),
        )
        assert found.train_z is not None
        assert found.test_z is not None
        assert (found.train_z.shape, found.test_z.shape) == ((32, 3), (8, 3))
        raw = np.load(tmp_path / "mine.npz")
        both = np.concatenate([found.train_z, found.test_z])
        np.testing.assert_array_equal(np.sort(both[:, 1]), np.sort(raw["z_age"].astype(np.float32)))
        assert set(both[:, 0]) == {-1, 0, 1}
        assert set(both[:, 2]) == {-1, 0, 1}


def test_parts_of_an_archive_have_their_own_columns(tmp_path: Path) -> None:
    x, y = np.zeros((6, 4), np.float32), np.arange(6) % 2
    z = np.arange(6) % 2
    parts = {"x_train": x, "y_train": y, "x_test": x[:2], "y_test": y[:2]}
    np.savez(tmp_path / "a.npz", **parts, z_b_train=z, z_b_test=z[:2])
    found = load_arrays(f"npz:{tmp_path / 'a.npz'}", {})
    assert found.test_z is not None
    assert found.test_z.tolist() == [[0], [1]]
    np.savez(tmp_path / "b.npz", **parts, z_b_train=z)
    with pytest.raises(UserError, match="no key 'z_b_test'"):
        load_arrays(f"npz:{tmp_path / 'b.npz'}", {})


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (np.r_[0.0, np.nan, np.zeros(38)], "sample 1 is NaN or infinite; leave such samples out"),
        (np.arange(40) - 2, "code -2 is negative; codes count from 0, -1 is 'not known'"),
        (np.zeros((40, 2), int), "must be integers, numbers or text"),
        (np.arange(39), "attributes differ in length"),
    ],
)
def test_bad_columns_are_named(column: np.ndarray, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        load_arrays(archive(tmp_path / "bad.npz", z_age=column), {})


def test_a_folder_of_images_has_a_table_of_attributes(tmp_path: Path) -> None:
    lines = ["file,glasses,height,name"]
    for number in range(8):
        place = tmp_path / "ab"[number % 2] / f"{number}.png"
        place.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(place)
        glasses = number % 2 if number < 6 else ""
        lines.append(f"{'ab'[number % 2]}/{number}.png,{glasses},{number / 2},{'xy'[number // 4]}")
    (tmp_path / "attributes.csv").write_text("\n".join(lines))
    found = load_arrays(f"imagefolder:{tmp_path}", {"size": 8, "test_fraction": 0.25})
    assert [(a.name, a.groups) for a in found.attributes] == [("glasses", 2), ("height", 0), ("name", 2)]
    assert found.train_z is not None
    numbers = found.train_x[:, 0, 0, 0].astype(float)
    np.testing.assert_array_equal(found.train_z[:, 1], numbers / 2)
    np.testing.assert_array_equal(found.train_z[:, 0], np.where(numbers < 6, numbers % 2, -1))
    (tmp_path / "attributes.csv").write_text("\n".join(lines[:-1]))
    with pytest.raises(UserError, match=r"no line for 'b/7\.png'"):
        load_arrays(f"imagefolder:{tmp_path}", {"size": 16, "test_fraction": 0.25})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("image,a\n", "the first line must be file,NAME,..., not 'image,a'"),
        ("file|a\n", r"the first line must be file,NAME,..., not 'file\|a'"),
        ("file,a\nx/0.png,1,2\n", "line 2 has not 2 cells"),
        ("file,a\nx/0.png\n", "line 2 has not 2 cells"),
        ("file,a\nx/0.png,1.5\nx/1.png,\ny/0.png,2.5\ny/1.png,2.5\n", "column 'a': a number is missing"),
    ],
)
def test_a_broken_table_of_attributes_is_named(text: str, said: str, tmp_path: Path) -> None:
    for name in ("x/0.png", "x/1.png", "y/0.png", "y/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    keys = {"size": 16, "test_fraction": 0.5}
    load_arrays(f"imagefolder:{tmp_path}", keys)
    table = tmp_path / "attributes.csv"
    table.write_text(text)  # a cached folder is looked at again
    with pytest.raises(UserError, match=f"attributes.csv: .*{said}"):
        load_arrays(f"imagefolder:{tmp_path}", keys)
    table.write_bytes("file,a\nx/0.png,é\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"attributes\.csv: not UTF-8"):
        load_arrays(f"imagefolder:{tmp_path}", keys)
    signs = "file,a\nx/0.png,+\nx/1.png,-\ny/0.png,E\ny/1.png,\n"
    table.write_text("\ufeff" + signs, "utf-8")
    assert load_arrays(f"imagefolder:{tmp_path}", keys).attributes == (Attribute("a", ("+", "-", "E")),)


def test_skew_is_over_the_attribute_not_the_label() -> None:
    def spread(name: str, **keys: Any) -> tuple[float, float]:
        data = load("tinted-digits", {}, name, keys, clients=8)
        assert data.arrays.train_z is not None
        z, y = np.asarray(data.arrays.train_z[:, 0]), data.arrays.train_y >= 5
        rows = [data.client(pid) for pid in range(8)]
        assert sum(map(len, rows)) == 1197
        return float(np.std([z[r].mean() for r in rows])), float(np.std([y[r].mean() for r in rows]))

    even, skewed = spread("iid"), spread("attribute-skew", attribute="tint", alpha=0.1)
    assert skewed[0] > 0.25 > 3 * even[0]
    assert skewed[1] < 0.2
    with pytest.raises(UserError, match="did you mean 'tint'"):
        load("tinted-digits", {}, "attribute-skew", {"attribute": "tints", "alpha": 1.0}, clients=2)


def test_an_attribute_that_is_the_label_is_refused() -> None:
    known = (Attribute("a", ("x", "y")), Attribute("b", ("x", "y")), Attribute("c", tuple("uvw")))
    labels = np.array([0, 1, 0, 1, 0, 1])
    z = np.stack([1 - labels, [0, 0, 1, 1, 0, 0], [0, 1, 2, 1, 0, 1]], 1).astype(np.float32)
    parts = {"training": z, "test": z}
    check(["b"], known, parts, labels)
    for name in ("a", "c"):
        with pytest.raises(UserError, match=f"'{name}' determines the task's label"):
            check([name], known, parts, labels)
    assert positions(["c", "a"], known) == [2, 0]
    with pytest.raises(UserError, match="no attribute 'glass'"):
        positions(["glass"], known)


def test_a_number_that_is_the_label_and_attributes_that_are_together_are_refused() -> None:
    labels = np.array([0, 1, 0, 1, 2, 2, 0, 1])
    rng = np.random.default_rng(0)
    number = (labels + 0.5 * rng.random(8)).astype(np.float32)[:, None]
    free = rng.random((8, 1)).astype(np.float32)
    with pytest.raises(UserError, match="'n' determines the task's label"):
        check(["n"], (Attribute("n"),), {"training": number, "test": number}, labels)
    check(["n"], (Attribute("n"),), {"training": free, "test": free}, labels)
    two = (Attribute("a", ("x", "y")), Attribute("b", ("x", "y")))
    z = np.array([[0, 0], [0, 1], [1, 0], [1, 1]] * 2, np.float32)
    parts = {"training": z, "test": z}
    exclusive = (z[:, 0] != z[:, 1]).astype(np.int64)
    check(["a"], two, parts, exclusive)
    with pytest.raises(UserError, match="attributes a, b determine the task's label together"):
        check(["a", "b"], two, parts, exclusive)
    with pytest.raises(UserError, match="names 'a' twice"):
        check(["a", "a"], two, parts, exclusive)


@pytest.mark.parametrize(
    ("test", "said"),
    [
        ([1, 1, -1], "'a' has one value, y, in the test data .*write -1 and 1 as 0 and 1"),
        ([0, 0, 0], "'a' has one value, x, in the test data; there is nothing to unlearn or to measure"),
        ([-1, -1, -1], "'a' has no known value in the test data"),
    ],
)
def test_what_has_one_value_cannot_be_measured(test: list[int], said: str) -> None:
    parts = {
        "training": np.array([[0], [1], [1]], np.float32),
        "test": np.array(test, np.float32)[:, None],
    }
    with pytest.raises(UserError, match=said):
        check(["a"], (Attribute("a", ("x", "y")),), parts, np.array([0, 1, 0]))
    constant = {part: np.full((3, 1), 2.5, np.float32) for part in parts}
    with pytest.raises(UserError, match=r"'n' has one value, 2\.5, in the training data"):
        check(["n"], (Attribute("n"),), constant, np.array([0, 1, 0]))


def test_floats_of_two_whole_numbers_are_codes_and_codes_have_a_limit() -> None:
    found, parts = coded({"train": np.array([0.0, 1.0]), "test": np.array([1.0])}, "a", "here")
    assert found.values == ("0", "1")
    assert parts["test"].tolist() == [1]
    assert coded({"train": np.array([0.0, 0.5])}, "a", "here")[0].groups == 0
    assert coded({"train": np.array([0.0, 1.0, 2.0])}, "a", "here")[0].groups == 0
    with pytest.raises(UserError, match="here: code 1000000 is too large"):
        coded({"train": np.array([0, 1_000_000])}, "a", "here")


def test_booleans_are_two_groups() -> None:
    found, parts = coded({"train": np.array([True, False])}, "b", "here")
    assert found.groups == 2
    assert parts["train"].tolist() == [1, 0]


def test_a_nodes_own_values_are_coded_as_the_servers() -> None:
    wanted = (Attribute("a", ("x", "y", "z")), Attribute("b", ("0", "1")), Attribute("n"))
    assert from_json(to_json(wanted)) == wanted
    own = (Attribute("n"), Attribute("a", ("x", "z")))
    z = np.array([[0.5, 1], [0.25, 0], [2, -1]], np.float32)
    assert conformed(own, z, wanted, 3, "f").tolist() == [[2, -1, 0.5], [0, -1, 0.25], [-1, -1, 2]]
    with pytest.raises(UserError, match="f: attribute 'n' is missing; a number must be known"):
        conformed((), None, wanted, 3, "f")
    with pytest.raises(UserError, match="has the value 'z'; the server knows x, y"):
        conformed(own, z, (Attribute("a", ("x", "y")),), 3, "f")
    with pytest.raises(UserError, match="attribute 'a' must be a number"):
        conformed(own, z, (Attribute("a"),), 3, "f")
