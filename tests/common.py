"""What the tests of several rooms need: a device apart, poisoned memory, a watchdog."""

import os
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from flexjax import store_format
from flexjax.memory import buffers
from flexjax.memory.buffers import BufferPool
from flexjax.memory.ledger import Ledger
from flexjax.memory.link import DeviceLink, Loan, nothing_to_release
from flexjax.models.config import OPTConfig, tensor_shapes
from flexjax.policy import Kind, Tier
from flexjax.store_writer import StoreWriter

POISON = 0xFF  # bytes of it are not a number, in every float type


class ApartLink(DeviceLink):
    """A link to a device with memory of its own, as a GPU has, on any device."""

    def __init__(self, device, ledger: Ledger) -> None:
        super().__init__(device, ledger)
        self.is_shared, self.stage_tier = False, Tier.HOST

    def lend(
        self,
        array: np.ndarray,
        kind: Kind,
        give_back: Callable[[], None] = nothing_to_release,
    ) -> Loan:
        # A CPU would look at `array` in place.
        return super().lend(np.array(array), kind, give_back)


LINKS = [DeviceLink, ApartLink]


def poison_buffers(patch: pytest.MonkeyPatch) -> None:
    """Fills stage buffers with NaN, before they are lent and when they come back."""
    fresh, give = buffers.page_aligned, BufferPool.give

    def poisoned(nbytes: int) -> np.ndarray:
        memory = fresh(nbytes)
        memory[:] = POISON
        return memory

    def poison_and_give(self: BufferPool, buffer: np.ndarray) -> None:
        buffer[:] = POISON
        give(self, buffer)

    patch.setattr(buffers, "page_aligned", poisoned)
    patch.setattr(BufferPool, "give", poison_and_give)


def assert_nothing_held(ledger: Ledger) -> None:
    for tier in Tier:
        for kind in Kind:
            assert ledger.held(tier, kind) == 0, (tier, kind)


def in_time[T](task: Callable[..., T], *args: Any, within_s: float = 60) -> T:
    """What `task(*args)` returns or raises; fails if it hangs."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.extend((task(*args), None))
        except BaseException as error:  # noqa: BLE001  (raised by the caller, below)
            outcome.extend((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(within_s)
    assert not thread.is_alive(), f"{task} hangs"
    result, error = outcome
    if error is not None:
        raise error
    return result


def flexjax_threads() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith("flexjax ")]


def random_tensors(config: OPTConfig, dtype: np.dtype) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        name: random.standard_normal(shape, np.float32).astype(dtype)
        for name, shape in tensor_shapes(config).items()
    }


def write_store(
    folder: pathlib.Path, config: OPTConfig, tensors: dict[str, np.ndarray]
) -> pathlib.Path:
    """A weight store of `tensors` whose chunks are a few rows each."""
    dtype = next(iter(tensors.values())).dtype
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_format, "MIN_CHUNK_BYTES", 128)
        patch.setattr(store_format, "MAX_CHUNK_BYTES", 1024)
        with StoreWriter(folder, config=config, dtype=dtype, source="test") as writer:
            for name, data in tensors.items():
                writer.write(name, iter([data]))
            writer.finish()
    return folder


def files(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Every file below `folder`."""
    for parent, _, names in os.walk(folder):
        yield from (pathlib.Path(parent, name) for name in names)
