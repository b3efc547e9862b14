"""The way between host memory and the device."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from flexjax.kernels.products import can_multiply_quantized, why_missing
from flexjax.memory.ledger import Ledger
from flexjax.memory.processor import Processor
from flexjax.policy import Kind, Policy, Tier


@runtime_checkable
class Device(Protocol):
    """What is asked of a `jax.Device`, which type checkers take for a variable."""

    @property
    def platform(self) -> str: ...

    def memory_stats(self) -> dict[str, Any] | None: ...


def nothing_to_release() -> None:
    """The `release` of an array that stays where it is."""


class Loan(NamedTuple):
    """An array on the device, and what to call when nothing uses it any more."""

    array: Any  # a `jax.Array`, or of quantized weights a `QuantizedArray`
    release: Callable[[], None] = nothing_to_release


def is_shared(device: Device) -> bool:
    """Whether the device computes in the host's memory, as a CPU does."""
    return device.platform == "cpu"


def processor_of(device: Device, *, is_quantized: bool) -> Processor:
    """What the layout of a model, whose weights may be quantized, asks of `device`."""
    is_host = is_shared(device)
    return Processor(
        is_host=is_host,
        multiplies_quantized=is_quantized and is_host and can_multiply_quantized(),
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
        reason = why_missing()
    if reason is not None:
        raise ValueError(
            f"activation_bits={policy.activation_bits} cannot be had here: {reason}. "
            "It is for CPUs with AVX-512, its VNNI and its bfloat16, but no AMX, and "
            "needs a C++ compiler; mend that, or leave activation_bits out"
        )


class Lender(Protocol):
    """Makes arrays of host memory usable where they are computed with.

    Attributes:
        stage_tier: where a stage buffer counts whose array is lent.
    """

    stage_tier: Tier

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
    """

    def __init__(self, device: Device, ledger: Ledger) -> None:
        self.device = device
        self.is_shared = is_shared(device)
        self.stage_tier = Tier.DEVICE if self.is_shared else Tier.HOST
        self._ledger = ledger

    def lend(
        self,
        array: np.ndarray,
        kind: Kind,
        give_back: Callable[[], None] = nothing_to_release,
    ) -> Loan:
        """`array` on the device.

        Args:
            array: must not change before the loan is released; memory that is aligned
                to 64 bytes is used in place where the device shares it.
            kind: under which the copy on the device is counted.
            give_back: called once `array` is not needed any more, at the latest when
                the loan is released, or at once if there is none to be had.
        """
        nbytes = array.nbytes
        try:
            copy = jax.device_put(array, self.device)
            if self.is_shared:
                return Loan(copy, give_back)
            # The copy may read `array` after device_put has returned.
            copy.block_until_ready()
        except BaseException:
            give_back()
            raise
        self._ledger.hold(Tier.DEVICE, kind, nbytes)
        self._ledger.move(Tier.HOST, Tier.DEVICE, nbytes)
        give_back()
        return Loan(copy, lambda: self._ledger.hold(Tier.DEVICE, kind, -nbytes))

    def download(self, array: jax.Array, rows: slice) -> np.ndarray:
        """`array[rows]` in host memory, once it has been computed; read-only."""
        if self.is_shared:
            return np.asarray(array)[rows]
        part = array[rows]
        self._ledger.move(Tier.DEVICE, Tier.HOST, part.nbytes)
        return np.asarray(part)
