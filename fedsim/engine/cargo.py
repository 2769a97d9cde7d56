"""The contents of one exchange on their way: arrays that several clients get are shared memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

import ray
from flwr.app import RecordDict

from fedsim import _flwr
from fedsim.engine import objects
from fedsim.engine.exchange import Exchange
from fedsim.engine.line import MOST
from fedsim.engine.sheet import Sheet
from fedsim.engine.worker import Item, Order

if TYPE_CHECKING:
    from fedsim.engine.grid import BaseGrid
    from fedsim.engine.pool import Given, Pool

#: bytes; less is not worth shared memory: it goes with the first call that a worker gets in a send
SMALL = 2 * 2**20
#: bytes; what clients send is expected to be as much as they get, and of more than this a worker does not
#: keep the replies, or the float64 sums, of a larger block; such contents go through Ray's store, which
#: has a limit and the disk beyond it; sheets have neither
HEAVY = 16 * 2**20

_numbers = count()  #: of sends in this process


class Cargo:
    """Some instructions of an exchange.

    Args:
        exchange: the exchange.
        positions: of the instructions.
    """

    def __init__(self, exchange: Exchange, positions: Sequence[int]) -> None:
        self.exchange = exchange
        self._number = next(_numbers)
        numbers: dict[int, int] = {}
        contents: list[RecordDict] = []
        self._content: dict[int, int] = {}
        for position in positions:
            content = exchange.accepted[position].content
            if id(content) not in numbers:
                numbers[id(content)] = len(contents)
                contents.append(content)
            self._content[position] = numbers[id(content)]
        self._templates, self._all = objects.disassemble(contents)
        self._needs = [objects.parcels_of(template) for template in self._templates]
        sizes = [sum(values.nbytes for values in parcel) for parcel in self._all]
        #: bytes of the largest content
        self.heaviest = max(sum(sizes[number] for number in needs) for needs in self._needs)
        clients = Counter(number for content in self._content.values() for number in self._needs[content])
        self._large = {number for number, size in enumerate(sizes) if size >= SMALL}
        self._shared = {number for number in self._large if clients[number] > 1}
        #: lines can carry it
        self.light = len(self._shared) <= MOST and self.heaviest < HEAVY

    def load(self, pool: Pool[Any]) -> None:
        """Put what is shared where workers find it, for lines or for Ray, as the pool has it now."""
        apart = self._shared if pool.lines else self._large
        put = pool.shared if pool.lines else ray.put
        self._parcels = {n: parcel for n, parcel in enumerate(self._all) if n not in apart}
        self._apart: dict[int, Any] = {n: put(self._all[n]) for n in sorted(apart)}
        #: what a line brings for several clients a worker keeps, what Ray brings comes with every call
        self._passing = self._large - self._shared if pool.lines else apart
        del self._all

    def order(self, grid: BaseGrid, positions: Sequence[int], given: Given) -> tuple[Order, list[Any]]:
        """What a worker needs for a call, less what it was given before, and parcels to go beside it."""
        if given.send != self._number:
            given.send, given.contents, given.parcels = self._number, set(), set()
        items, states = [], {}
        for position in positions:
            message = self.exchange.accepted[position]
            client, content = self.exchange.clients[position], self._content[position]
            seed = grid.seed_of(self.exchange, position)
            items.append(Item(position, client, seed, content, _flwr.metadata_row(message)))
            if client in grid.states:
                states[client] = grid.states[client]
        contents = {item.content for item in items}
        needed = {number for content in contents for number in self._needs[content]}
        templates = {number: self._templates[number] for number in contents - given.contents}
        new = needed - given.parcels
        parcels = {number: self._parcels[number] for number in new if number in self._parcels}
        apart = sorted(new - set(parcels))
        passing = new & self._passing
        given.contents |= contents
        given.parcels |= new - passing
        order = Order(
            self._number,
            items,
            templates,
            parcels,
            apart,
            passing,
            states,
            self.exchange.fold,
            self.exchange.timeout,
        )
        return order, [self._apart[number] for number in apart]

    def close(self) -> None:
        """Give up what is shared; who uses it still has it."""
        for parcel in self._apart.values():
            if isinstance(parcel, Sheet):
                parcel.give_back()
