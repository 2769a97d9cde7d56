"""Backbones and how they are tuned (names here, code in the modules)."""

MODELS = {
    "tiny-clip": "fedsim.models.clip:tiny_clip",
    "clip-lite": "fedsim.models.open_clip_models:clip_lite",
    "open_clip:": "fedsim.models.open_clip_models:open_clip_model",
    "efficientnet-lite0": "fedsim.models.timm_models:efficientnet_lite0",
    "vit-small": "fedsim.models.timm_models:vit_small",
    "timm:": "fedsim.models.timm_models:timm_model",
    "minilm": "fedsim.models.hf:minilm",
    "hf:": "fedsim.models.hf:hf_model",
    "hf-clip:": "fedsim.models.hf_clip:hf_clip",
    "cnn": "fedsim.models.cnn:cnn",
    "signal-cnn": "fedsim.models.cnn:signal_cnn",
    "mlp": "fedsim.models.cnn:mlp",
    "resnet20": "fedsim.models.resnet:resnet20",
    "resnet32": "fedsim.models.resnet:resnet32",
    "resnet56": "fedsim.models.resnet:resnet56",
    "resnet110": "fedsim.models.resnet:resnet110",
    "vgg-small": "fedsim.models.vgg:vgg_small",
    "vgg11": "fedsim.models.vgg:vgg11",
    "vgg16": "fedsim.models.vgg:vgg16",
}

TUNING = {
    "full": "fedsim.models.tuning:full",
    "head": "fedsim.models.tuning:head",
    "bias": "fedsim.models.tuning:bias",
    "norm": "fedsim.models.tuning:norm",
    "partial": "fedsim.models.tuning:partial",
    "vpt-shallow": "fedsim.models.vpt:vpt_shallow",
    "vpt-deep": "fedsim.models.vpt:vpt_deep",
    "adapter": "fedsim.models.adapter:adapter",
    "lora": "fedsim.models.lora:lora",
    "prompt": "fedsim.models.prompt:prompt",
    "prompt-folio": "fedsim.models.personal_prompts:prompt_folio",
    "prompt-low-rank": "fedsim.models.personal_prompts:prompt_low_rank",
    "clip-adapter": "fedsim.models.clip_adapter:clip_adapter",
}
