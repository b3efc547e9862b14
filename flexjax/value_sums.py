"""Running sums of the values of a cache, for what sparse attention leaves out."""

import jax
import jax.numpy as jnp
import numpy as np

from flexjax.cached_attention import sum_step
from flexjax.memory.ledger import Ledger
from flexjax.policy import Kind, Tier
from flexjax.quant import Quantization
from flexjax.schedule.ops import Cache


class ValueSums:
    """For each cache, the sum of its values by row and head, `[batch, heads, 1, dim]`.

    They stay on the device, in float32: as much as a few tokens in the cache.
    """

    def __init__(self, ledger: Ledger, cache_as: Quantization | None) -> None:
        self._ledger, self._cache_as = ledger, cache_as
        self._sums: dict[Cache, jax.Array] = {}

    def __getitem__(self, key: Cache) -> jax.Array:
        return self._sums[key]

    def add(self, key: Cache, values: jax.Array, start: jax.Array | np.ndarray) -> None:
        """Counts what a cache takes in; a cache that is not known is begun.

        Args:
            key: names the cache.
            values: as the cache keeps them, `[batch, heads, seq, width]`.
            start: the first of their slots that is real, `[batch]`.
        """
        added = sum_step(values, jnp.asarray(start), cache_as=self._cache_as)
        if key in self._sums:
            self._sums[key] = self._sums[key] + added
        else:
            self._sums[key] = added
            self._ledger.hold(Tier.DEVICE, Kind.KV_CACHE, added.nbytes)

    def clear(self) -> None:
        """Forgets all caches."""
        held = sum(array.nbytes for array in self._sums.values())
        self._ledger.hold(Tier.DEVICE, Kind.KV_CACHE, -held)
        self._sums.clear()
