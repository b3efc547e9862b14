"""Things that take memory, made once and lent again and again."""

import threading
from collections import defaultdict
from collections.abc import Callable, Hashable

from flexjax.memory.ledger import Ledger
from flexjax.policy import Kind, Tier


class ReusePool[Key: Hashable, Item]:
    """Lends items, each of a kind that its key names, and lends them again.

    Items that nobody uses are dropped where that keeps the pool within the largest
    number of bytes that were ever lent at once; so a pool never holds more than its
    users needed at their worst moment.

    Args of the constructor:
        ledger, tier, kind: where the bytes are counted.
        make: a new item of a kind.
        nbytes: of an item of a kind.
    """

    def __init__(
        self,
        ledger: Ledger,
        tier: Tier,
        kind: Kind,
        *,
        make: Callable[[Key], Item],
        nbytes: Callable[[Key], int],
    ) -> None:
        self._ledger, self._tier, self._kind = ledger, tier, kind
        self._make, self._nbytes = make, nbytes
        self._lock = threading.Lock()
        self._free: dict[Key, list[Item]] = defaultdict(list)
        self._lent_bytes = self._most_lent_bytes = self._free_bytes = 0

    def lend(self, key: Key, serves: Callable[[Key], bool] | None = None) -> Item:
        """An item of a kind; what it holds is arbitrary.

        Args:
            key: of the kind.
            serves: which kinds are as good, if of this one none is free: the smallest
                of them is lent, and taken back as what it is.

        Raises:
            Exception: what `make` raises.
        """
        with self._lock:
            key = self._free_kind(key, serves)
            nbytes = self._nbytes(key)
            self._lent_bytes += nbytes
            self._most_lent_bytes = max(self._most_lent_bytes, self._lent_bytes)
            if free := self._free[key]:
                self._free_bytes -= nbytes
                return free.pop()
            self._shrink()
        try:
            item = self._make(key)
        except BaseException:
            with self._lock:
                self._lent_bytes -= nbytes
            raise
        self._ledger.hold(self._tier, self._kind, nbytes)
        return item

    def take_back(self, key: Key, item: Item) -> None:
        """Ends a loan; nobody may look at the item any more."""
        nbytes = self._nbytes(key)
        with self._lock:
            self._lent_bytes -= nbytes
            self._free[key].append(item)
            self._free_bytes += nbytes

    def drop(self, key: Key) -> None:
        """Ends a loan whose item is gone, or of no use any more."""
        nbytes = self._nbytes(key)
        with self._lock:
            self._lent_bytes -= nbytes
        self._ledger.hold(self._tier, self._kind, -nbytes)

    def clear(self) -> None:
        """Drops all items that are not lent."""
        with self._lock:
            self._most_lent_bytes = self._lent_bytes
            self._shrink()

    def _free_kind(self, key: Key, serves: Callable[[Key], bool] | None) -> Key:
        """The kind of which an item is lent."""
        if self._free[key] or serves is None:
            return key
        serving = [kind for kind, items in self._free.items() if items and serves(kind)]
        return min(serving, key=self._nbytes, default=key)

    def _shrink(self) -> None:
        for key, items in self._free.items():
            nbytes = self._nbytes(key)
            while items and self._exceeds():
                items.pop()
                self._free_bytes -= nbytes
                self._ledger.hold(self._tier, self._kind, -nbytes)

    def _exceeds(self) -> bool:
        return self._lent_bytes + self._free_bytes > self._most_lent_bytes
