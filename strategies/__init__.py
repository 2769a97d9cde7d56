"""Server sides of methods, one paper a file. A new method adds its line here.

The table feeds the registry, `fedsim list strategies`, the docs and the behaviour matrix of the tests.
"""

STRATEGIES = {
    # ours
    "fedavg": "fedsim.averaging:WeightedAverage",
    "fedtune": "strategies.fedtune:FedTune",
    "promptfl": "strategies.promptfl:PromptFL",
    "promptfolio": "strategies.promptfolio:PromptFolio",
    "fedpgp": "strategies.fedpgp:FedPGP",
    "fedclip": "strategies.fedclip:FedCLIP",
    "unlearn": "strategies.unlearn:Unlearn",
    "federaser": "strategies.federaser:FedEraser",
    "attribute-unlearning": "strategies.attribute_unlearning:AttributeUnlearning",
    "local-only": "strategies.baselines:LocalOnly",
    "centralised": "strategies.baselines:Centralised",
    # Flower's own classes on our payload
    "flwr-fedavg": "flwr.serverapp.strategy:FedAvg",
    "flwr-fedprox": "flwr.serverapp.strategy:FedProx",
    "fedavgm": "flwr.serverapp.strategy:FedAvgM",
    "fedadagrad": "flwr.serverapp.strategy:FedAdagrad",
    "fedadam": "flwr.serverapp.strategy:FedAdam",
    "fedyogi": "flwr.serverapp.strategy:FedYogi",
    "fedmedian": "flwr.serverapp.strategy:FedMedian",
    "fedtrimmedavg": "flwr.serverapp.strategy:FedTrimmedAvg",
    "krum": "flwr.serverapp.strategy:Krum",
    "multikrum": "flwr.serverapp.strategy:MultiKrum",
    "bulyan": "flwr.serverapp.strategy:Bulyan",
}

#: what `unlearn` does to a finished model: `[strategy.edit] name`
EDITS = {
    "prune": "strategies.unlearn_edits:Prune",
    "not": "strategies.unlearn_edits:Negate",
    "none": "strategies.unlearn_edits:Nothing",
    "head-mask": "strategies.unlearn_edits:HeadMask",
    "fresh-head": "strategies.unlearn_edits:FreshHead",
    "pga": "strategies.unlearn_edits:Ascent",
}
