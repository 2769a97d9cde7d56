"""Backbones and how they are tuned (names here, code in the modules)."""

MODELS = {
    "tiny-clip": "fedsim.models.clip:tiny_clip",
    "cnn": "fedsim.models.cnn:cnn",
    "mlp": "fedsim.models.cnn:mlp",
}

TUNING = {
    "full": "fedsim.models.tuning:full",
    "head": "fedsim.models.tuning:head",
    "bias": "fedsim.models.tuning:bias",
    "norm": "fedsim.models.tuning:norm",
    "partial": "fedsim.models.tuning:partial",
}
