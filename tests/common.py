"""What the tests of several rooms need: a device apart, poisoned memory, a watchdog."""

import os
import pathlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import pytest

from flexjax import store_format
from flexjax.memory import buffers
from flexjax.memory.buffers import BufferPool
from flexjax.memory.ledger import Ledger
from flexjax.memory.link import DeviceLink, Loan, Source
from flexjax.memory.transport import Transport
from flexjax.models.config import OPTConfig, tensor_shapes
from flexjax.policy import Kind, Tier
from flexjax.schedule.ops import Cell, Compute, Load, Op, Store
from flexjax.schedule.resources import Resource, add_seconds
from flexjax.schedule.simulate import Costs
from flexjax.store_writer import StoreWriter

POISON = 0xFF  # bytes of it are not a number, in every float type


class ApartLink(DeviceLink):
    """A link to a device with memory of its own, as a GPU has, on any device."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.is_shared, self.stage_tier = False, Tier.HOST

    def lend_all(self, sources: Sequence[Source], kind: Kind) -> list[Loan]:
        # A CPU would look at arrays in place.
        copies = [Source(np.array(array), give) for array, give in sources]
        return super().lend_all(copies, kind)


LINKS = [DeviceLink, ApartLink]


def make_transport(link_type: type[DeviceLink] = DeviceLink) -> Transport:
    """Everything on the way to the first device, over a link of a type."""
    device = jax.devices()[0]
    transport = Transport(device)
    transport.link = link_type(device, transport.ledger, transport.timeline)
    return transport


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


class WatchedOs:
    """`os` for `flexjax.extents`: tells `watch` of every call on a file.

    `watch(call, path, is_direct, nbytes)` comes before a call, but after a close, and
    may raise; what it returns for a transfer, if anything, is how many bytes move.
    """

    def __init__(self, watch: Callable[[str, pathlib.Path, bool, int], Any]) -> None:
        self._watch = watch
        self._files: dict[int, tuple[pathlib.Path, bool]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: pathlib.Path, flags: int, mode: int) -> int:
        is_direct = bool(flags & os.O_DIRECT)
        self._watch("open", path, is_direct, 0)
        file = os.open(path, flags, mode)
        self._files[file] = path, is_direct
        return file

    def preadv(self, file: int, buffers: list[np.ndarray], offset: int) -> int:
        return os.preadv(file, [self._cut("preadv", file, *buffers)], offset)

    def pwritev(self, file: int, buffers: list[np.ndarray], offset: int) -> int:
        return os.pwritev(file, [self._cut("pwritev", file, *buffers)], offset)

    def close(self, file: int) -> None:
        path, is_direct = self._files.pop(file)
        os.close(file)
        self._watch("close", path, is_direct, 0)

    def _cut(self, call: str, file: int, buffer: np.ndarray) -> np.ndarray:
        return buffer[: self._watch(call, *self._files[file], buffer.nbytes)]


def held_on(ledger: Ledger, tier: Tier) -> int:
    return sum(ledger.held(tier, kind) for kind in Kind)


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


def total_seconds(costs: Costs, ops: Iterable[Op]) -> dict[Resource, float]:
    """Seconds that `ops` take of each resource, when nothing else happens."""
    total = dict.fromkeys(Resource, 0.0)
    for op in ops:
        match op:
            case Load(buffer, step):
                add_seconds(total, costs.load(buffer, step))
            case Compute(step, layer, batch):
                add_seconds(total, costs.compute(Cell(step, layer, batch)))
            case Store(buffer, step):
                add_seconds(total, costs.store(buffer, step))
    return total
