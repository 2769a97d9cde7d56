"""The engine: its gradients are those of the equations, however it is cut and in whatever order."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim.errors import UserError
from fedsim.local_learning import METHODS, LocallySupervised
from fedsim.local_learning.couplings import Follower
from fedsim.local_learning.heads import linear
from fedsim.local_learning.methods import Division
from fedsim.local_learning.objectives import Supervised
from fedsim.local_learning.windows import Window
from fedsim.models.base import Classifier
from fedsim.models.resnet import resnet32
from tests.local_learning.nets import LOCAL, batch, gradients, learner, small


def sgd(model: torch.nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_one_block_is_back_propagation_bit_for_bit(method: str) -> None:
    images, labels = batch()
    plain = small()
    F.cross_entropy(plain(images), labels).backward()
    local = learner(method, 1)
    local.gradients(images, labels)
    assert gradients(local.model).keys() == gradients(plain).keys()
    for name, gradient in gradients(plain).items():
        assert torch.equal(gradients(local.model)[name], gradient)
    assert not list(local.auxiliary.parameters())


@pytest.mark.parametrize("blocks", [2, 3, 4])
def test_checkpointing_changes_neither_gradients_nor_statistics(blocks: int) -> None:
    images, labels = batch()
    plain, local = small(), learner("checkpointed-bp", blocks)
    F.cross_entropy(plain(images), labels).backward()
    local.gradients(images, labels)
    for name, gradient in gradients(plain).items():
        assert torch.equal(gradients(local.model)[name], gradient)
    for name, buffer in plain.named_buffers():
        assert torch.equal(local.model.get_buffer(name), buffer)


@pytest.mark.parametrize("method", LOCAL)
def test_backward_at_once_gives_what_one_backward_at_the_end_gives(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order saves memory and changes nothing.

    Patches are apart, because their two passes need the order; EMAs stand still, because they move after a
    window's backward pass.
    """
    monkeypatch.setattr(Follower, "follow", lambda self: None)
    images, labels = batch()
    options = {"patches": 1} if method == "hpff" else {}
    eager, deferred = learner(method, 4, **options), learner(method, 4, **options)
    deferred.load_state_dict(eager.state_dict())
    eager.gradients(images, labels)
    pending: list[Tensor] = []
    deferred.gradients(images, labels, pending.append)
    torch.autograd.backward(pending)
    assert len(pending) == len(eager.windows) > 3
    expected = gradients(deferred)
    assert expected.keys() == gradients(eager).keys()
    for name, gradient in gradients(eager).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", LOCAL)
def test_a_window_trains_its_units_and_its_own_network_alone(method: str) -> None:
    images, labels = batch()
    local = learner(method, 4)
    names = [f"backbone.{name}." for name in local.chain.names]

    def check(number: int) -> None:
        window = local.windows[number]
        allowed = tuple(names[window.start : window.stop])
        if window.objective is None:
            allowed += ("head.",)
        assert {n for n in gradients(local.model) if not n.startswith(allowed)} == set()
        assert any(n.startswith(allowed[0]) for n in gradients(local.model))
        key = window.key(0)
        assert {n for n in gradients(local.auxiliary) if not n.startswith(f"{key}.")} == set()
        local.zero_grad(set_to_none=True)

    local.gradients(images, labels, after=check)


@pytest.mark.parametrize("method", LOCAL)
def test_statistics_of_batchnorm_move_once_a_step(method: str) -> None:
    images, labels = batch()
    plain, local = small(), learner(method, 4)
    plain(images)
    local.gradients(images, labels)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(local.model.get_buffer(name), buffer)
    local.gradients(images, labels)
    assert local.model.backbone.stem.bn.num_batches_tracked == 2


@pytest.mark.parametrize("method", LOCAL)
def test_a_step_per_window_is_the_joint_step(method: str) -> None:
    """What is stepped and freed early is run by no later window."""
    images, labels = batch()
    joint, apart = learner(method, 4), learner(method, 4)
    apart.load_state_dict(joint.state_dict())
    joint.local_step(images, labels, sgd(joint))
    apart.local_step(images, labels, sgd(apart), step="window")
    assert all(torch.equal(a, b) for a, b in zip(joint.parameters(), apart.parameters(), strict=True))
    assert all(p.grad is None for p in apart.parameters())


def test_clipping_bounds_the_gradients_of_all_windows_together() -> None:
    images, labels = batch()
    local = learner("dgl", 4)
    before = [p.detach().clone() for p in local.parameters()]
    local.local_step(images, labels, sgd(local), clip=0.01)
    moved = sum(((p.detach() - q) ** 2).sum().item() for p, q in zip(local.parameters(), before, strict=True))
    assert moved**0.5 == pytest.approx(0.1 * 0.01, rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("blocks", [2, 4])
def test_the_network_that_is_left_is_the_plain_one(method: str, blocks: int) -> None:
    """Its keys do not depend on the method or on K, and it is the eval forward pass of what was trained."""
    images, labels = batch()
    local = learner(method, blocks)
    local.local_step(images, labels, sgd(local))
    plain = small()
    assert list(local.inference_model().state_dict()) == list(plain.state_dict())
    plain.load_state_dict(local.inference_model().state_dict())
    assert torch.equal(plain.eval()(images), local.eval()(images))


@pytest.mark.parametrize("method", LOCAL)
def test_names_of_auxiliary_networks_do_not_depend_on_the_number_of_blocks(method: str) -> None:
    """Clients with different K share those behind the same unit."""
    few, many = (dict(learner(method, k).auxiliary.state_dict()) for k in (2, 4))
    singles = {name for name in few if "cascade" not in name}
    assert singles <= many.keys()
    assert all(few[name].shape == many[name].shape for name in singles)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_runs_on_meta_tensors(method: str) -> None:
    with torch.device("meta"):
        net = resnet32()
    local = LocallySupervised(net, method, 4).train()
    images = torch.empty(4, 3, 32, 32, dtype=torch.uint8, device="meta")
    loss = local.local_step(images, torch.empty(4, dtype=torch.int64, device="meta"), sgd(local))
    assert loss.is_meta


@pytest.mark.parametrize("method", LOCAL)
def test_training_lowers_the_loss_of_the_tail(method: str) -> None:
    images, labels = batch(12)
    local = learner(method, 4)
    tool = torch.optim.SGD(local.parameters(), lr=0.05, momentum=0.9)
    losses = [local.local_step(images, labels, tool).item() for _ in range(12)]
    assert losses[-1] < 0.6 * losses[0]


def test_the_classifier_is_trained_in_place_and_what_is_left_is_a_copy() -> None:
    """Looking at the plain network between two epochs changes nothing of training."""
    images, labels = batch()
    net = small()
    local = LocallySupervised(net, "man", 2, sample=images).train()
    assert local.model is net
    plain = local.inference_model()
    assert isinstance(plain, Classifier)
    assert not plain.training
    before = plain(images).detach()
    local.local_step(images, labels, sgd(local))
    assert net.training
    assert net.backbone.stem.bn.num_batches_tracked == 1
    assert torch.equal(plain(images), before)
    with pytest.raises(UserError, match=r'step is "joint" or "window"'):
        local.local_step(images, labels, sgd(local), step="wndow")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([], "no window of this method trains the model's head"),
        ([(0, 2, "a"), (2, 4, "b")], "no window of this method trains the model's head"),
        ([(0, 1, "a"), (2, 4, None)], "a window over the units 2 to 3 cannot run"),
        ([(0, 2, "a"), (1, 2, "a"), (2, 4, None)], "two windows of this method have a network at 'u1_a'"),
    ],
)
def test_windows_of_a_method_of_ones_own_are_looked_at(
    spans: list[tuple[int, int, str | None]], message: str
) -> None:
    def method(division: Division, /) -> list[Window]:
        shapes = division.chain.outputs
        return [
            Window(
                start,
                stop,
                None if kind is None else Supervised(linear(shapes[stop - 1], 10)),
                kind=kind or "",
            )
            for start, stop, kind in spans
        ]

    with pytest.raises(UserError, match=message):
        LocallySupervised(small(), method, 4, sample=batch()[0])
