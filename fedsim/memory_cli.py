"""`fedsim memory`: what training by each method would take, without training anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim import building, features, registry
from fedsim.compute import Compute
from fedsim.errors import UserError
from fedsim.local_learning.memory import Bench, Footprint, bench_of, plan_for
from fedsim.local_learning.plans import Plan, by_name, check_blocks
from fedsim.payload import select
from fedsim.terminal import grid, human_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from fedsim.config import Experiment


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        method: name of `[local]`.
        blocks: K.
        found: bytes.
        skipped: why there are none.
    """

    method: str
    blocks: int
    found: Footprint | None
    skipped: str = ""


def measure(experiment: Experiment, methods: Sequence[str], blocks: Sequence[int]) -> list[Row]:
    """Back-propagation first, then every method with every K.

    Args:
        experiment: model, tuning, batch size, optimiser, plan or cuts and the options of its own method.
        methods: names; `["all"]` are all of them.
        blocks: numbers of blocks (of plans; cuts come on top, for the experiment's own method).

    Raises:
        UserError: unknown method, nothing to divide, or no such number of blocks.
    """
    names = [n for n in registry.table("local") if n != "bp"] if list(methods) == ["all"] else list(methods)
    for name in names:
        registry.resolve("local", name)
    bench = _bench(experiment)
    possible = [count for count in blocks if 1 < count <= len(bench.chain)]
    if not possible:
        for count in blocks:
            check_blocks(bench.chain, count)
        raise UserError("--blocks needs a number of at least 2; back-propagation is in the table anyway")
    rows = [Row("bp", 1, bench.measure("bp", (len(bench.chain) - 1,)))]
    own, kind = experiment["local"], experiment["local"].common["plan"]
    for name in (n for n in names if n != "bp"):
        options: Any = own.options if own.name == name else {}
        plans = [(count, partial(plan_for, bench, kind, name, count, options)) for count in possible]
        if own.name == name and "cuts" in own.common:
            cuts = by_name(bench.chain, own.common["cuts"])
            plans.append((len(cuts), partial(tuple, cuts)))
        rows += [_row(bench, name, count, plan, options) for count, plan in plans]
    return rows


def _row(bench: Bench, name: str, count: int, plan: Callable[[], Plan], options: dict[str, Any]) -> Row:
    try:
        return Row(name, count, bench.measure(name, plan(), options))
    except UserError as error:  # such as a method that needs maps, on a Transformer
        return Row(name, count, None, str(error))


def notes_of(rows: Sequence[Row]) -> list[str]:
    """Why some rows are empty: one line for each reason."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.found is None:
            reasons.setdefault(row.skipped, []).append(f"{row.method} {row.blocks}")
    return [f"{', '.join(who)}: {reason}" for reason, who in reasons.items()]


def _bench(experiment: Experiment) -> Bench:
    """Of the experiment's own model and data."""
    data = building.load_data(experiment)
    model = building.build_model(experiment, data.info)
    changing = select(model, model.train_modules).changing
    cut = features.cut(experiment, model, data, changing, Compute())
    return bench_of(experiment, model, features.example(model, Compute(), cut, data.arrays.train_x), cut)


def table_of(rows: Sequence[Row]) -> Table:
    """For a terminal; shares are of back-propagation."""
    table = grid()
    table.show_header, table.header_style = True, "dim"
    table.add_column("method", no_wrap=True)
    for name in ("K", "saved", "", "activations", "", "total", "", "auxiliary"):
        table.add_column(name, justify="right", no_wrap=True)
    reference = rows[0].found
    assert reference is not None
    for row in rows:
        if row.found is None:
            table.add_row(row.method, str(row.blocks), "[dim]see below[/]")
            continue
        cells = [row.method, str(row.blocks)]
        for key in ("saved", "activations", "total"):
            if key == "saved" and row.method == "checkpointed-bp":
                cells += ["", ""]  # what is computed again is saved again, where this meter does not see it
                continue
            value = getattr(row.found, key)
            cells += [human_bytes(value), f"[dim]{value / getattr(reference, key):.0%}[/]"]
        table.add_row(*cells, human_bytes(row.found.auxiliary))
    return table


def draw(rows: Sequence[Row], title: str, file: Path) -> None:
    """Activations against K, a line per method, in shares of back-propagation."""
    from matplotlib.figure import Figure

    reference = rows[0].found
    assert reference is not None
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row.method for row in rows[1:]):
        found = [(row.blocks, row.found.activations) for row in rows if row.method == name and row.found]
        shares = [size / reference.activations for _, size in found]
        axes.plot([count for count, _ in found], shares, marker="o", label=name)
    axes.axhline(1, color="grey", linewidth=1, linestyle="--")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("blocks K")
    axes.set_ylabel("peak activations / back-propagation")
    axes.set_ylim(bottom=0)
    axes.set_title(title)
    axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
