"""What ops take time of, and how fast several are beside each other."""

import dataclasses
import enum
from collections import Counter
from collections.abc import Mapping


class Resource(enum.Enum):
    """What an op takes time of."""

    DISK_READ = "disk read"
    DISK_WRITE = "disk write"
    TO_DEVICE = "host to device"
    FROM_DEVICE = "device to host"
    COMPUTE = "compute"
    HOST_ATTENTION = "host attention"

    __hash__ = object.__hash__  # Enum's own is slow, and members are keys of every op


DISK = (Resource.DISK_READ, Resource.DISK_WRITE)
Seconds = Mapping[Resource, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contention:
    """How fast disk and compute are beside each other, as a fraction of their speed.

    Where the device is the host's own processor, a disk takes some of its time.
    """

    compute_beside_disk: float = 1.0
    disk_beside_compute: float = 1.0

    def seconds(self, disk_s: float, compute_s: float) -> float:
        """What both take that begin together, and have all to do at once."""
        return max(
            of_disk * disk_s + of_compute * compute_s
            for of_disk, of_compute in self.lines()
        )

    def lines(self) -> tuple[tuple[float, float], ...]:
        """Factors of the disk's and of compute's seconds.

        The larger sum is what both take: who ends last takes its own time, and what it
        loses for as long as the other takes.
        """
        slower_disk, slower = self.disk_beside_compute, self.compute_beside_disk
        return (1.0, (1 - slower_disk) / slower), ((1 - slower) / slower_disk, 1.0)

    def speeds(self, used: tuple[Resource, ...]) -> tuple[float, ...]:
        """How fast each of some tasks is, by what each uses; some may share that."""
        counts = Counter(used)
        speeds = {resource: 1.0 / count for resource, count in counts.items()}
        busy_disks = [resource for resource in DISK if resource in counts]
        for resource in busy_disks:  # reading and writing are one disk's
            speeds[resource] = 1.0 / sum(counts[each] for each in busy_disks)
        if busy_disks and Resource.COMPUTE in counts:
            speeds[Resource.COMPUTE] *= self.compute_beside_disk
            for resource in busy_disks:
                speeds[resource] *= self.disk_beside_compute
        return tuple([speeds[resource] for resource in used])


ALONE = Contention()


def add_seconds(total: dict[Resource, float], more: Seconds, times: float = 1) -> None:
    """Adds `more`, so many times."""
    for resource, seconds in more.items():
        total[resource] = total.get(resource, 0.0) + times * seconds
