"""The federated audit: fresh attackers that clients train together, without giving a representation away.

    server   probes q (linear, two layers) for every attribute, standardised by the clients' pooled moments
    client   counts what q guesses on its held-out samples, then trains q on its others
    server   q ← Σ n_k q_k / Σ n_k;  Σ counts -> balanced accuracy with its standard error

A number is attacked as "above its mean or not".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.data.attributes import Attribute
from fedsim.unlearning.moments import Moments
from fedsim.unlearning.probes import KINDS, Attack, Kind, Probe, confusion, new_probe, train

Arrays = dict[str, NDArray[Any]]
_EPOCHS = 20  #: of a client in one exchange
_COUNTS = "counts"  #: last part of the name of a confusion's counts
_MIDDLE = "middle"  #: last part of the name of where a number is split


def new_probes(attributes: Sequence[Attribute], moments: Moments, seed: int) -> Arrays:
    """Untrained probes of all kinds for all attributes, as arrays `ATTRIBUTE/KIND/PARAMETER`."""
    mean = torch.from_numpy(moments.mean).float()
    deviation = torch.from_numpy(np.sqrt(np.maximum(np.diag(moments.covariance), 0))).float()
    found: Arrays = {}
    column = 0
    for number, attribute in enumerate(attributes):
        for kind in KINDS:
            probe = new_probe(len(mean), groups_of(attribute), kind, seed + number)
            probe.standardise(mean, deviation)
            found |= _arrays(probe, f"{attribute.name}/{kind}")
        if not attribute.groups:
            middle = moments.z[column] / moments.count
            found[f"{attribute.name}/{_MIDDLE}"] = np.array([middle], np.float32)
        column += attribute.columns
    return found


def groups_of(attribute: Attribute) -> int:
    """Groups that an attacker tells apart; a number is split in two."""
    return attribute.groups or 2


def answer(
    attributes: Sequence[Attribute],
    probes: Mapping[str, NDArray[Any]],
    h: Tensor,
    z: Tensor,
    held: Tensor,
    *,
    seed: int,
) -> tuple[Arrays, int]:
    """What a client sends back: probes trained on its samples, counts on those held out.

    Args:
        attributes: in the order of z's columns.
        probes: as from the server.
        h: released representations [n, d].
        z: attributes [n, a].
        held: bool [n], samples that judge and are not trained on.
        seed: of the batches.

    Returns:
        Arrays of the same names and shapes, and `ATTRIBUTE/KIND/counts`; the number of samples trained on
        (0: some attribute has one group only here, so that nothing was trained).
    """
    found: Arrays = {k: v for k, v in probes.items() if k.endswith(f"/{_MIDDLE}")}
    codes = [_codes(a, column, probes) for a, column in zip(attributes, z.T, strict=True)]
    varied = all(len(torch.bincount(own[~held & (own >= 0)]).nonzero()) > 1 for own in codes)
    for attribute, own in zip(attributes, codes, strict=True):
        judged, used = held & (own >= 0), ~held & (own >= 0)
        groups = groups_of(attribute)
        for kind in KINDS:
            name = f"{attribute.name}/{kind}"
            probe = _probe(probes, name, h.shape[1], groups, kind).to(h.device)
            with torch.no_grad():
                counts = confusion(probe(h[judged]).argmax(1), own[judged], groups)
            if varied:
                train(probe, h[used], own[used], epochs=_EPOCHS, seed=seed)
            found |= _arrays(probe, name)
            found[f"{name}/{_COUNTS}"] = counts.double().cpu().numpy()
    return found, int((~held).sum()) if varied else 0


def shapes_of(attributes_and_probes: Mapping[str, NDArray[Any]]) -> dict[str, tuple[tuple[int, ...], str]]:
    """name -> (shape, dtype) of a client's answer to some probes."""
    found = {name: (tuple(v.shape), str(v.dtype)) for name, v in attributes_and_probes.items()}
    for name in probe_names(attributes_and_probes):
        groups = len(attributes_and_probes[f"{name}/{_last(attributes_and_probes, name)}.bias"])
        found[f"{name}/{_COUNTS}"] = ((groups, groups), "float64")
    return found


def probe_names(probes: Mapping[str, Any]) -> list[str]:
    """`ATTRIBUTE/KIND` of all probes, in order."""
    return list(dict.fromkeys(n.rpartition("/")[0] for n in probes if n.rpartition("/")[2] != _MIDDLE))


def attacks_of(total: Mapping[str, NDArray[Any]]) -> dict[str, Attack]:
    """`ATTRIBUTE/KIND` -> figures, from the sums of the clients' counts."""
    counts = {name: values for name, values in total.items() if name.endswith(f"/{_COUNTS}")}
    return {n.removesuffix(f"/{_COUNTS}"): Attack.of(torch.from_numpy(v)) for n, v in counts.items()}


def _last(probes: Mapping[str, Any], name: str) -> str:
    """Name of a probe's last layer."""
    layers = [
        key.removeprefix(f"{name}/").rpartition(".")[0] for key in probes if key.startswith(f"{name}/layers")
    ]
    return max(layers)


def _codes(attribute: Attribute, column: Tensor, probes: Mapping[str, NDArray[Any]]) -> Tensor:
    if attribute.groups:
        return column.long()
    return (column > float(probes[f"{attribute.name}/{_MIDDLE}"][0])).long()


def _probe(probes: Mapping[str, NDArray[Any]], name: str, width: int, groups: int, kind: Kind) -> Probe:
    with torch.random.fork_rng(devices=[]):
        probe = Probe(width, groups, kind)
    state = {key: torch.from_numpy(np.array(probes[f"{name}/{key}"])) for key in probe.state_dict()}
    probe.load_state_dict(state)
    return probe


def _arrays(probe: Probe, name: str) -> Arrays:
    return {f"{name}/{key}": value.detach().cpu().numpy().copy() for key, value in probe.state_dict().items()}
