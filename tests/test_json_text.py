"""Figures that are not finite survive JSON; JSON from outside is bounded before it is parsed."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict

from fedsim import config, json_text, payload
from fedsim.data import attributes, pixels
from fedsim.errors import UserError
from fedsim.messages import arrays_of
from tests.helpers import tiny


def test_numbers_that_are_not_finite_are_words_and_come_back() -> None:
    value = {"a": math.nan, "b": [1.5, math.inf], "c": {"d": -math.inf}, "name": "NaN", "e": None, "f": "nan"}
    text = json_text.dump(value)
    assert json.loads(text)["b"] == [1.5, "Infinity"]
    assert json.loads(text)["c"] == {"d": "-Infinity"}
    again = json_text.load(text)
    assert math.isnan(again.pop("a"))
    value.pop("a")
    assert again == value  # a run may be called NaN


def test_finite_values_are_written_as_ever() -> None:
    value = {"a": 0.1, "b": [1, 2], "c": "text"}
    assert json_text.dump(value) == json.dumps(value)
    assert json_text.dump(value, indent=2) == json.dumps(value, indent=2)


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (DEEP, "nested more than 32 deep"),
        ('{"a":' * 40 + "1" + "}" * 40, "nested more than 32 deep"),
        ("[" * 100_000, "nested more than 32 deep"),
        ("x" * (json_text.SIZE + 1), "is larger than"),
        (b"\xff\xfe", "cannot be read"),
        ("{", "cannot be read"),
        ("9" * 5000, "cannot be read"),
    ],
)
def test_hostile_text_is_one_line(text: str | bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said) as told:
        json_text.received(text, "the layout")
    assert "the layout" in str(told.value)
    assert len(str(told.value)) < 200


def test_brackets_inside_strings_are_not_depth() -> None:
    value = {"a": "[" * 500 + '\\"' + "{" * 500, "b": [[1]] * 100}
    assert json_text.received(json.dumps(value), "x") == value


@pytest.mark.parametrize("text", [DEEP, "[]", "7", '{"folders": 3}', '{"folders": [3]}'])
def test_an_experiment_from_a_server_that_is_none(text: str) -> None:
    with pytest.raises(UserError, match="the server's experiment") as told:
        config.from_json(text)
    assert "\n" not in str(told.value)


def test_a_real_experiment_comes_through() -> None:
    experiment = tiny("client.lr=0.3")
    assert config.from_json(experiment.json()).document() == experiment.document()


@pytest.mark.parametrize("text", [DEEP, "{}", '[["a"]]', '[["a", [1]]]', '[[1, ["x"]]]', "[7]"])
def test_attributes_from_a_server_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="the server's list of attributes"):
        attributes.from_json(text)


@pytest.mark.parametrize("text", [DEEP, "{}", "[7]", '[["float"]]', '[["float", "0", 1]]', "[[3, 0, 1]]"])
def test_value_ranges_from_a_server_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="the server's list of value ranges"):
        pixels.from_json(text)


def test_real_attributes_come_through() -> None:
    given = (attributes.Attribute("age"), attributes.Attribute("colour", ("red", "blue")))
    assert attributes.from_json(attributes.to_json(given)) == given


def packed(layout: Any, *, raw: bytes | None = None) -> RecordDict:
    """A packed content of four floats with a layout of somebody's own."""
    content = payload.pack(RecordDict({"arrays": arrays_of({"w": np.arange(4, dtype=np.float32)})}))
    text = (layout if isinstance(layout, str) else json.dumps(layout)).encode()
    content[payload.LAYOUT] = ConfigRecord({payload.LAYOUT: zlib.compress(text) if raw is None else raw})
    return content


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (DEEP, "nested more than 32 deep"),
        (" " * (json_text.SIZE + 1), "the layout is larger than"),
        ([], "the layout is no table"),
        ({}, "the layout has None"),
        ({"arrays": 3}, "the layout has None"),
        ({"arrays": [["w", "<f4"]]}, "where a name, a kind and a shape should be"),
        ({"arrays": [[["w"], "<f4", [4]]]}, "where a name, a kind and a shape should be"),
        ({"arrays": [["w", "<f4", [-4]]]}, "where a name, a kind and a shape should be"),
        ({"arrays": [["w", "<f4", [True]]]}, "where a name, a kind and a shape should be"),
        ({"arrays": [["w", "<f4", [2**62, 2**62]]]}, "there are not that many values"),
        ({"arrays": [["w", "<f4", [10**30]]]}, "there are not that many values"),
        ({"arrays": [["w", "<f4", [3]], ["v", "<f4", [2]]]}, "there are not that many values"),
        ({"arrays": [["w", "<i8", [4]]]}, "there are not that many values"),
    ],
)
def test_a_hostile_layout_is_one_line(layout: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said) as told:
        payload.unpack(packed(layout))
    assert len(str(told.value)) < 200


def test_a_layout_that_blows_up_is_not_blown_up() -> None:
    """Some kilobytes that would become far more."""
    bomb = zlib.compress(b" " * 2**25)
    tracemalloc.start()
    with pytest.raises(ValueError, match="the layout is larger than"):
        payload.unpack(packed({}, raw=bomb))
    assert tracemalloc.get_traced_memory()[1] < 4 * json_text.SIZE
    tracemalloc.stop()


def test_the_look_at_depth_takes_little_memory_for_long_strings() -> None:
    long = '"' + "x" * 2**20 + '\\"[' + '"'
    code = (
        "import resource, sys; from fedsim import json_text; text = sys.stdin.read(); "
        "most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024; before = most(); "
        "json_text.received(text, 'a text'); print(most() - before)"
    )
    text = f"[{long}, [{'[],' * 40}[]]]"
    found = subprocess.run(
        [sys.executable, "-c", code], input=text, capture_output=True, text=True, check=True
    )
    assert int(found.stdout) < 30  # MiB; it was 120


@pytest.mark.parametrize("shape", [[2] * 100_000, [1] * 65])
def test_a_shape_that_no_array_has_is_refused_at_once(shape: list[int]) -> None:
    content = payload.pack(RecordDict({"arrays": arrays_of({"w": np.zeros(3, np.float32)})}))
    text = json.dumps({"arrays": [["w", "<f4", shape]]}).encode()
    content[payload.LAYOUT] = ConfigRecord({payload.LAYOUT: zlib.compress(text)})
    with pytest.raises(ValueError, match="where a name, a kind and a shape should be"):
        payload.unpack(content)
