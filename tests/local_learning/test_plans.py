"""Where backbones are cut, which backbones can be, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedsim.errors import UserError
from fedsim.local_learning import LocallySupervised
from fedsim.local_learning.chain import Chain
from fedsim.local_learning.plans import PAPERS, by_name, paper_plan, uniform
from fedsim.models.base import Classifier
from fedsim.models.cnn import cnn, mlp
from fedsim.models.resnet import resnet32, resnet110
from tests.local_learning.nets import LOCAL, learner
from tests.models.zoo import DIGITS, IMAGES, inputs, make


def chain(net: Classifier) -> Chain:
    return Chain(net, torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_cuts_of_the_papers() -> None:
    """(stage, block) counts from (1, 0), behind the stem: [2, 1] of ResNet-32 is unit 7."""
    small, large = chain(resnet32()), chain(resnet110())
    assert small.stages() == (5, 5, 5)
    assert len(small) == 16
    assert paper_plan(small, 2) == (7, 15)
    assert paper_plan(small, 4) == (3, 7, 11, 15)
    assert paper_plan(small, 8) == (1, 3, 5, 7, 9, 11, 13, 15)
    assert paper_plan(small, 16) == tuple(range(16))
    assert paper_plan(small, 5) is None
    assert paper_plan(large, 55) == tuple(range(55))
    for blocks in PAPERS[large.stages()]:
        plan = paper_plan(large, blocks)
        assert plan is not None
        assert len(plan) == blocks == len(set(plan))
        assert list(plan) == sorted(plan)


def test_even_cuts() -> None:
    assert uniform(13, 4) == (3, 6, 9, 12)  # ViT with 12 blocks: MAN++ cuts after 3, 6 and 9
    assert uniform(5, 5) == (0, 1, 2, 3, 4)
    assert uniform(5, 1) == (4,)


def test_cuts_by_name() -> None:
    found = chain(resnet32())
    assert by_name(found, ["stem", "blocks.4"]) == (0, 5, 15)
    assert by_name(found, ["backbone.blocks.4"]) == (5, 15)
    for cuts, message in (
        (["blocks.4.conv1"], r"'blocks.4.conv1' is inside unit 5 \(blocks.4\), which runs as a whole"),
        (["blocks.40"], r"no unit 'blocks.40': did you mean 'blocks.4'"),
        (["blocks.4", "blocks.2"], "in the order of the backbone"),
    ):
        with pytest.raises(UserError, match=message):
            by_name(found, cuts)


@pytest.mark.parametrize("kind", ["vit", "clip", "cnn-clip", "bert"])
@pytest.mark.parametrize("method", LOCAL)
def test_every_kind_of_backbone(kind: str, method: str, tmp_path: Path) -> None:
    """Where a method cannot work, it says why."""
    net = make(kind, tmp_path).train()
    local_inputs = inputs(kind, 4)
    labels = torch.tensor([0, 1, 0, 1])
    copies, maps = method in ("man", "man++", "mlaan"), method == "infopro"
    if (kind == "bert" and copies) or (kind != "cnn-clip" and maps):
        with pytest.raises(UserError, match=r"cannot be copied|reconstructs images from feature maps"):
            LocallySupervised(net, method, 3, sample=local_inputs)
        return
    local = LocallySupervised(net, method, 3, sample=local_inputs).train()
    tool = torch.optim.SGD([p for p in local.parameters() if p.requires_grad], lr=0.01)
    loss = local.local_step(local_inputs, labels, tool)
    assert torch.isfinite(loss)
    assert torch.equal(local.eval()(local_inputs), net.eval()(local_inputs))


def test_perceptrons_and_small_cnns() -> None:
    for net in (mlp(DIGITS, layers=5), cnn(DIGITS)):
        local = LocallySupervised(net, "man++", 2, sample=torch.zeros(1, 1, 8, 8)).train()
        tool = torch.optim.SGD(local.trainable(), lr=0.01)
        assert torch.isfinite(local.local_step(torch.rand(4, 1, 8, 8), torch.arange(4), tool))


def test_more_blocks_than_units() -> None:
    with pytest.raises(UserError, match=r"blocks = 17, but this backbone has 16 units .* at most 16"):
        LocallySupervised(resnet32(), "dgl", 17)


def test_a_backbone_that_is_not_divided_says_how_to_divide_it() -> None:
    net = Classifier(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 3))
    with pytest.raises(UserError, match=r"single unit .* `units\(\)` .*docs/local_learning.md"):
        LocallySupervised(net, "dgl", 2, sample=torch.zeros(1, 3, 32, 32))


def test_models_that_are_none_and_plans_that_do_not_fit() -> None:
    net = Classifier(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 3))
    for arguments, options, message in (
        ((torch.nn.Linear(3, 3), "dgl", 2), {}, "a Linear is no fedsim.models.base.Classifier"),
        ((net, "dgl"), {"sample": torch.zeros(1, 3, 32, 32)}, "single unit"),
        ((mlp(DIGITS, layers=3), "dgl", 2), {}, r"give LocallySupervised one of its inputs, sample=x"),
        ((resnet32(), "dgl", 0), {}, "blocks = 0 must be at least 1"),
        ((resnet32(), "dgl"), {"plan": (3, 2, 15)}, r"up to the last \(15 here\), not \(3, 2, 15\)"),
        ((resnet32(), "dgl"), {"plan": (3,)}, r"up to the last \(15 here\)"),
        ((resnet32(), "dgl"), {"plan": ()}, r"up to the last \(15 here\)"),
    ):
        with pytest.raises(UserError, match=message):
            LocallySupervised(*arguments, **options)  # type: ignore[arg-type]


def test_one_sample_and_batchnorm_over_vectors() -> None:
    one = (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
    local = learner("dgl", 4)
    with pytest.raises(UserError, match="a batch of 1 sample cannot be normalised by the BatchNorm1d"):
        local.gradients(*one)
    assert learner("greedy", 4).gradients(*one) > 0


def test_unknown_methods_and_cascades_that_are_too_long() -> None:
    with pytest.raises(UserError, match="did you mean 'man'"):
        learner("mann", 2)
    with pytest.raises(UserError, match=r"cascade = 5 blocks, but the backbone is divided into 4"):
        learner("hpff", 4, cascade=5)
    with pytest.raises(UserError, match=r"reconstruction = \[1.0\] must be two numbers"):
        learner("infopro", 4, reconstruction=[1.0])


def test_inputs_of_infopro_are_images() -> None:
    LocallySupervised(cnn(IMAGES), "infopro", 2, sample=torch.zeros(1, 3, 32, 32))
    with pytest.raises(UserError, match="reconstructs images from feature maps"):
        LocallySupervised(mlp(DIGITS, layers=3), "infopro", 2, sample=torch.zeros(1, 1, 8, 8))
