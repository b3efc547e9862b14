"""Arrays whose rows are spread over the tiers: asynchronous loads and stores."""

import collections
import contextlib
from collections.abc import Callable, Hashable, Iterable, Mapping
from concurrent.futures import Future
from types import MappingProxyType

import jax
import numpy as np

from flexjax.memory.lanes import Lane, Lanes
from flexjax.memory.link import Loan
from flexjax.memory.placement import Rows
from flexjax.memory.tier import GatherStore, Pieces, TierStore
from flexjax.policy import Tier

Arrays = tuple[jax.Array, ...]
_NONE: Mapping[Tier, GatherStore] = MappingProxyType({})


class PlacedLoan:
    """What a load brought: the arrays of each tier's rows, as they lie in the batch.

    Args of the constructor:
        pieces: for each tier that has rows, for each array of the key, the pieces along
            its slots.
    """

    def __init__(self, pieces: Mapping[Tier, tuple[Pieces, ...]]) -> None:
        self._pieces = dict(pieces)

    @property
    def by_tier(self) -> dict[Tier, tuple[Arrays, ...]]:
        return {
            tier: tuple(tuple(loan.array for loan in pieces) for pieces in arrays)
            for tier, arrays in self._pieces.items()
        }

    @property
    def segments(self) -> tuple[tuple[Arrays, ...], ...]:
        return tuple(self.by_tier.values())

    def release(self) -> None:
        """Gives the stage buffers back; nothing may use the arrays any more."""
        for arrays in self._pieces.values():
            for pieces in arrays:
                for loan in pieces:
                    loan.release()
        self._pieces = {}


class PlacedArrays:
    """One kind of tensor, each key's rows split over the tiers by `rows_of`.

    A key names arrays that belong together, such as the keys and the values of a layer.
    A load waits for the store before it; both return at once.

    Args of the constructor:
        stores: of the tiers.
        lanes, load_lane, store_lane: where transfers run.
        rows_of: the rows of a key on each tier.
        gathered: stores of which a load brings only a key's first array; of the second,
            `gather` brings what is asked for.
    """

    def __init__(
        self,
        stores: Mapping[Tier, TierStore],
        lanes: Lanes,
        *,
        load_lane: Lane,
        store_lane: Lane,
        rows_of: Callable[[Hashable], Rows],
        gathered: Mapping[Tier, GatherStore] = _NONE,
    ) -> None:
        self._stores, self._lanes = stores, lanes
        self._load_lane, self._store_lane = load_lane, store_lane
        self._rows_of, self._gathered = rows_of, gathered
        self._stored: dict[Hashable, Future[int]] = {}  # how many arrays a key has

    def load(self, key: Hashable) -> Future[PlacedLoan]:
        """Starts to bring all rows of a key to the device."""
        return self._lanes.submit(self._load_lane, self._load, key, self._stored[key])

    def store(
        self,
        key: Hashable,
        values: Callable[[], Arrays],
        *,
        at: int = 0,
        slots: int | None = None,
    ) -> Future[int]:
        """Starts to write what `values` waits for and returns.

        Args:
            key: names the arrays.
            values: called in the lane; each array is `[batch, groups, seq, width]`.
            at: the slot from which on they are written.
            slots: slots to have room for; as many as the arrays have, if None.
        """
        task = self._lanes.submit(self._store_lane, self._store, key, values, at, slots)
        self._stored[key] = task
        return task

    def gather(self, key: Hashable, tier: Tier, slots: np.ndarray) -> Loan:
        """Some slots of a key's second array, by row and group; waits for them."""
        return self._gathered[tier].gather((key, 1), slots)

    def clear(self) -> None:
        """Forgets every array; no load or store may be under way."""
        for key, stored in self._stored.items():
            failed = stored.cancelled() or stored.exception() is not None
            for index in range(_MOST_ARRAYS if failed else stored.result()):
                for store in self._stores.values():
                    store.free((key, index))
        self._stored.clear()

    def _load(self, key: Hashable, stored: Future[int]) -> PlacedLoan:
        count = stored.result()
        started: collections.deque[tuple[Tier, Callable[[], Pieces]]]
        started = collections.deque()
        segments: dict[Tier, tuple[Pieces, ...]] = {}
        try:
            with self._lanes.working(self._load_lane, f"load {key}"):
                for tier in self._rows_of(key).spans():
                    segments[tier] = ()
                    for index in range(1 if tier in self._gathered else count):
                        finish = self._stores[tier].load((key, index))
                        started.append((tier, finish))
                while started:
                    tier, finish = started.popleft()
                    segments[tier] += (finish(),)
        except BaseException:
            self._give_up(started)
            PlacedLoan(segments).release()
            raise
        return PlacedLoan(segments)

    def _give_up(self, started: Iterable[tuple[Tier, Callable[[], Pieces]]]) -> None:
        """Waits for what was started, and lets go of it."""
        for _, finish in started:
            with contextlib.suppress(Exception):  # the first failure is the one told
                for loan in finish():
                    loan.release()

    def _store(
        self, key: Hashable, values: Callable[[], Arrays], at: int, slots: int | None
    ) -> int:
        arrays = jax.block_until_ready(values())
        with self._lanes.working(self._store_lane, f"store {key}"):
            for tier, rows in self._rows_of(key).spans().items():
                for index, array in enumerate(arrays):
                    self._stores[tier].store(
                        (key, index), array, rows, at=at, slots=slots or array.shape[2]
                    )
        return len(arrays)


_MOST_ARRAYS = 2  # a key and a value
