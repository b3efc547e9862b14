"""What everything that moves goes through, and what counts it."""

from flexjax.memory.disk_queue import DiskQueue
from flexjax.memory.lanes import Lanes, Timeline
from flexjax.memory.ledger import Ledger
from flexjax.memory.link import Device, DeviceLink


class Transport:
    """The lanes, the disk's queue and the link to one device, with their counters.

    Attributes:
        ledger: bytes held and moved.
        timeline: when which lane worked.
        link: the way to the device and back.
        disk: the requests to the disk.
        lanes: the threads of everything else.
    """

    def __init__(self, device: Device, *, keeps_spans: bool = False) -> None:
        self.ledger = Ledger()
        self.timeline = Timeline(keeps_spans=keeps_spans)
        self.link = DeviceLink(device, self.ledger, self.timeline)
        self.disk = DiskQueue(self.timeline)
        self.lanes = Lanes(self.timeline)

    def start(self) -> None:
        """Begins to count a new run."""
        self.ledger.start()
        self.timeline.start()

    def close(self) -> None:
        """Ends all threads, the lanes first: they wait for the others."""
        self.lanes.close()
        self.disk.close()
        self.link.close()
