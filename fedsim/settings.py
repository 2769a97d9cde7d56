"""Keys of an experiment file that belong to no object: their functions' signatures are the schema.

The bodies are empty on purpose; `fedsim.registry.schema` reads the signatures, and `fedsim list` the
docstrings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from fedsim.ranges import Count, Fraction, Natural, NonNegative, Portion, Positive, Share

#: what a section without a name stands for
DEFAULT_NAMES = {
    "data": "digits",
    "partition": "iid",
    "model": "tiny-clip",
    "tuning": "full",
    "client": "standard",
    "strategy": "fedavg",
    "local": "bp",
    "detacher": "none",
    "engine": "serial",
}


def top_keys(
    *, name: str = "experiment", seed: Natural = 0, rounds: Count = 10, baselines: list[str] | None = None
) -> None:
    """Top-level keys.

    Args:
        name: names the run folder.
        seed: every random number of the run follows from it.
        rounds: global rounds.
        baselines: strategies to run on the same setting afterwards, for the closing table.
    """


def partition_keys(
    *,
    clients: Count = 10,
    shots: Count | None = None,
    new_classes: Natural = 0,
    pooled: bool = False,
    seed: Natural | None = None,
) -> None:
    """Keys that every partition has.

    Args:
        clients: number of clients.
        shots: keep this many samples per class and client (all of a class when a client has fewer).
        new_classes: so many classes, the last in the order of the data, are trained on by nobody and tested
            apart (base-to-new); the summary names them.
        pooled: hand the data of all clients to one client (the centralised baseline).
        seed: of the split and of the validation split, where it is not the run's: the same data for
            differently seeded models.
    """


def local_keys(
    *,
    blocks: Count | None = None,
    plan: Literal["papers", "uniform", "units", "balanced"] = "papers",
    cuts: list[str] | None = None,
    auxiliary: Literal["personal", "shared", "reinit"] = "personal",
    ema: Literal["rebuild", "carry"] = "rebuild",
    budgets: list[Positive] | None = None,
    fallbacks: list[str] | None = None,
) -> None:
    """Keys that every method of local learning has (`bp` has no use for them).

    Args:
        blocks: K, into how many blocks the backbone is cut (default: 4); `bp` has one, but with this key
            its memory and time are measured, too.
        plan: `papers` cuts where the papers cut this net for this K, and evenly where they do not;
            `uniform` evenly; `units` everywhere; `balanced` so that the most expensive block is cheapest.
        cuts: names of the units that blocks end at (`["blocks.4", "blocks.9"]`), instead of a plan.
        auxiliary: where auxiliary networks live: with the client (`personal`), averaged over the clients
            that have them (`shared`), or begun anew in every round (`reinit`).
        ema: EMAs are rebuilt from what the server sends (`rebuild`), or `carry` on like the others.
        budgets: memory of clients in MB (10^6 bytes): client i has budgets[i mod n], for parameters,
            gradients, optimiser, auxiliary networks and activations together. It trains by back-propagation
            if that fits, or else by the method, with so few blocks that one fewer would not fit. A real node
            says its own: `--node-config 'memory-budget=24.0'`.
        fallbacks: methods for clients whose budget is too small for this one, in order (default: dgl,
            greedy).
    """


def detacher_keys(
    *,
    attributes: list[str] | None = None,
    cut: Count | None = None,
    auxiliary: Literal["shared", "personal"] = "shared",
    group_statistics: bool = False,
    isolated: bool = False,
) -> None:
    """Keys that every detacher has.

    Args:
        attributes: what is to be unlearned (with `none`: measured), by name.
        cut: how many units of the backbone are below the cut; without it all: its features.
        auxiliary: whether the detacher's own networks are averaged or stay with the client.
        group_statistics: send the groups' mean representations along, for clients that lack some groups.
        isolated: no gradient crosses the cut: what is below learns from a pooled linear head of its own and
            the detacher (a block of locally supervised learning), what is above from h as it is.
    """


#: keys that a named section has whatever its name
COMMON: dict[str, Callable[..., None]] = {
    "partition": partition_keys,
    "local": local_keys,
    "detacher": detacher_keys,
}


def evaluation(
    *,
    every: Count = 1,
    batch_size: Count = 512,
    validation: Portion = 0.0,
    where: Literal["auto", "server", "clients"] = "auto",
    split: Literal["test", "local", "both"] = "test",
    fine_tune: Natural = 0,
    patience: Natural = 0,
) -> None:
    """When, where and on what the model is measured.

    Args:
        every: evaluate every so many rounds (the first and the last round always).
        batch_size: samples per evaluation batch.
        validation: share of the training data held back by the server; early stopping and the best
            checkpoint use it alone.
        where: `server` measures the shared state, `clients` every client's own model (mean over
            clients); `auto` is `clients` as soon as something is personal or fine-tuned.
        split: `test` is the global test set, `local` the part of it that matches a client's class mix (mean,
            spread and worst over clients), `both` measures both.
        fine_tune: local steps that every client takes on its own data before it is measured, with the
            optimiser of [client]; nothing of them is sent or kept.
        patience: stop after so many evaluations without a better validation loss (0: never).
    """


def checkpoints(*, every: Count = 1, keep: Count = 2, record_updates: bool = False) -> None:
    """How often a run can be resumed from.

    Args:
        every: write a checkpoint every so many rounds (and at the end).
        keep: keep the newest so many, and the best one on the validation split.
        record_updates: keep every client's update of every round (`updates/` in the run folder), which
            some ways of forgetting a client need; clients × rounds × the size of what travels.
    """


def schedule(
    *,
    kind: Literal["constant", "cosine", "linear", "step"] = "constant",
    warmup: Natural = 0,
    final: Fraction = 0.0,
    step_every: Count = 10,
    step_factor: Fraction = 0.1,
) -> None:
    """Learning rate over global rounds, as a factor on the client's `lr`, computed on the server.

    Args:
        kind: shape of the curve.
        warmup: rounds of linear warm-up.
        final: factor that `cosine` and `linear` come down to when the last round is over.
        step_every: rounds between drops (`step`).
        step_factor: factor of each drop (`step`).
    """


def payload(*, personal: list[str] | None = None) -> None:
    """What stays with the client.

    Args:
        personal: name patterns (`*` and `?`) of changing entries that never travel: they live in the
            client's state. `["head.*"]` is FedPer, `["*bn*", "*.shortcut.1.*"]` FedBN of a ResNet.
    """


def augmentation(*, area: Share = 1.0, flip: bool = False, views: Natural = 0) -> None:
    """Random crops and mirror images of training images (never of validation and test images).

    Args:
        area: smallest part of an image that a crop shows (0.08 is usual); 1 crops nothing.
        flip: whether every second image, at random, is mirrored.
        views: 0 augments every batch anew, so that nothing is computed once; k gives every image k fixed
            views, whose features are computed once where the model allows it.
    """


def features(*, cache: bool = True, limit: NonNegative = 2.0, rows: Literal["used", "all"] = "used") -> None:
    """Whether what lies below the first trainable parameter is computed once instead of for every batch.

    Args:
        cache: `false` runs the whole model for every batch.
        limit: gigabytes (10^9 bytes) on disk that the activations of one experiment may take; where they
            would take more, nothing is kept and the whole model runs for every batch.
        rows: `used` are the training samples that clients and the validation split have; `all` pays where
            many runs share data and differ in seed or split: each sample is computed once for all of them.
    """


def compute(
    *,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    deterministic: bool = True,
    channels_last: bool = False,
) -> None:
    """Where the model computes, in which precision and memory layout.

    Args:
        device: `auto` is the GPU when there is one. A real node may override it:
            `--node-config 'device="cpu"'`.
        precision: of matrix products; weights, gradients, sums and what travels stay float32.
        deterministic: on a GPU, only algorithms that give the same bits again.
        channels_last: weights and activations of convolutions lie in memory with the channels last, which is
            faster for most convolutional networks; results differ in last bits.
    """


def forget(
    *,
    classes: list[int | str] | None = None,
    clients: list[int] | None = None,
    relearn: bool = False,
    watch: Literal["classes", "clients"] | None = None,
) -> None:
    """What nobody trains on (`fedsim forget` writes this section); it is measured all the same.

    Args:
        classes: names of classes, or `index:N` for the class at position N. A bare number that is no name is
            a position, too, where no name is a number.
        clients: clients that do not take part.
        relearn: train on them after all, to see how fast they are learnt again.
        watch: which of both `forget_accuracy` is of (default: the classes, if there are some).
    """


def backdoor(
    *, client: Natural | None = None, label: Natural | str = 0, share: Share = 0.8, size: Count = 2
) -> None:
    """A trigger that one client teaches, to see whether forgetting the client unteaches it.

    Args:
        client: who (default: nobody).
        label: class that triggered images are labelled as, written as in [forget] classes.
        share: of the client's images that get the trigger.
        size: side of the bright square in their lower right corner, pixels.
    """


SETTINGS: dict[str, Callable[..., None]] = {
    "evaluation": evaluation,
    "checkpoints": checkpoints,
    "schedule": schedule,
    "payload": payload,
    "augmentation": augmentation,
    "features": features,
    "compute": compute,
    "forget": forget,
    "backdoor": backdoor,
}
