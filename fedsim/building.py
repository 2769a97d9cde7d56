"""From an Experiment to its Task: data, model, tuning, what travels; once per process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fedsim import augmentation, compute, config, payload
from fedsim.config import Experiment
from fedsim.data import attributes as known_attributes
from fedsim.data import backdoor, federated, forgotten, needs, pixels
from fedsim.data.classes import positions_of
from fedsim.data.federated import FederatedData
from fedsim.data.store import load_arrays
from fedsim.errors import UnfitTuning, UserError
from fedsim.models.base import Classifier, DataInfo
from fedsim.models.fitting import fitting_modes
from fedsim.resident import unfold
from fedsim.seeding import generators_restored, seed_everything
from fedsim.task import Network, Task


@dataclass(frozen=True)
class OwnData:
    """Where a real node keeps its client's data (`--node-config 'data-path="/data/mine.npz"'`)."""

    path: str
    client: int
    attributes: str = ""  #: of the server's data, as JSON
    ranges: str = ""  #: what the server takes as black and white, as JSON
    _: KW_ONLY
    classes: tuple[str, ...]  #: of the server's data, in the order of its labels


def build(experiment: Experiment, own: OwnData | None = None) -> Task:
    """Build a task: data, model (weights from the experiment's seed), tuning, selection.

    Args:
        experiment: what to build.
        own: a real node's own data, instead of its share of the experiment's.

    Raises:
        UserError: anything in the experiment that does not fit together.
    """
    needs.require([experiment], ["data", "model"] if own is None else ["model"])
    data = _forgetting(experiment, own)
    augmentation.check(experiment, data.info.sample_shape)
    where = compute.resolve(**experiment.settings["compute"])
    _check_detacher(experiment, data, own)
    model = where.place(build_model(experiment, data.info))
    personal = [*experiment.settings["payload"].get("personal", []), *_personal_networks(experiment, model)]
    selection = payload.select(model, model.train_modules, personal)
    return Task(
        experiment=experiment,
        model=model,
        data=data,
        selection=selection,
        frozen_digest=payload.frozen_digest(model, selection.changing, model.derived),
        loss=_loss(model.head, data.base_classes if data.new_classes else None),
        compute=where,
    )


def _loss(head: nn.Module, base: int | None) -> Callable[[Network, Tensor, Tensor], Tensor]:
    """Mean cross-entropy of a batch, plus what a head wants of its own parameters (`penalty() -> scalar`).

    Args:
        head: of the model.
        base: train among so many first classes; None: among all.
    """
    penalty: Callable[[], Tensor] | None = getattr(head, "penalty", None)

    def loss(network: Network, inputs: Tensor, labels: Tensor) -> Tensor:
        fit = F.cross_entropy(network(inputs)[:, :base], labels)
        return fit if penalty is None else fit + penalty()

    return loss


def _check_detacher(experiment: Experiment, data: FederatedData, own: OwnData | None) -> None:
    """Whether what is to be unlearned can be, and somebody does it."""
    detacher, arrays = experiment["detacher"], data.arrays
    names = detacher.common.get("attributes", [])
    if detacher.name != "none" and experiment["client"].name == "standard":
        raise UserError('[detacher] needs clients that use it: [strategy] name = "attribute-unlearning"')
    label = experiment["data"].options.get("label")
    if label in names:
        raise UserError(f"[detacher] attribute '{label}' is the task itself ([data] label); name another one")
    if names and arrays.train_z is not None and own is None:
        parts = {"training": np.asarray(arrays.train_z), "test": np.asarray(arrays.test_z)}
        known_attributes.check(names, arrays.attributes, parts, np.asarray(arrays.train_y))


def _personal_networks(experiment: Experiment, model: Classifier) -> list[str]:
    """A pattern for a detacher's networks, if it has some and they stay with the client."""
    kept = experiment["detacher"].common["auxiliary"] == "personal"
    there = any(name.startswith("detacher.") for name, _ in model.named_parameters())
    return ["detacher.*"] if kept and there else []


def build_model(experiment: Experiment, info: DataInfo) -> Classifier:
    """The tuned model of an experiment, untrained; random weights follow from the experiment's seed.

    Raises:
        UserError: the model does not fit the data, or the tuning does not fit the model.
    """
    with generators_restored():
        seed_everything(experiment.seed)
        plain = experiment.build("model", replace(info, folders=experiment.roots))
        try:
            if isinstance(plain, nn.Module):
                _settle(plain, info)
            model = experiment.build("tuning", plain)
        except UnfitTuning as error:
            names = ", ".join(fitting_modes(plain))
            chosen = experiment["model"].name
            raise UserError(f"{error}; [tuning] names that fit model '{chosen}': {names}") from error
    if not isinstance(model, Classifier):
        raise UserError(
            f"[tuning] '{experiment['tuning'].name}' must return a fedsim.models.base.Classifier, "
            f"got {type(model).__name__}"
        )
    unfold(model)
    model.text = None  # what no tuning mode took is let go
    if experiment["detacher"].common.get("attributes"):
        from fedsim.unlearning.cut import detachable

        with generators_restored():
            seed_everything(experiment.seed + 1)
            return detachable(experiment, model, info)
    if experiment["detacher"].name != "none":
        known = ", ".join(attribute.name for attribute in info.attributes) or "none"
        raise UserError(f"[detacher] attributes is missing: name what to unlearn; the data have: {known}")
    return model


def class_names(experiment: Experiment) -> tuple[str, ...]:
    """The classes of an experiment's data, in the order of the labels."""
    source = experiment["data"]
    return load_arrays(source.name, dict(source.options), roots=experiment.roots).classes


def _settle(model: nn.Module, info: DataInfo) -> None:
    """Give lazy modules (`nn.LazyLinear`) their shapes, by one sample of zeros."""
    if any(is_lazy(value) for value in (*model.parameters(), *model.buffers())):
        with torch.no_grad():
            model.eval()(torch.zeros(1, *info.sample_shape, dtype=getattr(torch, info.dtype)))


def load_data(experiment: Experiment) -> FederatedData:
    """The experiment's federated data."""
    partition, source = experiment["partition"], experiment["data"]
    seed = partition.common.get("seed", experiment.seed)
    data = federated.load(
        source.name,
        dict(source.options),
        partition.name,
        dict(partition.options),
        clients=partition.common["clients"],
        shots=partition.common.get("shots"),
        new_classes=partition.common["new_classes"],
        pooled=partition.common["pooled"],
        validation=experiment.settings["evaluation"]["validation"],
        seed=seed,
        roots=experiment.roots,
    )
    keys = experiment.settings["backdoor"]
    return backdoor.planted(data, **keys) if "client" in keys else data


def _forgetting(experiment: Experiment, own: OwnData | None) -> FederatedData:
    """The data (of a node: its own) without what [forget] names."""
    keys = experiment.settings["forget"]
    data = load_data(experiment) if own is None else _load_own(experiment, own)
    classes = positions_of(keys.get("classes", []), data.arrays.classes, "[forget] classes")
    clients = keys.get("clients", [])
    if not classes and not clients:
        return data
    if own is None:
        forgotten.check(data, classes, clients)
    return forgotten.without(data, classes, clients, relearn=keys["relearn"])


def _load_own(experiment: Experiment, own: OwnData) -> FederatedData:
    return federated.load_own(
        own.path,
        dict(experiment["data"].options),
        client=own.client,
        clients=experiment.clients,
        new_classes=experiment["partition"].common["new_classes"],
        roots=[Path.cwd()],
        classes=own.classes,
        attributes=known_attributes.from_json(own.attributes) if own.attributes else (),
        ranges=pixels.from_json(own.ranges) if own.ranges else (),
    )


@lru_cache(maxsize=2)
def cached(text: str, own: OwnData | None = None) -> Task:
    """The task of an experiment sent as JSON; built once per process."""
    return build(config.from_json(text), own)
