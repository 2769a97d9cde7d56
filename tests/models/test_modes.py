"""Every tuning mode on every kind of backbone: counts, identity at the start, what moves and what not."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from fedsim.building import build_model
from fedsim.errors import UnfitTuning, UserError
from fedsim.models.adapter import Adapter
from fedsim.models.base import Classifier, set_train_mode
from fedsim.models.clip import export_open_clip
from fedsim.models.fitting import fitting_modes
from fedsim.models.vpt import Prompts
from tests.helpers import tiny
from tests.models.zoo import DIGITS, IMAGES, MODES, inputs, make, trained, trained_count, vit_b16

KINDS = ("clip", "cnn-clip", "vit", "bert", "cnn")
TRANSFORMERS_ONLY = {"adapter", "lora"}
VITS_ONLY = {"vpt-shallow", "vpt-deep"}
CLIPS_ONLY = {"prompt", "prompt-folio", "prompt-low-rank"}
IDENTITIES = ("full", "head", "bias", "norm", "partial", "adapter", "lora", "clip-adapter")


def makes_sense(mode: str, kind: str) -> bool:
    if mode in VITS_ONLY:
        return kind in {"clip", "vit"}
    if mode in CLIPS_ONLY:
        return kind == "clip"  # the only kind here with a text tower
    return not (mode in TRANSFORMERS_ONLY and kind in {"cnn", "cnn-clip"})


PAIRS = [(mode, kind) for mode in MODES for kind in KINDS if makes_sense(mode, kind)]
NONSENSE = [(mode, kind) for mode in MODES for kind in KINDS if not makes_sense(mode, kind)]


@pytest.mark.parametrize(
    ("mode", "count"),
    [
        ("full", 86_192_640 + 10 * 512),
        ("bias", 102_912),
        ("norm", 39_936),
        ("partial", 7_087_872),
        ("head", 10 * 512),
        ("vpt-shallow", 7_680),
        ("vpt-deep", 92_160),
        ("adapter", 1_189_632),
        ("lora", 294_912),
        ("clip-adapter", 525_312),
    ],
)
def test_counts_and_one_step_of_clip_vit_b16_on_meta(mode: str, count: int) -> None:
    model = MODES[mode](vit_b16())
    assert trained_count(model) == count
    set_train_mode(model, training=True)
    logits = model(torch.zeros(2, 3, 32, 32, dtype=torch.uint8, device="meta"))
    assert logits.shape == (2, 10)
    functional.cross_entropy(logits, torch.zeros(2, dtype=torch.int64, device="meta")).backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained(model)


def test_counts_of_both_towers() -> None:
    model = vit_b16(whole=True)
    assert sum(p.numel() for p in model.parameters()) == 149_620_737
    assert trained_count(MODES["bias"](model)) == 171_008


@pytest.mark.parametrize(("mode", "kind"), PAIRS)
def test_two_steps_move_what_was_chosen_and_nothing_else(mode: str, kind: str, tmp_path: Path) -> None:
    """Also: the state of the tuned model goes into a fresh one, and a step runs on meta tensors."""
    model = MODES[mode](make(kind, tmp_path))
    chosen = trained(model)
    with torch.no_grad():
        for name in chosen:  # away from the start, where a zero factor hides the other one's gradient
            model.get_parameter(name).add_(0.2 * torch.randn_like(model.get_parameter(name)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    labels = torch.tensor([0, 1, 0, 1])
    set_train_mode(model, training=True)
    for lr in (0.1, 0.07):  # unequal, so that no two steps cancel
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs(kind)), labels).backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None} == chosen
        optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    statistics = {name for name, _ in model.named_buffers()} if model.train_modules else set()
    assert moved <= chosen | statistics
    inert = {name for name in chosen if name.endswith(("key.bias", "embeddings.weight"))}
    if kind == "cnn-clip" and model.train_modules:  # the next BatchNorm, in train mode, takes them out again
        inert |= {name for name in chosen if name.endswith(("bn2.bias", "bn3.bias"))}
    assert chosen - moved <= inert, "every chosen parameter moves, but for inert biases"

    set_train_mode(model, training=False)
    again = MODES[mode](make(kind, tmp_path))
    again.load_state_dict(model.state_dict())
    set_train_mode(again, training=False)
    assert torch.equal(again(inputs(kind)), model(inputs(kind)))

    on_meta = model.to("meta")
    assert on_meta(inputs(kind).to("meta")).sum().backward() is None


@pytest.mark.parametrize(("mode", "kind"), [(m, k) for m, k in PAIRS if m in IDENTITIES])
def test_nothing_changes_before_training(mode: str, kind: str, tmp_path: Path) -> None:
    plain = make(kind, tmp_path).eval()
    names = set(plain.state_dict())
    expected = plain(inputs(kind))
    tuned = MODES[mode](make(kind, tmp_path)).eval()
    torch.testing.assert_close(tuned(inputs(kind)), expected, rtol=1e-5, atol=1e-5)
    if mode != "lora":
        assert names <= set(tuned.state_dict()), "names of the backbone stay"


@pytest.mark.parametrize("kind", ["clip", "vit"])
@pytest.mark.parametrize("mode", ["vpt-shallow", "vpt-deep"])
def test_prompts_are_seen_by_every_block_and_by_nothing_else(mode: str, kind: str, tmp_path: Path) -> None:
    plain = make(kind, tmp_path).eval()
    tuned = MODES[mode](copy.deepcopy(plain), prompts=3).eval()
    prompts = tuned.backbone.prompts
    assert isinstance(prompts, Prompts)
    layers, count, width = prompts.tokens.shape
    patch = 2 if kind == "clip" else 16
    assert count == 3
    assert layers == (1 if mode == "vpt-shallow" else {"clip": 3, "vit": 12}[kind])
    bound = (6 / (3 * patch**2 + width)) ** 0.5
    assert 0.9 * bound < prompts.tokens.abs().max() <= bound
    rest = {name: value for name, value in tuned.state_dict().items() if name != "backbone.prompts.tokens"}
    assert rest.keys() == plain.state_dict().keys()
    assert not torch.allclose(tuned(inputs(kind)), plain(inputs(kind)), atol=1e-4)

    seen: list[int] = []
    outside: list[int] = []
    for name, module in tuned.backbone.named_modules():
        if name.endswith(("attn", "attn.qkv")) and isinstance(module, (nn.MultiheadAttention, nn.Linear)):
            module.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
        if name.endswith(("ln_post", "trunk.norm")):
            module.register_forward_pre_hook(lambda _, given: outside.append(given[0].shape[1]))
    tuned(inputs(kind))
    tokens = 16 + 1 if kind == "clip" else 4 + 1
    assert set(seen) == {tokens + 3}
    assert outside in ([tokens], [])


def test_a_deep_copy_has_modules_of_its_own(tmp_path: Path) -> None:
    """Hooks of a copy must not reach back into the original."""
    for mode in ("vpt-deep", "adapter", "clip-adapter", "lora", *CLIPS_ONLY):
        model = MODES[mode](make("clip", tmp_path)).eval()
        expected = model(inputs("clip"))
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in twin.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter))
        assert torch.equal(model(inputs("clip")), expected), mode
        assert not torch.allclose(twin(inputs("clip")), expected), mode


@pytest.mark.parametrize(("mode", "kind"), NONSENSE)
def test_a_mode_that_makes_no_sense_is_an_error(mode: str, kind: str, tmp_path: Path) -> None:
    reason = "needs a Transformer, the blocks .* are"
    if mode in VITS_ONLY:
        reason = "no plain Vision Transformer"
    elif mode in CLIPS_ONLY:
        reason = "for the text tower of a CLIP, this model has none"
    with pytest.raises(UnfitTuning, match=f"tuning '{mode}' .*{reason}"):
        MODES[mode](make(kind, tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_the_modes_that_fit_are_found_without_touching_the_model(kind: str, tmp_path: Path) -> None:
    model = make(kind, tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainable = trained(model)
    assert fitting_modes(model) == [mode for mode in MODES if makes_sense(mode, kind)]
    assert trained(model) == trainable
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(("mode", "model"), [("lora", "cnn"), ("vpt-deep", "cnn"), ("norm", "mlp")])
def test_an_experiment_whose_mode_does_not_fit_names_those_that_do(mode: str, model: str) -> None:
    experiment = tiny(model={"name": model}, tuning={"name": mode})
    with pytest.raises(UserError, match=f"tuning '{mode}'") as caught:
        build_model(experiment, DIGITS)
    fit = str(caught.value).partition(f"; [tuning] names that fit model '{model}': ")[2].split(", ")
    assert mode not in fit
    assert {"full", "head", "bias", "partial", "clip-adapter"} <= set(fit)
    for name in fit:
        assert trained(build_model(experiment.replace(f"tuning.name={name}"), DIGITS))


def test_a_gate_needs_a_linear_head() -> None:
    with pytest.raises(UserError, match="head is a Identity"):
        MODES["clip-adapter"](Classifier(nn.Linear(2, 2), nn.Identity()))


def test_the_head_trains_unless_it_already_classifies(tmp_path: Path) -> None:
    for mode in ("vpt-deep", "adapter", "lora", "clip-adapter"):
        assert "head.weight" in trained(MODES[mode](make("vit", tmp_path)))
        assert "head.weight" not in trained(MODES[mode](make("vit", tmp_path), head=False))
        assert "head.weight" not in trained(MODES[mode](make("clip", tmp_path)))
        assert "head.weight" in trained(MODES[mode](make("clip", tmp_path), head=True))


def test_lora_changes_queries_and_values_of_fused_weights_only(tmp_path: Path) -> None:
    model = MODES["lora"](make("clip", tmp_path), r=2, alpha=4.0)
    attention = model.backbone.get_submodule("visual.transformer.resblocks.0.attn")
    before = attention.in_proj_weight.clone()
    update = attention.parametrizations["in_proj_weight"][0]
    with torch.no_grad():
        update.lora_B.normal_()
    query, key, value = (attention.in_proj_weight - before).chunk(3)
    torch.testing.assert_close(query, 2.0 * update.lora_B[0] @ update.lora_A[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(value, 2.0 * update.lora_B[1] @ update.lora_A[1], rtol=1e-4, atol=1e-5)
    assert not key.any()


def test_an_adapter_adds_its_bottleneck() -> None:
    adapter = Adapter(4, 2, scale=0.5)
    nn.init.normal_(adapter.up.weight)
    h = torch.randn(3, 4)
    expected = h + 0.5 * (h @ adapter.down.weight.T + adapter.down.bias).relu() @ adapter.up.weight.T
    torch.testing.assert_close(adapter(h), expected)


def test_blocks_of_a_staged_network_are_in_order() -> None:
    from fedsim.models.timm_models import timm_model
    from fedsim.models.tuning import block_names

    model = timm_model(IMAGES, name="resnet18", image_size=32)
    assert block_names(model.backbone) == [f"trunk.layer{s}.{b}" for s in (1, 2, 3, 4) for b in (0, 1)]
    assert all("layer4" in n or n.startswith("head.") for n in trained(MODES["partial"](model, blocks=2)))


def test_what_open_clip_has_no_place_for_is_not_exported(tmp_path: Path) -> None:
    for mode in ("vpt-shallow", "adapter", "lora"):
        with pytest.raises(UserError, match="open_clip has no place for"):
            export_open_clip(MODES[mode](make("clip", tmp_path)), tmp_path)
