"""Federated data: datasets, partitions, and what a client sees of them (names here, code in the modules)."""

DATASETS = {
    "digits": "fedsim.data.sources:digits",
    "mnist-5k": "fedsim.data.sources:mnist_5k",
    "cifar10": "fedsim.data.asset_datasets:cifar10",
    "fashion-mnist": "fedsim.data.asset_datasets:fashion_mnist",
    "sentiment": "fedsim.data.asset_datasets:sentiment",
    "hapt": "fedsim.data.asset_datasets:hapt",
    "torchvision:": "fedsim.data.torchvision_sets:torchvision_set",
    "npz:": "fedsim.data.sources:npz",
    "imagefolder:": "fedsim.data.sources:imagefolder",
}

PARTITIONS = {
    "iid": "fedsim.data.partitioners:iid",
    "dirichlet": "fedsim.data.partitioners:dirichlet",
    "pathological": "fedsim.data.partitioners:pathological",
    "shard": "fedsim.data.partitioners:shard",
    "size-skew": "fedsim.data.partitioners:size_skew",
    "natural": "fedsim.data.partitioners:natural",
}
