"""Device and precision: bf16 and fp16 train like fp32 within their resolution, and fp32 exactly as ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message

from clients.training import back_propagation
from fedsim import building
from fedsim.compute import Compute, resolve
from fedsim.errors import UserError
from fedsim.models.base import set_train_mode
from fedsim.optimizers import make_optimizer
from fedsim.task import Task
from tests.engine.test_serial import ask, query_app
from tests.helpers import run, tiny


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains_like_fp32(precision: str, tmp_path: Path) -> None:
    """Close to fp32, not equal to it (it is in use), with float32 on the wire, and reproducible."""
    runs = {
        name: run(tiny(f"name={name}", f"compute.precision={kind}"), tmp_path)
        for name, kind in (("full", "fp32"), ("half", precision), ("again", precision))
    }
    full, half, again = (runs[name].state() for name in ("full", "half", "again"))
    assert runs["half"].summary["digest"] == runs["again"].summary["digest"]
    assert runs["half"].summary["digest"] != runs["full"].summary["digest"]
    assert runs["half"].summary["bytes_up"] == runs["full"].summary["bytes_up"]
    for name, values in full.items():
        assert half[name].dtype == values.dtype == np.float32
        np.testing.assert_allclose(half[name], values, atol=0.02)
        np.testing.assert_array_equal(half[name], again[name])


def test_fp16_gradients_are_scaled_and_unscaled() -> None:
    """A step leaves scaled gradients; after `unscale_` they are those of fp32 within fp16's resolution."""
    exact, scaled = (building.build(tiny(f"compute.precision={p}")) for p in ("fp32", "fp16"))
    for task in (exact, scaled):
        inputs, labels = task.train_batch(np.arange(16))
        with task.compute.autocast():
            back_propagation(task, inputs, labels)
    scale = scaled.scaler.get_scale()
    assert scale > 1
    for one, two in zip(exact.model.parameters(), scaled.model.parameters(), strict=True):
        assert one.grad is not None
        assert two.grad is not None
        torch.testing.assert_close(two.grad / scale, one.grad, rtol=0.05, atol=1e-3)


def test_a_step_that_forgets_to_scale_is_refused_under_fp16() -> None:
    """`loss.backward()` in place of `task.backward(loss)` would train on gradients divided by the scale."""
    from clients.training import Recipe, fit

    task = building.build(tiny("compute.precision=fp16"))
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1)

    def careless(task: Task, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = task.loss(task.network, inputs, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    recipe = Recipe(0.1, 1.0, None, 16, 0.9, 0.0, 0.0, 0.0)
    with pytest.raises(AssertionError, match="unscale"):
        fit(task, np.arange(32), recipe, optimizer, careless, lr_scale=1.0, proximal_mu=0.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no GPU")
def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_an_error() -> None:
    assert resolve("auto", "fp32", deterministic=True) == Compute(torch.device("cpu"), "fp32")
    with pytest.raises(UserError, match=r"compute.device = \"auto\""):
        resolve("cuda", "bf16", deterministic=True)


@pytest.mark.parametrize("deterministic", [True, False])
def test_deterministic_leaves_attention_no_kernel_that_adds_in_any_order(
    deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch warns of them and goes on; found on a GPU, where tests/test_gpu.py looks for the warning."""
    cuda = torch.backends.cuda
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    try:
        resolve("cuda", "fp32", deterministic=deterministic)
        fused = (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled())
        assert fused == (not deterministic,) * 3
        assert cuda.math_sdp_enabled()
        assert torch.are_deterministic_algorithms_enabled() is deterministic
    finally:
        resolve("cuda", "fp32", deterministic=False)


@pytest.mark.parametrize(
    ("model", "tuning", "optimizer"),
    [
        ({"name": "mlp"}, "full", "sgd"),
        ({"name": "resnet20"}, "full", "sgd"),
        ({"name": "tiny-clip"}, "vpt-deep", "adamw"),
        # gpu_check.toml's own, with random weights
        ({"name": "timm:vit_small_patch14_dinov2", "image_size": 112}, "bias", "adamw"),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else value,
)
def test_a_model_on_another_device_computes_there(model: Any, tuning: str, optimizer: str) -> None:
    """A whole batch on `meta`: nothing inside loss, backward or optimiser step touches the CPU."""
    task = building.build(tiny(f"tuning.name={tuning}", "features.cache=false", model=model))
    task.compute = Compute(torch.device("meta"))
    task.model.to("meta")
    set_train_mode(task.model, training=True)
    trained = [p for p in task.model.parameters() if p.requires_grad]
    tool = make_optimizer(trained, optimizer, lr=0.1, momentum=0.9)
    inputs, labels = task.train_batch(np.arange(8))
    assert inputs.is_meta
    assert labels.is_meta
    loss = back_propagation(task, inputs, labels)
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    tool.step()
    assert loss.is_meta
    assert all(p.grad is not None and p.grad.is_meta for p in trained)


def test_out_of_memory_empties_the_cache_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error reply like any other, and torch gives back what it holds before the next client."""
    freed: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(1))

    def greedy(message: Message, context: Context) -> None:
        if context.node_config["partition-id"] == 0:
            raise torch.OutOfMemoryError("tried to allocate 1 PiB")

    bad, good = ask(query_app(greedy), 2)[0]
    assert "client 0: OutOfMemoryError: tried to allocate 1 PiB" in str(bad.error.reason)
    assert good.has_content()
    assert freed == [1]


def test_channels_last_is_the_same_training(tmp_path: Path) -> None:
    """Equal but for last bits, in use, and what travels is laid out as ever."""
    cnn = tiny(model={"name": "cnn", "width": 8})
    runs = {
        name: run(cnn.replace(f"name={name}", f"compute.channels_last={chosen}"), tmp_path)
        for name, chosen in (("first", "false"), ("last", "true"), ("again", "true"))
    }
    assert runs["last"].summary["digest"] == runs["again"].summary["digest"]
    for name, values in runs["first"].state().items():
        assert runs["last"].state()[name].flags.c_contiguous
        np.testing.assert_allclose(runs["last"].state()[name], values, rtol=1e-3, atol=1e-4)
    task = building.build(cnn.replace("compute.channels_last=true"))
    kernels = [p for p in task.model.parameters() if p.dim() == 4 and p.shape[1] > 1]
    assert kernels
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    task.load(task.initial_payload())
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    assert all(array.numpy().flags.c_contiguous for array in task.shared().values())
