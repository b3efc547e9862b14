import threading
import time
from concurrent.futures import CancelledError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexjax.memory.lanes import Lane, Lanes
from tests.common import flexjax_threads, in_time


@pytest.fixture
def lanes():
    lanes = Lanes()
    yield lanes
    lanes.close()


def fail(message: str) -> None:
    raise OSError(message)


def test_a_lane_keeps_the_order_of_issue(lanes):
    seen = []
    for number in range(100):
        lanes.submit(Lane.COMPUTE, seen.append, number)
    lanes.drain()
    assert seen == list(range(100))


def test_lanes_run_beside_each_other(lanes):
    meeting = threading.Barrier(len(Lane))
    tasks = [lanes.submit(lane, meeting.wait, 30) for lane in Lane]
    assert sorted(task.result() for task in tasks) == list(range(len(Lane)))


def test_what_a_task_raises_is_raised_by_its_future_alone(lanes):
    broken = lanes.submit(Lane.HIDDEN, fail, "the disk is gone")
    after = lanes.submit(Lane.HIDDEN, int, 7)
    with pytest.raises(OSError, match="the disk is gone"):
        broken.result()
    assert after.result() == 7


def test_drain_waits_for_the_good_and_the_bad(lanes):
    go = threading.Event()
    tasks = [lanes.submit(lane, go.wait) for lane in Lane]
    tasks += [lanes.submit(lane, fail, "bad") for lane in Lane]
    threading.Timer(0.05, go.set).start()
    lanes.drain()
    assert all(task.done() for task in tasks)


def test_close_drops_what_waits_and_ends_the_threads():
    lanes, go = Lanes(), threading.Event()
    running = lanes.submit(Lane.WEIGHTS, go.wait)
    waiting = lanes.submit(Lane.WEIGHTS, int)
    threading.Timer(0.05, go.set).start()
    in_time(lanes.close)
    lanes.close()  # again
    assert running.result() is True
    with pytest.raises(CancelledError):
        waiting.result()
    assert flexjax_threads() == []


@given(st.lists(st.tuples(st.sampled_from(Lane), st.sets(st.integers(0, 20)))))
def test_tasks_that_wait_for_earlier_ones_never_lock_each_other(graph):
    lanes, tasks = Lanes(), []

    def wait_for(others) -> int:
        return 1 + sum(other.result() for other in others)

    for lane, wanted in graph:
        earlier = [tasks[i] for i in wanted if i < len(tasks)]
        tasks.append(lanes.submit(lane, wait_for, earlier))
    in_time(lanes.drain)
    assert all(task.result() >= 1 for task in tasks)
    in_time(lanes.close)


def test_a_lane_is_busy_while_it_works_and_not_while_it_waits(lanes):
    go = threading.Event()

    def work() -> None:
        go.wait()
        with lanes.working(Lane.WEIGHTS):
            time.sleep(0.01)

    task = lanes.submit(Lane.WEIGHTS, work)
    time.sleep(0.05)
    go.set()
    task.result()
    assert lanes.busy_s[Lane.WEIGHTS] >= 0.01
    assert sum(lanes.busy_s.values()) == lanes.busy_s[Lane.WEIGHTS]
