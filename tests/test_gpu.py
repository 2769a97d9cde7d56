"""What a GPU owner runs: `pytest -m gpu`. Everything here needs CUDA; without it the tests are not selected.

On a machine without a GPU the same steps run on `meta` tensors (tests/test_compute.py, tests/models). The
other tests do not see a GPU (tests/conftest.py).
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Context, Message

from fedsim import building
from fedsim.compute import resolve
from fedsim.forgetting import experiments, request, sitting
from fedsim.local_learning import METHODS, LocallySupervised
from fedsim.models import TUNING
from fedsim.models.base import set_train_mode
from fedsim.runs import Run
from tests.engine.test_serial import ask, query_app
from tests.helpers import run, tiny

pytestmark = pytest.mark.gpu

#: (model, tuning) pairs that cover convolution, attention and BatchNorm and compute in float64, too
PAIRS = [
    ("resnet20", "full"),
    ("tiny-clip", "bias"),
    ("tiny-clip", "vpt-deep"),
    ("tiny-clip", "lora"),
]


@pytest.fixture(autouse=True)
def _gpu() -> None:
    assert torch.cuda.is_available(), "pytest -m gpu needs a CUDA GPU that torch can use (fedsim doctor)"


def gradients(device: str, model: str, tuning: str, method: str) -> dict[str, np.ndarray]:
    """Gradients of one batch in float64, from weights that were drawn on the CPU."""
    task = building.build(tiny(f"tuning.name={tuning}", "compute.device=cpu", model={"name": model}))
    rows = np.arange(8)
    images = torch.from_numpy(task.data.arrays.train_x[rows])
    torch.manual_seed(0)
    learner = LocallySupervised(task.model, method, 1 if method == "bp" else 4, sample=images)
    learner.double().to(device)
    set_train_mode(task.model, training=True)
    torch.manual_seed(0)
    learner.gradients(images.to(device), torch.from_numpy(task.data.arrays.train_y[rows]).to(device))
    return {name: p.grad.cpu().numpy() for name, p in learner.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("model", "tuning", "method"),
    [
        *((model, tuning, "bp") for model, tuning in PAIRS),
        *(("resnet20", "full", method) for method in sorted(METHODS)),
    ],
)
def test_the_gpu_agrees_with_the_cpu(model: str, tuning: str, method: str) -> None:
    """Every method's step; in float64, because a ReLU turns rounding into another gradient."""
    expected = gradients("cpu", model, tuning, method)
    found = gradients("cuda", model, tuning, method)
    assert expected
    assert expected.keys() == found.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("tuning", [name for name in TUNING if name != "clip-adapter"])
def test_every_tuning_mode_trains(tuning: str, tmp_path: Path) -> None:
    """Training with FedProx' term and clipping changes the shared state and leaves it finite."""
    chosen = tiny(
        "rounds=1",
        "compute.device=cuda",
        "client.clip=1.0",
        "client.proximal_mu=0.1",
        model={"name": "tiny-clip"},
        tuning={"name": tuning},
    )
    before = building.build(chosen).shared()
    after = run(chosen, tmp_path).state()
    assert all(np.isfinite(values).all() for values in after.values())
    assert any(not np.array_equal(before[name].numpy(), values) for name, values in after.items())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("model", "tuning"),
    [("cnn", "full"), ("resnet20", "full"), ("tiny-clip", "bias"), ("tiny-clip", "prompt")],
)
def test_two_runs_give_the_same_bits(model: str, tuning: str, precision: str, tmp_path: Path) -> None:
    digests = {
        run(
            tiny(
                f"name=run{i}",
                "compute.device=cuda",
                f"compute.precision={precision}",
                f"tuning.name={tuning}",
                model={"name": model},
            ),
            tmp_path,
        ).summary["digest"]
        for i in range(2)
    }
    assert len(digests) == 1


def test_attention_has_a_deterministic_gradient() -> None:
    """torch warns where its fused kernels would add in any order; the loop's setting rules them out."""
    resolve("cuda", "bf16")
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = torch.randn(3, 8, 4, 197, 64, device="cuda", dtype=dtype).requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.nn.functional.scaled_dot_product_attention(q, k, v).sum().backward()


def test_a_class_is_forgotten_by_every_method(tmp_path: Path) -> None:
    """Edits, retraining, the examiner and the compact model of a pruned one, all on the card."""
    chosen = tiny("rounds=2", "compute.device=cuda", "client.lr=0.05", model={"name": "vgg-small"})
    origin = request.opened(Run(run(chosen, tmp_path).run.folder))
    wanted = request.request_of(origin, "class", ["9"])
    names = experiments.methods_of(origin, wanted, "all")
    plan = sitting.plan_of(origin, wanted, ["recover.rounds=1"], tmp_path / "forget")
    report = sitting.sit(plan, sitting.Wish(names, relearn=1), lambda _: nullcontext(()))
    assert {"original", "retrain", "retrain-2", *names} == set(report["models"])
    assert report["models"]["prune"]["size"]["parameters_compact"] > 0
    assert report["models"]["head-mask"]["figures"]["forget_test"] == 0


def test_out_of_memory_is_an_error_reply_and_leaves_the_card_free() -> None:
    """The client after the one that asked for too much runs, and nothing stays allocated."""

    def greedy(message: Message, context: Context) -> None:
        if context.node_config["partition-id"] == 0:
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")

    bad, good = ask(query_app(greedy), 2)[0]
    assert "OutOfMemoryError" in str(bad.error.reason)
    assert good.has_content()
    reserved = torch.cuda.memory_reserved()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == reserved


def test_the_task_lives_on_the_card() -> None:
    task = building.build(tiny("compute.device=cuda"))
    inputs, labels = task.train_batch(np.arange(4))
    assert inputs.is_cuda
    assert labels.is_cuda
    assert all(p.is_cuda for p in task.model.parameters())
    assert all(array.shape for array in task.shared().values())
