"""Counts what is held on each tier and what moves between tiers."""

import threading
from collections import Counter

from flexjax.policy import Kind, Tier

Link = tuple[Tier, Tier]  # from, to


class Ledger:
    """Bytes held now and at most, by tier and kind, and bytes moved, by link.

    Thread-safe: every lane of a run writes into the same ledger.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: Counter[tuple[Tier, Kind]] = Counter()
        self._now: Counter[Tier] = Counter()
        self._peak: Counter[Tier] = Counter()
        self._moved: Counter[Link] = Counter()

    def hold(self, tier: Tier, kind: Kind, nbytes: int) -> None:
        """Counts `nbytes` more on a tier; fewer where it is negative."""
        with self._lock:
            self._held[tier, kind] += nbytes
            self._now[tier] += nbytes
            self._peak[tier] = max(self._peak[tier], self._now[tier])

    def move(self, source: Tier, target: Tier, nbytes: int) -> None:
        """Counts a transfer."""
        with self._lock:
            self._moved[source, target] += nbytes

    def start(self) -> None:
        """Begins a new run: peaks start from what is held, transfers from nothing."""
        with self._lock:
            self._peak = Counter(self._now)
            self._moved.clear()

    def held(self, tier: Tier, kind: Kind) -> int:
        with self._lock:
            return self._held[tier, kind]

    def peak(self, tier: Tier) -> int:
        with self._lock:
            return self._peak[tier]

    def moved(self) -> dict[Link, int]:
        with self._lock:
            return dict(self._moved)
