"""Federated data: datasets, partitions, and what a client sees of them (names here, code in the modules)."""

DATASETS = {
    "digits": "fedsim.data.sources:digits",
    "mnist-5k": "fedsim.data.sources:mnist_5k",
    "tinted-digits": "fedsim.data.drawn:tinted_digits",
    "avatars": "fedsim.data.faces:avatars",
    "adult": "fedsim.data.asset_datasets:adult",
    "cifar10": "fedsim.data.asset_datasets:cifar10",
    "fashion-mnist": "fedsim.data.asset_datasets:fashion_mnist",
    "sentiment": "fedsim.data.asset_datasets:sentiment",
    "hapt": "fedsim.data.asset_datasets:hapt",
    "torchvision:": "fedsim.data.torchvision_sets:torchvision_set",
    "npz:": "fedsim.data.own_sets:npz",
    "imagefolder:": "fedsim.data.image_folders:imagefolder",
}

PARTITIONS = {
    "iid": "fedsim.data.partitioners:iid",
    "dirichlet": "fedsim.data.partitioners:dirichlet",
    "pathological": "fedsim.data.partitioners:pathological",
    "shard": "fedsim.data.partitioners:shard",
    "size-skew": "fedsim.data.partitioners:size_skew",
    "attribute-skew": "fedsim.data.partitioners:attribute_skew",
    "natural": "fedsim.data.partitioners:natural",
}
