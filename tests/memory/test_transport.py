"""What everything moves through: one place to count, and one to end it."""

import threading

import numpy as np
import pytest

from flexjax.extents import Extent
from flexjax.memory.disk_queue import Urgency
from flexjax.memory.lanes import Lane
from flexjax.policy import Kind, Tier
from tests.common import flexjax_threads, in_time, make_transport


@pytest.fixture
def transport():
    transport = make_transport()
    yield transport
    in_time(transport.close)


def move(transport, how, path):
    extent = Extent(path, 0, np.zeros(10, np.uint8))
    return transport.disk.submit(
        how, [extent], name="some", urgency=Urgency.NOW, describe=lambda error: error
    )


def test_a_new_run_is_counted_from_nothing_but_what_is_held(transport, tmp_path):
    transport.ledger.hold(Tier.HOST, Kind.WEIGHTS, 5)
    transport.ledger.move(Tier.DISK, Tier.HOST, 5)
    in_time(move(transport, lambda extent: None, tmp_path).result)
    with transport.lanes.working(Lane.WEIGHTS, "a layer"):
        pass
    assert transport.timeline.busy_s[Lane.WEIGHTS] > 0
    assert transport.timeline.busy_s[Lane.DISK] > 0
    transport.start()
    assert transport.ledger.moved() == {}
    assert transport.ledger.held(Tier.HOST, Kind.WEIGHTS) == 5
    assert not any(transport.timeline.busy_s.values())


def test_close_ends_a_lane_that_waits_for_the_disk(tmp_path):
    transport, go = make_transport(), threading.Event()
    read = move(transport, lambda extent: go.wait(60), tmp_path)
    waiting = transport.lanes.submit(Lane.WEIGHTS, read.result)
    threading.Timer(0.05, go.set).start()
    in_time(transport.close)
    assert waiting.result() is None
    assert flexjax_threads() == []
    in_time(transport.close)  # again
