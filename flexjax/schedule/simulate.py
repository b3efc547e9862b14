"""When a schedule's ops would happen on a machine: the executor's lanes, without it.

Time flows as a fluid: between two events every resource works at a constant speed. A
lane does its tasks in the order of issue; a task begins when those that it waits for
are done; lanes that use the same resource share it; and only a `Free` holds up the
issue of further ops. So what is simulated is what the executor does, but for the time
that issuing takes.
"""

import collections
import dataclasses
import enum
import functools
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Protocol

from flexjax.schedule.emit import Alive
from flexjax.schedule.ops import (
    Buffer,
    Cache,
    Cell,
    Compute,
    Free,
    Hidden,
    Load,
    Op,
    Store,
    Weights,
)
from flexjax.schedule.resources import (
    ALONE,
    DISK,
    Contention,
    Resource,
    Seconds,
    add_seconds,
)
from flexjax.workload import Workload


class Costs(Protocol):
    """Seconds of every op, by resource, when nothing else happens."""

    def load(self, buffer: Buffer, step: int) -> Seconds: ...
    def compute(self, cell: Cell) -> Seconds: ...
    def store(self, buffer: Cache | Hidden, step: int) -> Seconds: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Simulated:
    """What became of a simulated run.

    Attributes:
        seconds: of the whole.
        step_ends_s: when each step's last compute call ended.
        step_busy_s: of each resource for each step's ops, when nothing else happens.
    """

    seconds: float
    step_ends_s: Mapping[int, float]
    step_busy_s: Mapping[int, Seconds]

    @property
    def busy_s(self) -> dict[Resource, float]:
        """Of each resource for all ops."""
        total = dict.fromkeys(Resource, 0.0)
        for seconds in self.step_busy_s.values():
            add_seconds(total, seconds)
        return total


class _Queue(enum.IntEnum):
    """Whose order of issue is kept: the lanes, and the reading of weights ahead."""

    DISK_AHEAD = 0
    WEIGHTS = 1
    CACHE_IN = 2
    CACHE_OUT = 3
    HIDDEN = 4
    PROJECT = 5
    ATTENTION = 6
    COMPUTE = 7


@dataclasses.dataclass(slots=True, eq=False)
class _Task:
    """Stages that one queue does one after the other.

    Attributes:
        queue: in whose order it comes.
        stages: what is left to do, the next one last.
        waits_for: how many tasks that are not done yet it needs.
        needed_by: which tasks wait for it.
    """

    queue: collections.deque["_Task"]
    stages: list[tuple[Resource, float]]
    waits_for: int = 0
    needed_by: list["_Task"] = dataclasses.field(default_factory=list)
    is_done: bool = False
    end_s: float = 0.0


def simulate(
    emit: Callable[[Workload, Alive], Iterable[Op]],
    work: Workload,
    costs: Costs,
    contention: Contention = ALONE,
    *,
    barrier: bool = False,
) -> Simulated:
    """Runs what `emit` makes of `work` on lanes that take the time `costs` says.

    Nobody ends early; but as in a run, a batch is asked for its next step only once its
    last one is done. With `barrier` a compute call waits for all that was issued before
    it, whether it needs it or not, but for what the last call made and is being stored,
    as FlexGen's does (arXiv 2303.06865, algorithm 1).
    """
    run = _Run(work, costs, contention)
    stored: list[_Task] = []  # since the last compute call was issued
    for op in emit(work, run.alive):
        match op:
            case Load(buffer, step):
                run.load(buffer, step)
            case Compute(step, layer, batch):
                if barrier:
                    run.drain(but=stored)
                stored.clear()
                run.compute(Cell(step, layer, batch))
            case Store(buffer, step):
                stored.append(run.store(buffer, step))
            case Free(buffer):
                run.free(buffer)
    run.end()
    return Simulated(
        seconds=run.now_s,
        step_ends_s=dict(run.step_ends_s),
        step_busy_s=dict(run.step_busy_s),
    )


class _Run:
    """The lanes, what is in them, and the time."""

    def __init__(self, work: Workload, costs: Costs, contention: Contention) -> None:
        self._work, self._costs = work, costs
        # There are few ways to share: each is found once.
        self._speeds = functools.cache(contention.speeds)
        self._queues: dict[_Queue, collections.deque[_Task]] = {
            queue: collections.deque() for queue in _Queue
        }
        self._loads: dict[Buffer, _Task] = {}
        self._uses: dict[Buffer, list[_Task]] = {}  # a `Free` waits for them
        self._layer_parts: dict[int, list[Weights]] = {}
        self._stored: dict[Cache | Hidden, _Task] = {}  # the last of each
        self._computed: dict[int, _Task] = {}  # the last of each batch
        self.now_s = 0.0
        self.step_ends_s: dict[int, float] = {}
        self.step_busy_s: dict[int, dict[Resource, float]] = {}
        self._ends: list[tuple[int, _Task]] = []  # (step, compute call)

    def alive(self, step: int, batch: int) -> bool:
        """Waits for the batch's last token, as a run does before it goes on."""
        if step > 0:
            self._advance([self._computed[batch]])
        return True

    def load(self, buffer: Buffer, step: int) -> None:
        seconds = self._costs.load(buffer, step)
        self._count(step, seconds)
        disk = [(r, s) for r, s in seconds.items() if r in DISK and s > 0]
        rest = [(r, s) for r, s in seconds.items() if r not in DISK]
        after = []
        if not isinstance(buffer, Weights) and buffer in self._stored:
            after.append(self._stored[buffer])
        if isinstance(buffer, Hidden) and buffer.batch in self._computed:
            after.append(self._computed[buffer.batch])  # of a new step, its last token
        stages = disk + rest
        match buffer:
            case Weights(layer):
                lane = _Queue.WEIGHTS
                self._layer_parts.setdefault(layer, []).append(buffer)
                if disk:
                    after = [self._add(_Queue.DISK_AHEAD, disk, after)]
                stages = rest
            case Cache():
                lane = _Queue.CACHE_IN
            case Hidden():
                lane = _Queue.HIDDEN
        task = self._add(lane, stages, after)
        self._loads[buffer] = task
        self._uses[buffer] = [task]

    def compute(self, cell: Cell) -> None:
        seconds = dict(self._costs.compute(cell))
        self._count(cell.step, seconds)
        cache, hidden = Cache(cell.layer, cell.batch), Hidden(cell.batch)
        weights = self._layer_parts[cell.layer]
        used: list[Buffer] = [*weights, hidden]
        if (prefix := self._work.prefix_of(cell.batch)) is not None:
            shared = Cache(cell.layer, prefix)
            used += [shared] if shared in self._uses else []  # none of a head block
        inputs = [*used, cache]
        after = [self._loads[buffer] for buffer in inputs if buffer in self._loads]
        if cell.batch in self._computed:
            after.append(self._computed[cell.batch])  # made what it is given
        if (host_s := seconds.pop(Resource.HOST_ATTENTION, 0.0)) > 0:
            # As the engine does: projections, attention, and what comes after it.
            half = [(r, s / 2) for r, s in seconds.items()]
            project = self._add(_Queue.PROJECT, half, after)
            at_host = [(Resource.HOST_ATTENTION, host_s)]
            after = [self._add(_Queue.ATTENTION, at_host, [project])]
            stages = list(half)
        else:
            stages = list(seconds.items())
        task = self._add(_Queue.COMPUTE, stages, after)
        for buffer in (*used, cache):
            self._uses.setdefault(buffer, []).append(task)
        self._computed[cell.batch] = task
        self._ends.append((cell.step, task))

    def store(self, buffer: Cache | Hidden, step: int) -> _Task:
        seconds = self._costs.store(buffer, step)
        self._count(step, seconds)
        lane = _Queue.CACHE_OUT if isinstance(buffer, Cache) else _Queue.HIDDEN
        stages = sorted(seconds.items(), key=lambda stage: stage[0] in DISK)
        task = self._add(lane, stages, [self._computed[buffer.batch]])
        self._stored[buffer] = task
        self._uses[buffer].append(task)
        return task

    def free(self, buffer: Buffer) -> None:
        self._advance(self._uses.pop(buffer))
        self._loads.pop(buffer, None)
        if isinstance(buffer, Weights):
            self._layer_parts[buffer.layer].remove(buffer)

    def drain(self, but: Container[_Task] = ()) -> None:
        """Waits for all that was issued."""
        issued = (task for queue in self._queues.values() for task in queue)
        self._advance([task for task in issued if task not in but])

    def end(self) -> None:
        self.drain()
        for step, task in self._ends:
            self.step_ends_s[step] = max(self.step_ends_s.get(step, 0.0), task.end_s)

    def _count(self, step: int, seconds: Seconds) -> None:
        add_seconds(self.step_busy_s.setdefault(step, {}), seconds)

    def _add(
        self, queue: _Queue, stages: list[tuple[Resource, float]], after: list[_Task]
    ) -> _Task:
        tasks = self._queues[queue]
        task = _Task(tasks, [stage for stage in stages[::-1] if stage[1] > 0])
        for needed in after:
            if not needed.is_done:
                needed.needed_by.append(task)
                task.waits_for += 1
        tasks.append(task)
        self._end_idle(tasks)
        return task

    def _advance(self, until: list[_Task]) -> None:
        """Lets time pass until all of `until` are done."""
        for task in until:
            while not task.is_done:
                self._pass_time(self._heads())

    def _pass_time(self, heads: list[_Task]) -> None:
        """Lets `heads` work until the first of them has done its stage."""
        speeds = self._speeds(tuple([task.stages[-1][0] for task in heads]))
        passed_s = min(
            task.stages[-1][1] / speed
            for task, speed in zip(heads, speeds, strict=True)
        )
        self.now_s += passed_s
        for task, speed in zip(heads, speeds, strict=True):
            resource, left_s = task.stages[-1]
            left_s -= passed_s * speed
            if left_s > 1e-9 * max(1e-3, self.now_s):
                task.stages[-1] = resource, left_s
            else:
                task.stages.pop()
        for task in heads:
            if not task.stages:
                self._end_idle(task.queue)

    def _end_idle(self, tasks: collections.deque[_Task]) -> None:
        """Ends the first tasks of a queue that have nothing left to do.

        And those elsewhere that only waited for one of them.
        """
        changed = [tasks]
        while changed:
            tasks = changed.pop()
            while tasks and not tasks[0].stages and not tasks[0].waits_for:
                task = tasks.popleft()
                task.is_done, task.end_s = True, self.now_s
                for waiting in task.needed_by:
                    waiting.waits_for -= 1
                    changed.append(waiting.queue)
                task.needed_by.clear()  # or all that follows would be kept with it

    def _heads(self) -> list[_Task]:
        """The tasks that work now: the first of each queue, if it is ready."""
        heads = [
            tasks[0]
            for tasks in self._queues.values()
            if tasks and not tasks[0].waits_for
        ]
        on_disk = [task for task in heads if task.stages[-1][0] in DISK]
        ahead = self._queues[_Queue.DISK_AHEAD]
        if len(on_disk) > 1 and ahead and ahead[0] is on_disk[0]:
            heads.remove(ahead[0])  # the disk is taken by what is more urgent
        return heads
