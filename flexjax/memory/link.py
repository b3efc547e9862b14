"""The way between host memory and the device."""

import functools
import logging
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from flexjax.kernels.decode_attention import DECODE_ATTENTION
from flexjax.kernels.products import PRODUCTS
from flexjax.memory import buffers
from flexjax.memory.lanes import Lane, Timeline
from flexjax.memory.ledger import Ledger
from flexjax.memory.processor import Processor
from flexjax.policy import Kind, Policy, Tier

_LEAST_MAPPED_BYTES = 1 << 20  # less is copied as soon as it is mapped

logger = logging.getLogger(__name__)


@runtime_checkable
class Device(Protocol):
    """What is asked of a `jax.Device`, which type checkers take for a variable."""

    @property
    def platform(self) -> str: ...

    @property
    def client(self) -> Any: ...

    def memory_stats(self) -> dict[str, Any] | None: ...


def nothing_to_release() -> None:
    """The `release` of an array that stays where it is."""


class Loan(NamedTuple):
    """An array on the device, and what to call when nothing uses it any more."""

    array: Any  # a `jax.Array`, or of quantized weights a `QuantizedArray`
    release: Callable[[], None] = nothing_to_release


class Source(NamedTuple):
    """An array to be lent, and what to call when its memory is not needed any more."""

    array: np.ndarray
    give_back: Callable[[], None] = nothing_to_release


def is_shared(device: Device) -> bool:
    """Whether the device computes in the host's memory, as a CPU does."""
    return device.platform == "cpu"


def processor_of(device: Device, *, is_quantized: bool) -> Processor:
    """What the layout of a model, whose weights may be quantized, asks of `device`."""
    is_host = is_shared(device)
    return Processor(
        is_host=is_host,
        multiplies_quantized=is_quantized and is_host and PRODUCTS.is_there(),
        has_attention_kernel=is_host and DECODE_ATTENTION.is_there(),
    )


def ensure_rounds(policy: Policy, device: Device) -> None:
    """Refuses `activation_bits` that no weights could have on `device`.

    Raises:
        ValueError: it has no products of integers; the message says why.
    """
    if policy.activation_bits is None:
        return
    reason = f"the device is a {device.platform}"
    if is_shared(device):
        reason = PRODUCTS.why_missing()
    if reason is not None:
        raise ValueError(
            f"activation_bits={policy.activation_bits} cannot be had here: {reason}. "
            "It is for CPUs with AVX2 or more, but no AMX, and needs a C++ compiler; "
            "mend that, or leave activation_bits out"
        )


class Lender(Protocol):
    """Makes arrays of host memory usable where they are computed with.

    Attributes:
        stage_tier: where a stage buffer counts whose array is lent.
    """

    stage_tier: Tier

    def host_memory(self, nbytes: int) -> np.ndarray:
        """Fresh page-aligned memory, from which lending is quickest."""
        ...

    def lend(
        self,
        array: np.ndarray,
        kind: Kind,
        give_back: Callable[[], None] = nothing_to_release,
    ) -> Loan:
        """`array` where it is used, see `DeviceLink.lend`."""
        ...


def host_device(what: str) -> Any:
    """The host's own processor as a device.

    Args:
        what: needs it, for the message.

    Raises:
        ValueError: JAX was told not to use it.
    """
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise ValueError(
            f"{what} needs JAX's cpu backend beside the device's: add cpu to "
            f"JAX_PLATFORMS, or do without ({error})"
        ) from error


class HostLink:
    """Lends arrays to the host's own processor, in place.

    Raises:
        ValueError: see `host_device`.
    """

    stage_tier = Tier.HOST

    def __init__(self) -> None:
        self.device = host_device("host_attention")

    def host_memory(self, nbytes: int) -> np.ndarray:
        """Fresh page-aligned memory."""
        return buffers.page_aligned(nbytes)

    def lend(
        self,
        array: np.ndarray,
        kind: Kind,
        give_back: Callable[[], None] = nothing_to_release,
    ) -> Loan:
        """`array` on the host's processor; it must not change before the release."""
        del kind
        try:
            return Loan(jax.device_put(array, self.device), give_back)
        except BaseException:
            give_back()
            raise


class DeviceLink:
    """Brings arrays to a device and back.

    A CPU is a device that shares the host's memory: arrays are looked at in place.
    Elsewhere copies to the device are begun before the last one has ended, so that the
    link need not wait for Python, and a thread follows them.
    """

    def __init__(
        self, device: Device, ledger: Ledger, timeline: Timeline | None = None
    ) -> None:
        self.device = device
        self.is_shared = is_shared(device)
        self.stage_tier = Tier.DEVICE if self.is_shared else Tier.HOST
        self._ledger, self._timeline = ledger, timeline or Timeline()
        self._copies = ThreadPoolExecutor(1, thread_name_prefix="flexjax copies")
        self._free_s = 0.0  # when the last copy ended, by `time.perf_counter`

    def host_memory(self, nbytes: int) -> np.ndarray:
        """Fresh page-aligned memory, which the device may read by itself.

        A GPU copies from memory that it is not told of only through some of its own.

        Raises:
            MemoryError: the machine has no more memory.
        """
        memory = buffers.page_aligned(nbytes)
        if not self.is_shared and nbytes >= _LEAST_MAPPED_BYTES:
            _map(memory, self.device)
        return memory

    def lend(
        self,
        array: np.ndarray,
        kind: Kind,
        give_back: Callable[[], None] = nothing_to_release,
    ) -> Loan:
        """`array` on the device, or on its way there.

        Args:
            array: must not change before the loan is released; memory that is aligned
                to 64 bytes is used in place where the device shares it.
            kind: under which the copy on the device is counted.
            give_back: called once `array` is not needed any more, at the latest when
                the loan is released, or at once if there is none to be had.
        """
        (loan,) = self.lend_all([Source(array, give_back)], kind)
        return loan

    def lend_all(self, sources: Sequence[Source], kind: Kind) -> list[Loan]:
        """`lend` of several arrays, which are followed as one.

        What is overwritten on the device must have arrived: a copy that is donated
        while it is on its way cannot be followed. Releasing one waits for all.
        """
        if not sources:
            return []
        arrays, begun_s = [source.array for source in sources], time.perf_counter()
        try:
            copies = jax.device_put(arrays, self.device)
            if self.is_shared:
                return [
                    Loan(copy, source.give_back)
                    for copy, source in zip(copies, sources, strict=True)
                ]
            copied = self._copies.submit(self._follow, copies, kind, begun_s, sources)
        except BaseException:
            _give_back(sources)
            raise
        total_bytes = sum(array.nbytes for array in arrays)
        self._ledger.hold(Tier.DEVICE, kind, total_bytes)
        self._ledger.move(Tier.HOST, Tier.DEVICE, total_bytes)

        def release(nbytes: int) -> None:
            # What went wrong with a copy is heard of where it is used.
            copied.exception()
            self._ledger.hold(Tier.DEVICE, kind, -nbytes)

        return [Loan(copy, functools.partial(release, copy.nbytes)) for copy in copies]

    def download(self, arrays: Any, rows: slice) -> Any:
        """`array[rows]` of each array of a tree, once computed; in host memory.

        They are numpy's then, and read-only.
        """
        if self.is_shared:
            return jax.tree.map(lambda array: np.asarray(array)[rows], arrays)
        parts = jax.tree.map(lambda array: _cut(array, rows), arrays)
        nbytes = sum(part.nbytes for part in jax.tree.leaves(parts))
        self._ledger.move(Tier.DEVICE, Tier.HOST, nbytes)
        # As numpy asks for them, they would come through memory that is not pinned.
        pinned = SingleDeviceSharding(self.device, memory_kind="pinned_host")
        return jax.tree.map(np.asarray, jax.device_put(parts, pinned))

    def close(self) -> None:
        """Ends the thread once all copies have ended."""
        self._copies.shutdown()

    def _follow(
        self,
        copies: list[jax.Array],
        kind: Kind,
        begun_s: float,
        sources: Sequence[Source],
    ) -> None:
        """Waits until copies, which read their sources until then, have ended."""
        try:
            jax.block_until_ready(copies)
        finally:
            nbytes = sum(copy.nbytes for copy in copies)
            begin_s, self._free_s = max(begun_s, self._free_s), time.perf_counter()
            self._timeline.worked(
                Lane.TO_DEVICE, kind.value, begin_s, self._free_s, nbytes
            )
            _give_back(sources)


def _give_back(sources: Sequence[Source]) -> None:
    for source in sources:
        source.give_back()


def _cut(array: jax.Array, rows: slice) -> jax.Array:
    is_whole = rows.indices(array.shape[0]) == (0, array.shape[0], 1)
    return array if is_whole else array[rows]


def _map(memory: np.ndarray, device: Device) -> None:
    """Tells the device of host memory, for as long as it is there."""
    address = memory.ctypes.data
    try:
        device.client.dma_map(address, memory.nbytes)
    except Exception as error:  # noqa: BLE001  (each backend refuses in its own way)
        _warn_of_slow_copies(str(error))  # they are as right
        return
    unmap = weakref.finalize(memory, device.client.dma_unmap, address)
    unmap.atexit = False  # the system does it, and the client may be gone


@functools.cache
def _warn_of_slow_copies(reason: str) -> None:
    logger.warning(
        "copies to the device may be slow: it cannot be told of host memory (%s)",
        reason,
    )
