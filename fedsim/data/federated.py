"""A dataset with its split: what the server holds back, and which samples each client has.

    training data ─┬─ validation (server only, stratified, before anything is dealt out)
                   └─ partition ─> client 0, client 1, ...
    test data ─────── reported alone; `local_test` is the part that matches a client's classes

All indices point into the arrays of the whole dataset. Nothing here needs torch.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedsim import registry
from fedsim.data.attributes import Attribute, conformed
from fedsim.data.classes import as_the_server
from fedsim.data.partition import Partition, partition
from fedsim.data.pixels import ValueRange
from fedsim.data.sources import Arrays, stratified
from fedsim.data.store import load_arrays
from fedsim.errors import UserError

if TYPE_CHECKING:
    from fedsim.data.forgotten import Forgotten
    from fedsim.models.base import DataInfo

Integers = npt.NDArray[np.int64]

_DRAWN_CLIENTS, _LISTED_CLIENTS = 60, 40


@dataclass(frozen=True)
class FederatedData:
    """Arrays and who has them.

    Args:
        arrays: the whole dataset.
        partition: positions of each client in the training arrays.
        validation: sorted positions in the training arrays that the server holds back, int64.
        forgotten: what the run must do without (`fedsim.data.forgotten`); None: nothing.
        new_classes: how many classes, the last, nobody trains on (base-to-new).
    """

    arrays: Arrays
    partition: Partition
    validation: Integers
    forgotten: Forgotten | None = None
    new_classes: int = 0

    @property
    def base_classes(self) -> int:
        """How many classes, the first, are trained on."""
        return len(self.arrays.classes) - self.new_classes

    @property
    def info(self) -> DataInfo:
        """What a model may know of the data."""
        from fedsim.models.base import DataInfo

        x = self.arrays.train_x
        arrays = self.arrays
        return DataInfo(
            arrays.classes,
            tuple(x.shape[1:]),
            arrays.attributes,
            str(x.dtype),
            vocabulary=arrays.vocabulary,
            padding=arrays.padding,
        )

    @property
    def clients(self) -> int:
        """Number of clients."""
        return self.partition.clients

    def client(self, pid: int) -> Integers:
        """Sorted positions of a client's samples in the training arrays."""
        return self.partition.client(pid)

    def had(self, pid: int) -> Integers:
        """`client`, and what of its samples is to be forgotten."""
        if self.forgotten is None:
            return self.client(pid)
        return np.union1d(self.client(pid), self.forgotten.training.client(pid))

    def class_counts(self) -> Integers:
        """Training samples of each client and class, int64 [clients, classes]."""
        classes = len(self.arrays.classes)
        owner = np.repeat(np.arange(self.clients), self.partition.sizes())
        cells = owner * classes + self.arrays.train_y[self.partition.indices]
        return np.bincount(cells, minlength=self.clients * classes).reshape(self.clients, classes)

    def local_test(self, pid: int) -> Integers:
        """Sorted positions in the test arrays whose class mix is that of the client's training data.

        As many as the test set allows without repeating a sample; classes that the test set lacks are
        left out. The draw depends on `pid` alone.
        """
        classes = len(self.arrays.classes)
        wanted = np.bincount(self.arrays.train_y[self.client(pid)], minlength=classes).astype(float)
        test_y = np.asarray(self.arrays.test_y)
        available = np.bincount(test_y, minlength=classes)
        wanted[available == 0] = 0
        if not wanted.any():
            return np.empty(0, np.int64)
        scale = (available[wanted > 0] / wanted[wanted > 0]).min()
        counts = np.minimum(np.rint(wanted * scale).astype(np.int64), available)
        rng = np.random.default_rng(pid)
        drawn = [rng.permutation(np.flatnonzero(test_y == c))[:n] for c, n in enumerate(counts) if n]
        return np.sort(np.concatenate(drawn))


def load(
    data_name: str,
    data_options: Mapping[str, Any],
    partition_name: str,
    partition_options: Mapping[str, Any],
    *,
    clients: int,
    shots: int | None = None,
    new_classes: int = 0,
    pooled: bool = False,
    validation: float = 0.0,
    seed: int = 0,
    roots: Sequence[Path] = (),
) -> FederatedData:
    """Load (from the cache after the first time), hold back the validation split, deal out the rest.

    Args:
        data_name: `[data] name`.
        data_options: its keys.
        partition_name: `[partition] name`.
        partition_options: its own keys.
        clients: number of clients.
        shots: samples per class and client, or None for all.
        new_classes: how many classes, the last, no client and no validation split gets.
        pooled: one client with everybody's samples (the centralised baseline).
        validation: share of each class of the training data that the server holds back.
        seed: of the validation split and the partition.
        roots: folders in which relative paths are looked up.

    Raises:
        UserError: see `load_arrays` and `partition`.
    """
    arrays = load_arrays(data_name, data_options, roots=roots)
    labels = np.asarray(arrays.train_y)
    base = np.flatnonzero(labels < _base_classes(arrays, new_classes))
    held = base[stratified(labels[base], validation, seed=seed)] if validation else np.empty(0, np.int64)
    rest = np.setdiff1d(base, held)
    groups = None if arrays.groups is None else np.asarray(arrays.groups)[rest]
    dealt = partition(
        partition_name,
        partition_options,
        labels=labels[rest],
        groups=groups,
        clients=clients,
        shots=shots,
        pooled=pooled,
        seed=seed,
        attributes=_codes(arrays, rest),
    )
    return FederatedData(arrays, Partition(rest[dealt.indices], dealt.offsets), held, new_classes=new_classes)


def _base_classes(arrays: Arrays, new_classes: int) -> int:
    """How many classes are trained on.

    Raises:
        UserError: fewer than two base classes are left, or the test set has no sample of one of both kinds.
    """
    base = len(arrays.classes) - new_classes
    if new_classes and base < 2:
        raise UserError(
            f"[partition] new_classes = {new_classes}, but the data have {len(arrays.classes)} classes and "
            f"at least two must be trained on; give at most {len(arrays.classes) - 2}"
        )
    tested = np.asarray(arrays.test_y) < base
    if new_classes and tested.all() | ~tested.any():
        raise UserError(
            f"[partition] new_classes = {new_classes}, but the test set has samples of "
            f"{'base' if tested.all() else 'new'} classes alone; base-to-new needs both"
        )
    return base


def _codes(arrays: Arrays, rows: Integers) -> dict[str, Integers]:
    """Codes of the categorical attributes of some training samples."""
    if arrays.train_z is None:
        return {}
    z = np.asarray(arrays.train_z)[rows]
    return {a.name: z[:, i].astype(np.int64) for i, a in enumerate(arrays.attributes) if a.groups}


def _conformed(arrays: Arrays, wanted: tuple[Attribute, ...], path: str) -> dict[str, Any]:
    """Columns of both parts of a node's own data, in the server's codes."""
    parts = {"train_z": (arrays.train_z, arrays.train_y), "test_z": (arrays.test_z, arrays.test_y)}
    return {name: conformed(arrays.attributes, z, wanted, len(y), path) for name, (z, y) in parts.items()}


def _ranged(
    source: str, options: Mapping[str, Any], roots: Sequence[Path], ranges: tuple[ValueRange, ...]
) -> Arrays:
    """A node's own arrays, read again where they alone would have another value range than the server's."""
    arrays = load_arrays(source, options, roots=roots)
    server = {one.dtype: one for one in ranges}
    other = [(one, server[one.dtype]) for one in arrays.ranges if server.get(one.dtype, one) != one]
    if not other:
        return arrays
    own, wanted = other[0]
    said = f"{source}: the server reads {own.dtype} values as {wanted.text}, these data alone say {own.text}"
    if len(arrays.ranges) > 1:
        raise UserError(f"{said}; store all images with one number of bits, or set value_range in [data]")
    value_range = "keep" if wanted.low is None else [wanted.low, wanted.high]
    try:
        return load_arrays(source, {**options, "value_range": value_range}, roots=roots)
    except UserError as error:
        raise UserError(f"{said}: {error}") from error


def load_own(
    path: str,
    options: Mapping[str, Any],
    *,
    client: int,
    clients: int,
    classes: Sequence[str],
    new_classes: int = 0,
    roots: Sequence[Path] = (),
    attributes: tuple[Attribute, ...] = (),
    ranges: tuple[ValueRange, ...] = (),
) -> FederatedData:
    """The private data of a real node: every training sample of a file or image folder is its client's.

    Args:
        path: an .npz archive, or a folder of images.
        options: keys of the server's `[data]`; of these `size`, `layout`, `value_range`
            and `test_fraction` apply here, too.
        client: which client the node is.
        clients: how many there are; the others have nothing here.
        classes: names of the server's, whose labels the node's own become; it need not have all of them.
        new_classes: how many classes, the last, are not trained on.
        roots: folders in which a relative path is looked up.
        attributes: those of the server's data, as which the node's own are coded.
        ranges: what the server takes as black and white; the node's values of these dtypes are read alike.

    Raises:
        UserError: see `load_arrays`, `as_the_server` and `conformed`; or the node's values lie outside the
            server's range.
    """
    kind = "imagefolder" if any((root / path).is_dir() for root in [*roots, Path.cwd()]) else "npz"
    taken = inspect.signature(registry.resolve("datasets", f"{kind}:{path}").target).parameters
    applies = ("size", "layout", "value_range", "test_fraction")
    shared = {key: options[key] for key in applies if key in options and key in taken}
    arrays = as_the_server(_ranged(f"{kind}:{path}", shared, roots, ranges), classes, path)
    if attributes:
        arrays = replace(arrays, attributes=attributes, **_conformed(arrays, attributes, path))
    rows = np.flatnonzero(np.asarray(arrays.train_y) < len(classes) - new_classes)
    offsets = np.where(np.arange(clients + 1) > client, len(rows), 0).astype(np.int64)
    return FederatedData(arrays, Partition(rows, offsets), np.empty(0, np.int64), new_classes=new_classes)


# -------------------------------------------------------------------------------- looking at a split


def split_lines(counts: Integers, classes: Sequence[str]) -> list[str]:
    """A terminal picture of a split, at most 100 columns wide.

    One line per client with one cell per class (darker: more of the client's own samples); many clients,
    or more classes than columns, are summed up in ranges.

    Args:
        counts: samples [clients, classes].
        classes: their names.
    """
    shades = " ░▒▓█"
    rows = np.array_split(np.arange(len(counts)), min(len(counts), _LISTED_CLIENTS))
    columns = np.array_split(np.arange(len(classes)), min(len(classes), 48))
    cell = max(1, min(6, 55 // len(columns) - 1))  # ten classes fit 80 columns
    gap = " " if cell > 1 else ""
    names = [classes[group[0]] for group in columns]
    lines = [f"{'client':>13} {'samples':>8}  " + gap.join(f"{name[:cell]:<{cell}}" for name in names)]
    for row in rows:
        total = counts[row].sum(0)
        parts = np.array([total[group].sum() for group in columns])
        share = parts / max(parts.sum(), 1)
        cells = [shades[0 if part == 0 else min(4, 1 + int(part * 8))] * cell for part in share]
        label = str(row[0]) if len(row) == 1 else f"{row[0]}-{row[-1]}"
        lines.append(f"{label:>13} {int(total.sum()):>8}  " + gap.join(cells))
    sizes = counts.sum(1)
    lines.append(
        f"{len(counts)} clients, {int(sizes.sum())} samples: smallest client {sizes.min()}, median "
        f"{np.median(sizes):.0f}, largest {sizes.max()}; {(counts > 0).sum(1).mean():.1f} classes per client"
    )
    missing = [name for name, total in zip(classes, counts.sum(0), strict=True) if total == 0]
    if missing:
        named = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        lines.append(f"no client has samples of {len(missing)} classes: {named}"[:100])
    return lines


def draw_split(counts: Integers, classes: Sequence[str], path: str | os.PathLike[str]) -> None:
    """A picture of a split as PNG: samples per client, stacked by class; the first 60 clients at most.

    Args:
        counts: samples [clients, classes].
        classes: their names.
        path: the file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    shown = counts[:_DRAWN_CLIENTS]
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    floor = np.zeros(len(shown), np.int64)
    colours = np.linspace(0, 1, len(classes))
    for column, name in enumerate(classes):
        colour = _colour(float(colours[column]), column, len(classes))
        axes.bar(np.arange(len(shown)), shown[:, column], bottom=floor, label=name, color=colour, width=0.9)
        floor += shown[:, column]
    note = f" (the first {len(shown)} of {len(counts)})" if len(shown) < len(counts) else ""
    axes.set(xlabel=f"client{note}", ylabel="training samples", xlim=(-0.6, len(shown) - 0.4))
    axes.set_ylim(0, 1.05 * max(int(floor.max()), 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(classes) <= 20:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, reverse=True)
    figure.savefig(path, dpi=120)


def _colour(position: float, number: int, classes: int) -> Any:
    """Distinct colours while they last, then a continuous scale."""
    from matplotlib import colormaps

    if classes <= 20:
        return colormaps["tab10" if classes <= 10 else "tab20"](number)
    return colormaps["viridis"](position)
