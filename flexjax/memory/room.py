"""The memory that an engine's runs may still take."""

import functools
import itertools
import pathlib
from collections import Counter
from collections.abc import Callable

from flexjax.memory.capacity import free_bytes, give_back_freed, shortage
from flexjax.memory.ledger import Ledger
from flexjax.memory.link import Device
from flexjax.policy import Kind, Tier
from flexjax.schedule.footprint import Bytes


class Room:
    """What is free on each tier, beside what is held already.

    Args of the constructor:
        device: that computes.
        offload_dir: whose disk takes what is spilled.
        ledger: of what is held.
        device_is_host: the device tier and the host tier share one memory.
    """

    def __init__(
        self,
        device: Device,
        offload_dir: pathlib.Path,
        ledger: Ledger,
        *,
        device_is_host: bool,
    ) -> None:
        self._device, self._offload_dir = device, offload_dir
        self._ledger, self._device_is_host = ledger, device_is_host

    def shortage(self, needed: Bytes) -> str | None:
        """What is not free of `needed`, even if all that was freed is given back."""
        if self._not_free(needed) is None:
            return None
        give_back_freed()
        return self._not_free(needed)

    def still_takes(
        self, planned: Bytes, hoped: Callable[[], Bytes]
    ) -> Callable[[Bytes], bool]:
        """Tells of a run whether it needs no more than a call may take.

        That is what was planned, or if that is free now, also what is hoped for. So
        nothing else that goes on meanwhile changes what comes out.

        Args:
            planned: bytes at the most, with what is held.
            hoped: the same; called when it is first needed.
        """
        free = Counter(free_bytes(self._device, self._offload_dir))
        for tier, kind in itertools.product(Tier, Kind):
            free[self._memory(tier)] += self._ledger.held(tier, kind)

        @functools.cache
        def room() -> Counter[Tier]:
            most = Counter(planned) | Counter(hoped())
            is_free = shortage(most, free, device_is_host=self._device_is_host) is None
            found: Counter[Tier] = Counter()
            for (tier, _), nbytes in (most if is_free else planned).items():
                found[self._memory(tier)] += nbytes
            return found

        def takes(peak: Bytes) -> bool:
            return shortage(peak, room(), device_is_host=self._device_is_host) is None

        return takes

    def beyond_held(self, peak: Bytes) -> Bytes:
        """What of a peak is not held yet."""
        return {key: nbytes - self._ledger.held(*key) for key, nbytes in peak.items()}

    def _not_free(self, needed: Bytes) -> str | None:
        free = free_bytes(self._device, self._offload_dir)
        return shortage(needed, free, device_is_host=self._device_is_host)

    def _memory(self, tier: Tier) -> Tier:
        """The tier that stands for the memory of one, which may be that of two."""
        return Tier.DEVICE if tier is Tier.HOST and self._device_is_host else tier
