"""The interface of the three stores, one a tier, that hold what a run computes.

They hold arrays `[rows, groups, slots, width]` that grow along their slots: keys and
values (`[rows, heads, slots, head_dim]`) and hidden states, which have one group.
"""

from collections.abc import Callable, Hashable
from typing import Protocol

import jax
import numpy as np

from flexjax.memory.link import Loan
from flexjax.policy import Tier

Pieces = tuple[Loan, ...]  # of one array, along its slots, in their order


class TierStore(Protocol):
    """Holds arrays on one tier. Calls on different keys may come from any thread."""

    tier: Tier

    def store(
        self, key: Hashable, value: jax.Array, rows: slice, *, at: int, slots: int
    ) -> None:
        """Writes `value[rows]` from slot `at` on; returns when it is safe.

        Args:
            key: names the array; `at == 0` begins it anew, and must come first.
            value: `[batch, groups, seq, width]` on the device, perhaps still to come.
            rows: the rows of the batch that this tier keeps.
            at: slots that are in use already.
            slots: slots to have room for, `at + seq` or more.
        """
        ...

    def load(self, key: Hashable) -> Callable[[], Pieces]:
        """Starts to bring an array to the device.

        Returns:
            What waits for it, to be called once; slots that were not written hold
            finite numbers.
        """
        ...

    def free(self, key: Hashable) -> None:
        """Forgets an array; unknown keys are none."""
        ...

    def clear(self) -> None:
        """Gives back to the system what was kept for arrays to come."""
        ...


class GatherStore(TierStore, Protocol):
    """A store that can also bring parts of an array."""

    def gather(self, key: Hashable, slots: np.ndarray) -> Loan:
        """Brings some slots of an array to where they are used.

        Args:
            key: names the array.
            slots: of each row and group, `[rows, groups, chosen]`.

        Returns:
            Them alone, `[rows, groups, chosen, width]`.
        """
        ...


def grown_shape(array: jax.Array | np.ndarray, slots: int) -> tuple[int, int, int, int]:
    """Shape of `array` with room for `slots` slots."""
    rows, groups, _, width = array.shape
    return rows, groups, slots, width
