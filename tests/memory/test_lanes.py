import threading
import time
from concurrent.futures import CancelledError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexjax.memory.lanes import THREADS, Lane, Lanes, Span, Timeline
from tests.common import flexjax_threads, in_time


@pytest.fixture
def timeline():
    return Timeline(keeps_spans=True)


@pytest.fixture
def lanes(timeline):
    lanes = Lanes(timeline)
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
    meeting = threading.Barrier(len(THREADS))
    tasks = [lanes.submit(lane, meeting.wait, 30) for lane in THREADS]
    assert sorted(task.result() for task in tasks) == list(range(len(THREADS)))


def test_what_a_task_raises_is_raised_by_its_future_alone(lanes):
    broken = lanes.submit(Lane.HIDDEN, fail, "the disk is gone")
    after = lanes.submit(Lane.HIDDEN, int, 7)
    with pytest.raises(OSError, match="the disk is gone"):
        broken.result()
    assert after.result() == 7


def test_drain_waits_for_the_good_and_the_bad(lanes):
    go = threading.Event()
    tasks = [lanes.submit(lane, go.wait) for lane in THREADS]
    tasks += [lanes.submit(lane, fail, "bad") for lane in THREADS]
    threading.Timer(0.05, go.set).start()
    lanes.drain()
    assert all(task.done() for task in tasks)


def test_close_drops_what_waits_and_ends_the_threads():
    lanes, go = Lanes(Timeline()), threading.Event()
    running = lanes.submit(Lane.WEIGHTS, go.wait)
    waiting = lanes.submit(Lane.WEIGHTS, int)
    threading.Timer(0.05, go.set).start()
    in_time(lanes.close)
    lanes.close()  # again
    assert running.result() is True
    with pytest.raises(CancelledError):
        waiting.result()
    assert flexjax_threads() == []


@given(st.lists(st.tuples(st.sampled_from(THREADS), st.sets(st.integers(0, 20)))))
def test_tasks_that_wait_for_earlier_ones_never_lock_each_other(graph):
    lanes, tasks = Lanes(Timeline()), []

    def wait_for(others) -> int:
        return 1 + sum(other.result() for other in others)

    for lane, wanted in graph:
        earlier = [tasks[i] for i in wanted if i < len(tasks)]
        tasks.append(lanes.submit(lane, wait_for, earlier))
    in_time(lanes.drain)
    assert all(task.result() >= 1 for task in tasks)
    in_time(lanes.close)


def test_a_lane_is_busy_while_it_works_and_not_while_it_waits(lanes, timeline):
    go = threading.Event()

    def work() -> None:
        go.wait()
        with lanes.working(Lane.WEIGHTS, "a layer"):
            time.sleep(0.01)

    task = lanes.submit(Lane.WEIGHTS, work)
    time.sleep(0.05)
    go.set()
    task.result()
    assert timeline.busy_s[Lane.WEIGHTS] >= 0.01
    assert sum(timeline.busy_s.values()) == timeline.busy_s[Lane.WEIGHTS]
    (span,) = timeline.spans
    assert (span.lane, span.name) == (Lane.WEIGHTS, "a layer")
    assert span.end_s - span.begin_s == timeline.busy_s[Lane.WEIGHTS]


def test_work_that_fails_is_work_too(lanes, timeline):
    def work() -> None:
        with lanes.working(Lane.HIDDEN, "broken"):
            fail("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        lanes.submit(Lane.HIDDEN, work).result()
    assert [span.name for span in timeline.spans] == ["broken"]


@pytest.mark.parametrize("keeps_spans", [False, True])
def test_a_timeline_counts_always_and_keeps_spans_if_told_to(keeps_spans):
    timeline = Timeline(keeps_spans=keeps_spans)
    timeline.worked(Lane.COMPUTE, "a", 1.0, 3.0)
    timeline.worked(Lane.COMPUTE, "b", 4.0, 4.5)
    timeline.add(Span(Lane.DISK, "c", 1.0, 2.0))  # counted by the disk's queue
    assert timeline.busy_s[Lane.COMPUTE] == 2.5
    assert timeline.busy_s[Lane.DISK] == 0
    assert timeline.spans == keeps_spans * [
        Span(Lane.COMPUTE, "a", 1.0, 3.0),
        Span(Lane.COMPUTE, "b", 4.0, 4.5),
        Span(Lane.DISK, "c", 1.0, 2.0),
    ]
    before = timeline.spans
    timeline.start()
    assert timeline.busy_s == dict.fromkeys(Lane, 0.0)
    assert timeline.spans == []
    assert len(before) == 3 * keeps_spans, "who has them keeps them"


def test_waiting_is_no_work_and_cuts_the_span():
    timeline = Timeline(keeps_spans=True)
    with timeline.waiting():
        pass  # nobody works: nothing to count
    with timeline.working(Lane.WEIGHTS, "a"):
        time.sleep(0.01)
        with timeline.waiting():
            begin_s = time.perf_counter()
            time.sleep(0.03)
            end_s = time.perf_counter()
        time.sleep(0.01)
    first, second = timeline.spans
    assert first.end_s <= begin_s
    assert end_s <= second.begin_s
    assert timeline.busy_s[Lane.WEIGHTS] == pytest.approx(
        sum(span.end_s - span.begin_s for span in timeline.spans)
    )
