"""Meters, plans of even memory, and the memory that local learning saves."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from fedsim.errors import UserError
from fedsim.local_learning import LocallySupervised
from fedsim.local_learning.memory import Bench, Costs, balanced, balanced_below, plan_for, within
from fedsim.local_learning.meters import LiveMeter, SavedMeter
from fedsim.models.base import Classifier
from fedsim.models.resnet import resnet32
from fedsim.models.tuning import full
from fedsim.optimizers import make_optimizer
from tests.local_learning.nets import on_meta, small


def sgd(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return make_optimizer(parameters, "sgd", lr=0.1, momentum=0.9)


@pytest.fixture(scope="module")
def bench() -> Bench:
    """ResNet-32 with batches of 64."""
    with torch.device("meta"):
        return Bench(full(resnet32()), torch.empty(64, 3, 32, 32, dtype=torch.uint8), sgd)


def saved(method: str, blocks: int) -> int:
    local, images, labels = on_meta(method, blocks)
    with SavedMeter([*local.parameters(), *local.buffers()]) as meter:
        local.gradients(images, labels)
    assert meter.live == 0
    return meter.peak


@pytest.fixture(scope="module")
def reference() -> int:
    return saved("bp", 1)


def test_saved_tensors_are_counted_once_and_parameters_not_at_all() -> None:
    weight = torch.randn(8, 8, requires_grad=True)
    x = torch.randn(4, 8)
    with SavedMeter([weight]) as meter:
        hidden = x @ weight  # saves x and the weight
        hidden = hidden.relu()  # saves its output
        out = hidden @ weight  # saves the same output again, and the weight
        assert meter.live == 2 * 4 * 8 * 4
        out.sum().backward()
    assert (meter.live, meter.peak) == (0, 2 * 4 * 8 * 4)


def test_living_storages_are_counted_while_they_live() -> None:
    x = torch.zeros(100)
    with LiveMeter([x]) as meter:
        y = x + 1
        assert meter.live == 800
        view = y[:10]
        del y
        assert meter.live == 800
        del view
        assert meter.live == 400
    assert meter.peak == 800


@pytest.mark.parametrize("method", ["bp", "man++", "hpff"])
def test_a_step_takes_the_same_on_meta_tensors(method: str) -> None:
    def peak(device: str) -> int:
        net = small().to(device)
        sample = torch.zeros(4, 3, 16, 16, dtype=torch.uint8, device=device)
        local = LocallySupervised(net, method, 1 if method == "bp" else 4, sample=sample).train()
        labels = torch.zeros(4, dtype=torch.int64, device=device)
        with LiveMeter([*local.parameters(), *local.buffers(), sample, labels]) as meter:
            local.local_step(sample, labels, sgd(list(local.parameters())))
        return meter.peak

    assert peak("cpu") == peak("meta")


@pytest.mark.parametrize(
    ("method", "blocks", "most"),
    [
        ("dgl", 16, 0.20),
        ("dgl", 8, 0.30),
        ("dgl", 4, 0.45),
        ("man", 16, 0.45),
        ("man++", 16, 0.45),
        ("hpff", 16, 0.35),
    ],
)
def test_peak_of_saved_activations(method: str, blocks: int, most: float, reference: int) -> None:
    """ResNet-32, batches of 64, as a share of back-propagation's 152 MiB."""
    assert reference / 2**20 == pytest.approx(151.8, abs=0.1)
    assert saved(method, blocks) <= most * reference


def test_a_single_backward_at_the_end_saves_nothing() -> None:
    local, images, labels = on_meta("dgl", 16)
    pending: list[Tensor] = []
    with SavedMeter([*local.parameters(), *local.buffers()]) as meter:
        local.gradients(images, labels, pending.append)
    assert meter.peak > saved("bp", 1)
    assert saved("dgl", 16) < saved("dgl", 8) < saved("dgl", 2) < saved("bp", 1)


def test_memory_balanced_resnet101() -> None:
    """ImageNet, MAN++ with K = 4: at most 0.55 of what back-propagation saves."""
    net = resnet101()
    images = torch.empty(8, 3, 224, 224, dtype=torch.uint8, device="meta")
    found = Bench(net, images, sgd)
    plan = balanced(found.costs("man++"), 4)
    whole = found.measure("bp", (len(found.chain) - 1,))
    share = found.measure("man++", plan).saved / whole.saved
    assert len(plan) == 4
    assert share <= 0.55


def resnet101() -> Classifier:
    """ImageNet's ResNet-101 on `meta`."""
    import timm

    from fedsim.models.timm_models import TimmBackbone

    with torch.device("meta"):
        trunk = timm.create_model("resnet101", num_classes=0)
        half = (0.5, 0.5, 0.5)
        backbone = TimmBackbone(trunk, half, half, 224, "bicubic", "resnet101")
        return full(Classifier(backbone, torch.nn.Linear(2048, 1000)))


# ------------------------------------------------------------------------------------------ plans


def test_balanced_plans_are_the_best_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        numbers = torch.randint(1, 50, (3, 7), generator=generator).tolist()
        costs = Costs(*map(tuple, numbers))
        for blocks in range(1, 8):
            every = [(*cuts, 6) for cuts in combinations(range(6), blocks - 1)]
            assert costs.largest(balanced(costs, blocks)) == min(map(costs.largest, every))


def test_a_byte_budget_gets_the_fewest_blocks(bench: Bench) -> None:
    costs = bench.costs("dgl")
    limit = costs.largest(balanced(costs, 5))
    assert len(balanced_below(costs, limit)) == 5
    smallest = min(costs.largest(balanced(costs, k)) for k in range(1, 17))
    with pytest.raises(UserError, match=f"the smallest possible is {smallest / 1e6:.1f} MB"):
        balanced_below(costs, smallest - 1)


def test_balanced_cuts_beat_even_ones(bench: Bench) -> None:
    whole = (len(bench.chain) - 1,)
    even = bench.measure("dgl", (3, 7, 11, 15)).saved
    plan = balanced(bench.costs("dgl"), 4)
    assert bench.measure("dgl", plan).saved < even < bench.measure("bp", whole).saved


# ----------------------------------------------------------------------------------------- budgets

METHODS = [("man++", {}), ("dgl", {}), ("greedy", {})]


def test_a_budget_gets_a_plan_of_which_one_block_fewer_is_too_large(bench: Bench) -> None:
    budget = bench.measure("dgl", plan_for(bench, "papers", "dgl", 7, {})).total
    name, plan = within(bench, budget, [("dgl", {})], "papers", "client 0")
    fewer = plan_for(bench, "papers", "dgl", len(plan) - 1, {})
    assert name == "dgl"
    assert bench.measure("dgl", plan).total <= budget < bench.measure("dgl", fewer).total


def test_what_cannot_be_built_does_not_fit(bench: Bench) -> None:
    """A cascade of three blocks needs three; a method that does not go with this model is left out."""
    long = {"cascade": 3}
    total = bench.measure("hpff", plan_for(bench, "papers", "hpff", 8, long), long).total
    name, plan = within(bench, total, [("hpff", long)], "papers", "client 0")
    assert name == "hpff"
    assert len(plan) <= 8
    assert within(bench, total, [("hpff", {"cascade": 99}), ("dgl", {})], "papers", "client 0")[0] == "dgl"


def test_a_proximal_terms_copy_is_part_of_the_total(bench: Bench) -> None:
    plan = (len(bench.chain) - 1,)
    anchored = Bench(bench.model, bench.sample, bench.optimizer, anchored=True)
    size = sum(4 * p.numel() for p in bench.model.parameters())
    assert anchored.measure("bp", plan).total == bench.measure("bp", plan).total + size
    assert anchored.measure("bp", plan).activations == bench.measure("bp", plan).activations


@pytest.mark.parametrize("share", [1.0, 0.5, 0.25])
def test_a_client_stays_below_its_budget(bench: Bench, share: float) -> None:
    """Everything together stays below what back-propagation takes with a share of its activations."""
    whole = bench.measure("bp", (len(bench.chain) - 1,))
    budget = whole.total - (1 - share) * whole.activations
    name, plan = within(bench, budget, METHODS, "papers", "client 0")
    assert bench.measure(name, plan).total <= budget
    assert (name == "bp") == (share == 1.0)


def test_a_budget_below_the_smallest_names_the_smallest(bench: Bench) -> None:
    with pytest.raises(
        UserError, match=r"client 3 has 1\.00 MB, the smallest .* \(greedy, \d+ blocks"
    ) as error:
        within(bench, 1e6, [("greedy", {})], "papers", "client 3")
    smallest = float(str(error.value).split("trains in is ")[1].split()[0])
    assert within(bench, smallest * 1e6 + 1e4, [("greedy", {})], "papers", "client 3")[0] == "greedy"
