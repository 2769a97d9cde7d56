"""State that is no plain float parameter: reset between clients, sent, exported, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from clients.training import Recipe, back_propagation, fit
from fedsim import messages, payload
from fedsim.building import build
from fedsim.config import Experiment
from fedsim.errors import NotEnoughReplies, UserError
from fedsim.export import export, load_model
from fedsim.resident import Resident
from fedsim.task import Task
from tests.helpers import run, tiny

RECIPE = Recipe(0.1, 1.0, None, 8, 0.9, 0.0, 0.0, 0.0)

TRAVEL = ["reassigned", "in-graph", "transient", "expanded", "strided", "complex", "lazy", "weight-norm"]
TRAVEL += ["spectral-norm", "tied", "other-memory"]


def odd(kind: str, *overrides: str, **tables: Any) -> Experiment:
    return tiny(*overrides, model={"name": "tests.odd_models:make", "kind": kind}, **tables)


def train(task: Task, client: int) -> dict[str, bytes]:
    """What a client sends that starts from the initial state."""
    task.load(task.initial_payload())
    torch.manual_seed(client)
    own = [p for p in task.model.parameters() if p.requires_grad]
    tool = torch.optim.SGD(own, lr=0.1, momentum=0.9)
    rows = task.data.client(client)
    fit(task, rows, RECIPE, tool, back_propagation, lr_scale=1.0, proximal_mu=0.0)
    return {name: values.tobytes() for name, values in messages.views_of(task.shared()).items()}


@pytest.mark.parametrize("kind", TRAVEL)
def test_a_client_after_others_is_the_client_alone(kind: str) -> None:
    """What an engine with a worker a client would send: serial and ray agree."""
    crowded = build(odd(kind))
    first = train(crowded, 0)
    train(crowded, 2)
    assert train(crowded, 1) == train(build(odd(kind)), 1)
    assert train(crowded, 0) == first
    initial = messages.views_of(crowded.initial_payload())
    assert all(first[name] != initial[name].tobytes() for name in initial), (
        "everything that travels has moved"
    )


@pytest.mark.parametrize("kind", ["reassigned", "expanded", "complex", "tied"])
def test_a_run_and_its_export_hold_that_state(kind: str, tmp_path: Path) -> None:
    experiment = odd(kind, "rounds=1")
    done = run(experiment, tmp_path)
    export(done.run, tmp_path / "out")
    model = load_model(tmp_path / "out")
    task = build(experiment)
    task.load(messages.arrays_of(done.state()))
    x = torch.from_numpy(np.array(task.data.arrays.test_x[:5]))
    task.model.eval()
    assert torch.equal(model(x), task.model(x))
    name = {"reassigned": "3.mean", "expanded": "3.mean", "complex": "3.weight", "tied": "3.two.weight"}[kind]
    before = build(experiment).model.state_dict()[f"backbone.{name}"]
    assert not torch.equal(model.state_dict()[f"backbone.{name}"], before)


def test_complex_weights_travel_as_pairs_and_average() -> None:
    task = build(odd("complex"))
    entry = next(e for e in task.selection.shared if e.dtype == "complex64")
    assert (entry.shape, entry.wire_shape, entry.wire_dtype, entry.nbytes) == ((4,), (4, 2), "float32", 32)
    sent = messages.views_of(task.shared())[entry.name]
    weight = task.model.get_parameter(entry.name).detach()
    np.testing.assert_array_equal(sent[:, 1], weight.imag)
    doubled = {n: 2 * v if n == entry.name else v for n, v in messages.views_of(task.shared()).items()}
    task.load(messages.arrays_of(doubled))
    assert torch.equal(
        task.model.get_parameter(entry.name).detach(), 2 * torch.view_as_complex(torch.tensor(sent))
    )


def test_a_tied_tensor_travels_once_under_its_first_name() -> None:
    task = build(odd("tied"))
    names = [entry.name for entry in task.selection.shared]
    assert "backbone.3.one.weight" in names
    assert "backbone.3.two.weight" not in names
    kept = build(odd("tied", payload={"personal": ["backbone.3.two.weight"]})).selection
    assert [entry.name for entry in kept.personal] == ["backbone.3.one.weight"]


def test_torchscript_modules_are_reset_like_others() -> None:
    model = nn.Sequential(
        torch.jit.script(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))), nn.Linear(4, 2)
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    resident = Resident(model, before)

    def changed() -> bool:
        return any(not torch.equal(value, before[name]) for name, value in resident.tensors(before).items())

    def train() -> None:
        with torch.no_grad():
            model(torch.randn(5, 3))
            next(model.parameters()).add_(1)
        assert changed()

    train()
    resident.reset()
    assert not changed()
    with resident.untouched():
        train()
    assert not changed()


def test_a_frozen_buffer_that_moves_anyway_is_put_back() -> None:
    """Head tuning: nothing of the backbone travels, and its counter must not leak into the next client."""
    experiment = odd("expanded", tuning={"name": "head"}, features={"cache": False})
    crowded = build(experiment)
    assert {entry.name for entry in crowded.selection.shared} == {"head.weight", "head.bias"}
    train(crowded, 0)
    assert train(crowded, 1) == train(build(experiment), 1)
    crowded.reset()
    assert crowded.model.state_dict()["backbone.3.mean"].abs().sum() == 0


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("late-buffer", "'backbone.3.later' was added"),
        ("late-parameter", "'backbone.3.shift' was added"),
        ("late-module", "'backbone.3.proj' was added|a module"),
        ("filled", "'backbone.3.seen' was added"),
        ("replaced", "parameter 'backbone.3.scale' was replaced"),
        ("grows", r"'backbone.3.bank' was float32\[1, 6\] and is float32\[\d+, 6\]"),
        ("halved", r"'backbone.3.bank' was float32\[1, 6\] and is float16\[1, 6\]"),
    ],
)
def test_what_cannot_travel_is_refused_by_name_in_the_first_reply(kind: str, name: str) -> None:
    with pytest.raises(UserError, match=name):
        train(build(odd(kind)), 0)


def test_extra_state_is_refused_when_the_task_is_built() -> None:
    with pytest.raises(UserError, match=r"module 'backbone\.3' \(Extra\) has extra state .*register_buffer"):
        build(odd("extra"))


def test_the_run_ends_with_the_name(tmp_path: Path) -> None:
    with pytest.raises(NotEnoughReplies, match=r"'backbone\.3\.later' was added to the model"):
        run(odd("late-buffer", "rounds=1"), tmp_path)


@pytest.mark.parametrize("values", [torch.zeros(2).to(torch.float8_e4m3fn), torch.zeros(2).to_sparse()])
def test_a_tensor_that_numpy_has_not_is_refused_by_name(values: torch.Tensor) -> None:
    net = nn.Linear(2, 2)
    net.register_buffer("scale", values)
    with pytest.raises(UserError, match="'scale' changes while clients train, but a tensor of"):
        payload.select(net, ("",))


def test_a_lazy_module_that_never_ran_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"'0\.weight' gets its shape in the first forward pass"):
        payload.select(nn.Sequential(nn.LazyLinear(3)), ("",))


def test_a_module_that_is_swapped_is_named() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    resident = Resident(net, ["0.weight", "0.bias"])
    net[0] = nn.Linear(2, 2)
    with pytest.raises(UserError, match="'0' was added to the model, removed or replaced"):
        resident.reset()
