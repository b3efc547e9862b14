"""Laws of simulated time, on costs that are drawn."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexjax.schedule.emit import EMITTERS, always, serial, zigzag
from flexjax.schedule.ops import Cache, Hidden, Weights
from flexjax.schedule.resources import Contention, Resource
from flexjax.schedule.simulate import simulate
from flexjax.workload import Workload
from tests.common import total_seconds
from tests.drawn import works

seconds = st.floats(0, 10).map(lambda value: round(value, 3))
fractions = st.floats(0.5, 1)
contentions = st.builds(
    Contention, compute_beside_disk=fractions, disk_beside_compute=fractions
)


@dataclasses.dataclass(frozen=True)
class DrawnCosts:
    """The same for every op of a kind."""

    weights: dict[Resource, float]
    cache: dict[Resource, float]
    hidden: dict[Resource, float]
    call: dict[Resource, float]

    def load(self, buffer, step):
        del step
        kinds = {Weights: self.weights, Cache: self.cache, Hidden: self.hidden}
        return kinds[type(buffer)]

    def compute(self, cell):
        del cell
        return self.call

    def store(self, buffer, step):
        del step
        moved = self.cache if isinstance(buffer, Cache) else self.hidden
        return {Resource.DISK_WRITE: sum(moved.values())}


moves = st.fixed_dictionaries(
    {Resource.DISK_READ: seconds, Resource.TO_DEVICE: seconds}
)
calls = st.fixed_dictionaries(
    {Resource.COMPUTE: seconds, Resource.HOST_ATTENTION: seconds}
)
costs_drawn = st.builds(DrawnCosts, moves, moves, moves, calls)


@given(work=works(), costs=costs_drawn, schedule=st.sampled_from(list(EMITTERS)))
def test_a_run_takes_at_least_its_slowest_resource_and_at_most_all_of_them(
    work, costs, schedule
):
    emit = EMITTERS[schedule]
    run = simulate(emit, work, costs)
    terms = total_seconds(costs, emit(work, always))
    assert run.seconds >= max(terms.values()) * (1 - 1e-6)
    assert run.seconds <= sum(terms.values()) * (1 + 1e-6)
    assert run.busy_s == pytest.approx(terms)
    assert list(run.step_ends_s) == list(range(work.gen_len))
    ends = list(run.step_ends_s.values())
    assert ends == sorted(ends)


@given(work=works(), costs=costs_drawn, contention=contentions)
def test_contention_delays_by_no_more_than_it_says(work, costs, contention):
    """That all is never sooner done cannot be said: other tasks may come first then."""
    run = simulate(zigzag, work, costs, contention)
    terms = total_seconds(costs, zigzag(work, always))
    slowest = min(contention.compute_beside_disk, contention.disk_beside_compute)
    assert run.seconds >= max(terms.values()) * (1 - 1e-6)
    assert run.seconds <= sum(terms.values()) / slowest * (1 + 1e-6)


@given(work=works(), costs=costs_drawn, schedule=st.sampled_from(list(EMITTERS)))
def test_a_barrier_changes_no_work_and_leaves_none_out(work, costs, schedule):
    emit = EMITTERS[schedule]
    free, waiting = (
        simulate(emit, work, costs, barrier=barrier) for barrier in (False, True)
    )
    assert waiting.busy_s == pytest.approx(free.busy_s)
    assert waiting.seconds >= max(free.busy_s.values()) * (1 - 1e-6)
    assert waiting.seconds <= sum(free.busy_s.values()) * (1 + 1e-6)


class StoringCosts(DrawnCosts):
    """Only what is made takes time to store."""

    def store(self, buffer, step):
        del step
        return {Resource.DISK_WRITE: 1.0 if isinstance(buffer, Cache) else 0.0}


def test_a_barrier_waits_for_what_is_loaded_and_not_for_what_was_just_made():
    work = Workload(num_decoder_layers=6, num_batches=4, gen_len=2)
    calls = work.gen_len * work.num_layers * work.num_batches
    # A store of a second is beside the next call of a second.
    storing = StoringCosts({}, {}, {}, {Resource.COMPUTE: 1.0})
    run = simulate(zigzag, work, storing, barrier=True)
    assert run.seconds == pytest.approx(calls, rel=0.05)
    # Weights of six seconds for four calls of one: alone they bound the time; but with
    # a barrier they come in some calls' time, and in others nothing does.
    heavy = DrawnCosts({Resource.DISK_READ: 6.0}, {}, {}, {Resource.COMPUTE: 1.0})
    free, waiting = (
        simulate(zigzag, work, heavy, barrier=barrier).seconds
        for barrier in (False, True)
    )
    assert waiting > 1.2 * free


@given(work=works(), costs=costs_drawn)
def test_looking_ahead_is_no_slower_than_one_after_the_other(work, costs):
    """Where compute alone needs the processor, so that nothing is shared but lanes."""
    ahead, reference = (simulate(emit, work, costs) for emit in (zigzag, serial))
    assert ahead.seconds <= reference.seconds * (1 + 1e-6)


@given(disk_s=seconds, compute_s=seconds, contention=contentions)
def test_two_that_begin_together_take_what_the_formula_says(
    disk_s, compute_s, contention
):
    """A step whose weights come while another computes, without end effects."""
    slow, slow_disk = contention.compute_beside_disk, contention.disk_beside_compute
    together = min(compute_s / slow, disk_s / slow_disk)
    alone = compute_s - together * slow + disk_s - together * slow_disk
    expected = together + alone
    assert contention.seconds(disk_s, compute_s) == pytest.approx(expected)


def test_weights_come_while_the_layer_before_computes():
    work = Workload(num_decoder_layers=9, gen_len=1)
    second = {Resource.DISK_READ: 1.0}
    costs = DrawnCosts(second, {}, {}, {Resource.COMPUTE: 1.0})
    assert simulate(zigzag, work, costs).seconds == pytest.approx(11)
    assert simulate(serial, work, costs).seconds == pytest.approx(20)


def test_a_cache_that_is_waited_for_overtakes_weights_that_are_not():
    """One long load of weights is under way; the cache does not wait for its end."""
    work = Workload(num_decoder_layers=2, num_batches=2, gen_len=2)
    costs = DrawnCosts(
        {Resource.DISK_READ: 10.0},
        {Resource.DISK_READ: 1.0},
        {},
        {Resource.COMPUTE: 0.0},
    )
    run = simulate(zigzag, work, costs)
    moved_s = run.busy_s[Resource.DISK_READ] + run.busy_s[Resource.DISK_WRITE]
    assert run.seconds == pytest.approx(moved_s)  # the disk is never idle


def test_a_write_that_waits_for_compute_holds_up_no_read():
    """The next cache comes while a batch computes, whose own is still to be written."""
    work = Workload(num_decoder_layers=4, num_batches=6, gen_len=3)
    # Half a second to read and half a second to write, for a second of compute.
    half = {Resource.DISK_READ: 0.5}
    costs = DrawnCosts({}, half, {}, {Resource.COMPUTE: 1.0})
    assert simulate(zigzag, work, costs).seconds == pytest.approx(
        work.gen_len * (work.num_decoder_layers + 1) * work.num_batches, rel=0.05
    )


def test_reads_and_writes_share_the_disk():
    work = Workload(num_decoder_layers=4, num_batches=6, gen_len=3)
    costs = DrawnCosts({}, {Resource.DISK_READ: 1.0}, {}, {Resource.COMPUTE: 0.0})
    run = simulate(zigzag, work, costs)
    moved_s = run.busy_s[Resource.DISK_READ] + run.busy_s[Resource.DISK_WRITE]
    assert run.seconds >= moved_s * (1 - 1e-6)
