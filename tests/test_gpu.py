"""What a GPU owner runs: `pytest -m gpu`. Everything here needs CUDA; without it the tests are not selected.

On a machine without a GPU the same steps run on `meta` tensors (tests/test_compute.py, tests/models).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Context, Message

from fedsim import building
from tests.engine.test_serial import ask, query_app
from tests.helpers import run, tiny

pytestmark = pytest.mark.gpu

#: (model section, tuning) pairs that cover convolution, attention and BatchNorm
PAIRS = [
    ("mlp", "full"),
    ("resnet20", "full"),
    ("tiny-clip", "bias"),
    ("tiny-clip", "vpt-deep"),
    ("tiny-clip", "lora"),
]


@pytest.fixture(autouse=True)
def _gpu() -> None:
    assert torch.cuda.is_available(), "pytest -m gpu needs a CUDA GPU that torch can use (fedsim doctor)"


@pytest.mark.parametrize(("model", "tuning"), PAIRS)
def test_the_gpu_agrees_with_the_cpu(model: str, tuning: str, tmp_path: Path) -> None:
    """One round in float32: the same state up to the order of sums."""
    states = []
    for device in ("cpu", "cuda"):
        chosen = tiny(
            f"name={device}",
            "rounds=1",
            "client.lr=0.01",
            f"compute.device={device}",
            f"tuning.name={tuning}",
            model={"name": model},
        )
        states.append(run(chosen, tmp_path).state())
    for name, values in states[0].items():
        np.testing.assert_allclose(states[1][name], values, rtol=1e-3, atol=1e-3, err_msg=name)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_two_runs_give_the_same_bits(precision: str, tmp_path: Path) -> None:
    digests = {
        run(
            tiny(
                f"name=run{i}", "compute.device=cuda", f"compute.precision={precision}", model={"name": "cnn"}
            ),
            tmp_path,
        ).summary["digest"]
        for i in range(2)
    }
    assert len(digests) == 1


def test_out_of_memory_is_an_error_reply_and_leaves_the_card_free() -> None:
    """The client after the one that asked for too much runs, and nothing stays allocated."""

    def greedy(message: Message, context: Context) -> None:
        if context.node_config["partition-id"] == 0:
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")

    bad, good = ask(query_app(greedy), 2)[0]
    assert "OutOfMemoryError" in str(bad.error.reason)
    assert good.has_content()
    assert torch.cuda.memory_reserved() == torch.cuda.memory_allocated()


def test_the_task_lives_on_the_card() -> None:
    task = building.build(tiny("compute.device=cuda"))
    inputs, labels = task.train_batch(np.arange(4))
    assert inputs.is_cuda
    assert labels.is_cuda
    assert all(p.is_cuda for p in task.model.parameters())
    assert all(array.shape for array in task.shared().values())
