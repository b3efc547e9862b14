"""The device tier: arrays that stay where they are computed."""

import functools
import threading
from collections.abc import Callable, Hashable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from flexjax.memory.ledger import Ledger
from flexjax.memory.link import Loan
from flexjax.memory.tier import Pieces, grown_shape
from flexjax.policy import Kind, Tier


class DeviceStore:
    """Holds arrays in device memory; loading and storing move nothing."""

    tier = Tier.DEVICE

    def __init__(self, ledger: Ledger, kind: Kind) -> None:
        self._ledger, self._kind = ledger, kind
        self._arrays: dict[Hashable, jax.Array] = {}
        self._lock = threading.Lock()
        self._newest_slot = (-1, jnp.zeros((), jnp.int32))

    def store(
        self, key: Hashable, value: jax.Array, rows: slice, *, at: int, slots: int
    ) -> None:
        part = value if rows == slice(0, value.shape[0]) else value[rows]
        if at == 0:
            array = part if part.shape[2] == slots else _padded(part, slots)
        else:
            with self._lock:
                old = self._arrays[key]
            if old.shape[2] < slots:
                old = _padded(old, slots)
            array = _written(old, part, self._on_device(at))
        # Waiting here keeps `value` counted until it is copied, as `Free` promises.
        self._replace(key, array.block_until_ready())

    def load(self, key: Hashable) -> Callable[[], Pieces]:
        with self._lock:
            array = self._arrays[key]
        return lambda: (Loan(array),)

    def free(self, key: Hashable) -> None:
        self._replace(key, None)

    def clear(self) -> None:
        """Nothing is kept."""

    def _on_device(self, at: int) -> jax.Array:
        """A slot's number, which comes to the device once for all stores of a step."""
        known, there = self._newest_slot
        if at != known:
            there = jnp.asarray(at, jnp.int32)
            self._newest_slot = (at, there)  # at once: other threads may look
        return there

    def _replace(self, key: Hashable, array: jax.Array | None) -> None:
        with self._lock:
            old = self._arrays.pop(key, None)
            if array is not None:
                self._arrays[key] = array
        added = (0 if array is None else array.nbytes) - (
            0 if old is None else old.nbytes
        )
        self._ledger.hold(self.tier, self._kind, added)


@functools.partial(jax.jit, static_argnames="slots")
def _padded(
    array: Shaped[Array, "rows groups used width"], slots: int
) -> Shaped[Array, "rows groups slots width"]:
    empty = jnp.zeros(grown_shape(array, slots), array.dtype)
    return jax.lax.dynamic_update_slice(empty, array, (0, 0, 0, 0))


@functools.partial(jax.jit, donate_argnums=0)
def _written(
    array: Shaped[Array, "rows groups slots width"],
    value: Shaped[Array, "rows groups seq width"],
    at: Int[Array, ""],
) -> Shaped[Array, "rows groups slots width"]:
    """`array` with `value` at slot `at`, in place."""
    zero = jnp.zeros((), jnp.int32)
    return jax.lax.dynamic_update_slice(array, value, (zero, zero, at, zero))
