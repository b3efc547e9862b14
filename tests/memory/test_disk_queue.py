"""The disk's queue: who comes first, what a failure does, and when it is at rest."""

import contextlib
import gc
import pathlib
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import Future

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexjax import trace
from flexjax.extents import Extent, read_extent, write_extent
from flexjax.memory import disk_queue
from flexjax.memory.disk_queue import DEPTH, DiskQueue, Urgency
from flexjax.memory.lanes import Lane, Timeline
from tests.common import flexjax_threads, in_time

PIECE_BYTES = 10


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(disk_queue, "REQUEST_BYTES", PIECE_BYTES)


@pytest.fixture
def timeline():
    return Timeline(keeps_spans=True)


@pytest.fixture
def make(timeline):
    """Makes queues, and closes them."""
    queues = []

    def make(depth: int = DEPTH) -> DiskQueue:
        queues.append(DiskQueue(timeline, depth))
        return queues[-1]

    yield make
    for queue in queues:
        in_time(queue.close)


def extent(name: str, pieces: int = 1) -> Extent:
    """What `pieces` pieces are made of."""
    memory = np.zeros(PIECE_BYTES * pieces - 1, np.uint8)
    return Extent(pathlib.Path(name), 0, memory)


def describe(error: OSError) -> OSError:
    return OSError(f"the request failed: {error}")


def submit(
    queue: DiskQueue, move, *extents: Extent, name="", urgency=Urgency.NOW
) -> Future[None]:
    return queue.submit(move, extents, name=name, urgency=urgency, describe=describe)


class Gate:
    """A move that waits at the gate, and counts who came."""

    def __init__(self) -> None:
        self.came = threading.Semaphore(0)
        self.open = threading.Event()

    def __call__(self, extent: Extent) -> None:
        self.came.release()
        assert self.open.wait(60)

    def wait_for(self, count: int) -> None:
        for _ in range(count):
            assert self.came.acquire(timeout=60)


@given(
    st.lists(st.tuples(st.sampled_from(Urgency), st.integers(0, 3)), max_size=8),
)
def test_the_most_urgent_goes_first_and_else_the_first(requests):
    queue, gate, moved = DiskQueue(Timeline(), 1), Gate(), []
    running = submit(queue, gate, extent("running"))
    gate.wait_for(1)
    tasks = [
        submit(
            queue,
            lambda extent: moved.append((extent.path.name, extent.offset)),
            *([extent(f"{number}", pieces)] if pieces else []),
            urgency=urgency,
        )
        for number, (urgency, pieces) in enumerate(requests)
    ]
    assert [task.done() for task in tasks] == [pieces == 0 for _, pieces in requests]
    gate.open.set()
    for task in (running, *tasks):
        in_time(task.result)
    in_order = sorted(range(len(requests)), key=lambda n: (requests[n][0], n))
    assert moved == [
        (f"{number}", piece * PIECE_BYTES)
        for number in in_order
        for piece in range(requests[number][1])
    ]
    in_time(queue.close)


@pytest.mark.parametrize("depth", [1, 3])
def test_as_many_are_under_way_as_the_depth_says(make, depth):
    queue, gate = make(depth), Gate()
    task = submit(queue, gate, extent("file", depth + 2))
    gate.wait_for(depth)
    assert not gate.came.acquire(timeout=0.05)
    gate.open.set()
    in_time(task.result)


def test_a_piece_that_fails_ends_its_request_once_none_is_under_way(make):
    queue, gate, moved, failed = make(2), Gate(), [], threading.Event()

    def move(extent: Extent) -> None:
        moved.append(extent.offset)
        if extent.offset == 0:
            gate(extent)
        else:
            failed.set()
            raise OSError(5, "broken", "the file")

    broken = submit(queue, move, extent("file", 6))
    other = submit(queue, moved.append, extent("other"))
    gate.wait_for(1)
    assert failed.wait(60)
    in_time(other.result)  # behind all pieces of the broken one
    assert not broken.done(), "its first piece is under way"
    gate.open.set()
    error = in_time(broken.exception)
    assert str(error) == "the request failed: [Errno 5] broken: 'the file'"
    assert isinstance(error.__cause__, OSError)
    assert error.__cause__.errno == 5
    assert moved[:2] in ([0, PIECE_BYTES], [PIECE_BYTES, 0])
    assert len(moved) == 3, "the others were left out"
    in_time(submit(queue, moved.append, extent("again")).result)


def test_the_first_error_is_the_request_s(make):
    queue, gate = make(2), Gate()

    def move(extent: Extent) -> None:
        gate(extent)
        raise OSError(f"piece {extent.offset}")

    task = submit(queue, move, extent("file", 2))
    gate.wait_for(2)
    gate.open.set()
    error = in_time(task.exception)
    assert str(error) in {f"the request failed: piece {at}" for at in (0, PIECE_BYTES)}


@pytest.mark.parametrize("kind", [MemoryError, ValueError, KeyboardInterrupt])
def test_what_is_no_error_of_the_disk_is_raised_as_it_is(make, kind):
    queue, error = make(), kind("of another kind")

    def move(extent: Extent) -> None:
        raise error

    assert in_time(submit(queue, move, extent("file", 3)).exception) is error
    in_time(submit(queue, lambda extent: None, extent("file")).result)


def test_nothing_to_move_is_done_at_once(make):
    assert submit(make(), write_extent).done()
    empty = Extent(pathlib.Path("nowhere"), 0, np.zeros(0, np.uint8))
    assert submit(make(), write_extent, empty).result() is None


def test_close_finishes_what_was_submitted_and_ends_the_threads():
    queue, gate, moved = DiskQueue(Timeline(), 2), Gate(), []
    assert [name for name in flexjax_threads() if "disk" in name] == [
        "flexjax disk 0",
        "flexjax disk 1",
    ]
    running = submit(queue, gate, extent("running", 2))
    waiting = [
        submit(queue, moved.append, extent(f"{urgency}", 2), urgency=urgency)
        for urgency in Urgency
    ]
    gate.wait_for(2)
    threading.Timer(0.05, gate.open.set).start()
    in_time(queue.close)
    assert all(task.done() for task in (running, *waiting))
    assert len(moved) == 2 * len(Urgency)
    assert flexjax_threads() == []
    in_time(queue.close)  # again


def test_a_program_that_closes_nothing_ends():
    code = (
        "from flexjax.memory.disk_queue import DiskQueue;"
        "from flexjax.memory.lanes import Timeline;"
        "queue = DiskQueue(Timeline())"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_disk_is_busy_while_something_is_under_way_and_no_longer(make, timeline):
    queue = make()

    def move(extent: Extent) -> None:
        time.sleep(0.002)

    for _ in range(3):
        in_time(submit(queue, move, extent("file", 7), name="a tensor").result)
        time.sleep(0.005)
    in_time(queue.close)
    assert len(timeline.spans) == 3 * 7
    assert {(span.lane, span.name) for span in timeline.spans} == {
        (Lane.DISK, "a tensor")
    }
    assert sum(span.nbytes for span in timeline.spans) == 3 * (7 * PIECE_BYTES - 1)
    times = [(span.begin_s, span.end_s) for span in timeline.spans]
    union_s = trace.busy_s(times, min(times)[0], max(end_s for _, end_s in times))
    assert timeline.busy_s[Lane.DISK] == pytest.approx(union_s)
    assert timeline.busy_s[Lane.DISK] < sum(end_s - begin_s for begin_s, end_s in times)
    assert {lane for lane, busy_s in timeline.busy_s.items() if busy_s} == {Lane.DISK}


def test_what_fails_was_work_and_what_is_left_out_was_none(make, timeline):
    def move(extent: Extent) -> None:
        raise OSError("broken")

    in_time(submit(make(1), move, extent("file", 5)).exception)
    assert len(timeline.spans) == 1
    assert timeline.busy_s[Lane.DISK] > 0


def test_an_idle_thread_keeps_no_buffer_alive(make):
    queue = make(1)
    buffer = np.zeros(5 * PIECE_BYTES, np.uint8)
    gone = weakref.ref(buffer)
    broken = Extent(pathlib.Path("nowhere"), 0, buffer)
    # The future of a failure keeps its traceback, and so what was moved.
    assert in_time(submit(queue, read_extent, broken).exception)
    in_time(submit(queue, lambda extent: None, broken).result)
    del buffer, broken
    end = time.monotonic() + 10
    while gone() is not None and time.monotonic() < end:
        gc.collect()
        time.sleep(0.001)
    assert gone() is None


@given(
    sizes=st.lists(st.integers(1, 95), min_size=1, max_size=5),
    urgencies=st.lists(st.sampled_from(Urgency), min_size=5, max_size=5),
    depth=st.integers(1, DEPTH),
)
def test_every_byte_arrives_whatever_is_asked_for_at_once(
    tmp_path_factory, sizes, urgencies, depth
):
    folder, random = tmp_path_factory.mktemp("queue"), np.random.default_rng(0)
    arrays = [random.integers(0, 256, size, np.uint8) for size in sizes]
    found = [np.zeros_like(array) for array in arrays]
    with contextlib.closing(DiskQueue(Timeline(), depth)) as queue:
        for move, memories in ((write_extent, arrays), (read_extent, found)):
            tasks = []
            for number, memory in enumerate(memories):
                one, two = np.array_split(memory, 2)
                path = folder / f"{number}"
                halves = Extent(path, 7, one), Extent(path, 7 + len(one), two)
                urgency = urgencies[number]
                tasks.append(submit(queue, move, *halves, urgency=urgency))
            for task in tasks:
                in_time(task.result)
    assert all(map(np.array_equal, arrays, found))
