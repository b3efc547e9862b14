"""Laws of `peak_bytes`, on footprints whose sizes are made up."""

import dataclasses
import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexjax.policy import Kind, Tier
from flexjax.schedule.emit import EMITTERS, row_by_row, serial, zigzag
from flexjax.schedule.footprint import by_tier, peak_bytes
from flexjax.schedule.ops import Cache, Compute, Free, Hidden, Load, Store, Weights
from flexjax.workload import Workload
from tests.drawn import until, works, works_with_endings

WEIGHTS = Tier.DEVICE, Kind.WEIGHTS
CACHE = Tier.DEVICE, Kind.KV_CACHE
HIDDEN = Tier.DEVICE, Kind.ACTIVATIONS
CACHE_HOME = Tier.HOST, Kind.KV_CACHE
HIDDEN_HOME = Tier.DISK, Kind.ACTIVATIONS

emitters = pytest.mark.parametrize("emit", EMITTERS.values(), ids=list(EMITTERS))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """A footprint of a few numbers; the cache grows with the steps it holds."""

    resident_bytes: int = 0
    part_bytes: int = 0
    cache_bytes: int = 0  # of one step
    hidden_bytes: int = 0
    workspace_bytes: int = 0
    home: Tier = Tier.HOST

    def resident(self):
        return {(self.home, Kind.WEIGHTS): self.resident_bytes}

    def loaded(self, buffer, step):
        match buffer:
            case Weights(layer):
                return {WEIGHTS: self.part_bytes * (1 + layer)}
            case Cache():
                return {CACHE: step * self.cache_bytes}
            case Hidden():
                return {HIDDEN: self.hidden_bytes}

    def computed(self, cell):
        return {
            Cache(cell.layer, cell.batch): {CACHE: self.cache_bytes},
            Hidden(cell.batch): {HIDDEN: self.hidden_bytes},
        }

    def workspace(self, cell):
        return {HIDDEN: self.workspace_bytes * (1 + abs(cell.batch))}

    def stored(self, buffer, step):
        if isinstance(buffer, Cache):
            return {(self.home, Kind.KV_CACHE): (step + 1) * self.cache_bytes}
        return {HIDDEN_HOME: self.hidden_bytes}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderSizes(Sizes):
    """The same for a workload whose vocabulary blocks make no buffers."""

    work: Workload

    def computed(self, cell):
        return super().computed(cell) if self.work.is_decoder(cell.layer) else {}


def sizes(work):
    nbytes = st.integers(0, 1000)
    return st.builds(
        DecoderSizes,
        resident_bytes=nbytes,
        part_bytes=nbytes,
        cache_bytes=nbytes,
        hidden_bytes=nbytes,
        workspace_bytes=nbytes,
        home=st.sampled_from(Tier),
        work=st.just(work),
    )


def lives(ops, footprint):
    """Everything that is ever held: its bytes, and from which op up to which."""
    never = len(ops)

    def next_op(kind, buffer, after):
        return next(
            (
                i
                for i in range(after + 1, never)
                if isinstance(ops[i], kind) and ops[i].buffer == buffer
            ),
            never,
        )

    def anew(buffer, after):
        """When a later call has made it again."""
        return next(
            (
                i + 1
                for i in range(after + 1, never)
                if isinstance(ops[i], Compute) and buffer in footprint.computed(ops[i])
            ),
            never,
        )

    yield footprint.resident(), 0, never
    for i, op in enumerate(ops):
        match op:
            case Load(buffer, step):
                yield footprint.loaded(buffer, step), i, next_op(Free, buffer, i)
            case Compute():
                for buffer, nbytes in footprint.computed(op).items():
                    yield nbytes, i, min(next_op(Free, buffer, i), anew(buffer, i))
                yield footprint.workspace(op), i, i + 1
            case Store(buffer, step):
                again = next_op(Store, buffer, i)
                yield footprint.stored(buffer, step), i, next_op(Free, buffer, again)


def reference(ops, footprint):
    """What is held at every moment, added up from nothing."""
    held = list(lives(ops, footprint))
    peak = Counter()
    for now in range(len(ops)):
        peak |= sum(
            (Counter(nbytes) for nbytes, start, end in held if start <= now < end),
            Counter(),
        )
    return dict(peak)


def positive(peak):
    return {key: nbytes for key, nbytes in peak.items() if nbytes}


@emitters
@given(drawn=works_with_endings(), data=st.data())
def test_the_peak_is_what_adding_up_every_moment_gives(emit, drawn, data):
    work, ends = drawn
    ops = list(emit(work, until(ends)))
    footprint = data.draw(sizes(work))
    assert positive(peak_bytes(ops, footprint)) == reference(ops, footprint)


@emitters
@given(work=works(), data=st.data())
def test_the_peak_grows_with_the_batch(emit, work, data):
    one = data.draw(sizes(work))
    peaks = [
        peak_bytes(
            emit(work),
            dataclasses.replace(
                one,
                cache_bytes=rows * one.cache_bytes,
                hidden_bytes=rows * one.hidden_bytes,
                workspace_bytes=rows * one.workspace_bytes,
            ),
        )
        for rows in (1, 2, 3)
    ]
    for fewer, more in itertools.pairwise(peaks):
        assert Counter(fewer) <= Counter(more)


@given(work=works(), data=st.data())
def test_looking_ahead_costs_memory_and_running_serially_never_does(work, data):
    footprint = data.draw(sizes(work))
    least = Counter(peak_bytes(serial(work), footprint))
    if work.num_batches == 1:
        del least[HIDDEN_HOME]  # a batch that is alone leaves the device for nobody
    assert least <= Counter(peak_bytes(zigzag(work), footprint))


ONE_LAYER = Workload(num_decoder_layers=1)


@pytest.mark.parametrize("emit", [row_by_row, zigzag])
def test_serial_holds_the_largest_layer_and_looking_ahead_holds_those_ahead(emit):
    work = Workload(num_decoder_layers=2)  # layers of 10, 20 and 30 bytes
    footprint = Sizes(part_bytes=10)
    assert peak_bytes(serial(work), footprint)[WEIGHTS] == 30
    assert peak_bytes(emit(work), footprint)[WEIGHTS] == 50
    further = dataclasses.replace(work, layers_ahead=2)
    assert peak_bytes(serial(further), footprint)[WEIGHTS] == 30
    assert peak_bytes(emit(further), footprint)[WEIGHTS] == 60


@emitters
@given(work=works(), data=st.data())
def test_looking_further_ahead_never_needs_less(emit, work, data):
    footprint = data.draw(sizes(work))
    nearer = dataclasses.replace(work, layers_ahead=1)
    least = Counter(peak_bytes(emit(nearer), footprint))
    assert least <= Counter(peak_bytes(emit(work), footprint))


def test_what_is_resident_is_there_all_the_time():
    footprint = Sizes(resident_bytes=7, part_bytes=10, home=Tier.DEVICE)
    assert peak_bytes([], footprint) == {WEIGHTS: 7}
    assert peak_bytes(serial(ONE_LAYER), footprint)[WEIGHTS] == 7 + 20


def test_a_workspace_is_there_only_while_its_cell_runs():
    ops = [Compute(0, 0, batch) for batch in range(2)]
    assert peak_bytes(ops, Sizes(workspace_bytes=5)) == {HIDDEN: 10}


def test_a_loaded_buffer_and_what_is_made_of_it_are_both_held_until_its_free():
    ops = [Load(Hidden(0), 0), Compute(0, 0, 0), Free(Hidden(0)), Load(Hidden(1), 0)]
    assert peak_bytes(ops, Sizes(hidden_bytes=3)) == {HIDDEN: 6}


def test_a_home_that_is_written_anew_counts_twice_until_the_free():
    footprint, cache = Sizes(cache_bytes=10), Cache(0, 0)
    first = [Compute(0, 0, 0), Store(cache, 0), Free(cache)]
    assert peak_bytes(first, footprint)[CACHE_HOME] == 10
    second = [Load(cache, 1), Compute(1, 0, 0), Store(cache, 1), Free(cache)]
    assert peak_bytes([*first, *second], footprint)[CACHE_HOME] == 10 + 20
    third = [Load(cache, 2), Compute(2, 0, 0), Store(cache, 2), Free(cache)]
    assert peak_bytes([*first, *second, *third], footprint)[CACHE_HOME] == 20 + 30


def test_every_batch_has_a_home_but_few_have_a_place_on_the_device():
    work = Workload(num_decoder_layers=3, num_batches=4, gen_len=2)
    for emit, staged in ((serial, 1), (row_by_row, 2), (zigzag, 2)):
        peak = peak_bytes(emit(work), DecoderSizes(cache_bytes=1, work=work))
        assert peak[CACHE_HOME] == 3 * 4
        assert peak[CACHE] == 2 * staged  # what came, and one step more


def test_a_tier_needs_the_sum_over_its_kinds():
    sizes = {WEIGHTS: 100, CACHE: 20, HIDDEN: 3, CACHE_HOME: 5}
    assert by_tier(sizes) == {Tier.DEVICE: 123, Tier.HOST: 5, Tier.DISK: 0}


@given(
    st.dictionaries(
        st.tuples(st.sampled_from(Tier), st.sampled_from(Kind)), st.integers(0, 9)
    )
)
def test_nothing_is_lost_between_kinds_and_tiers(sizes):
    total = by_tier(sizes)
    assert sum(total.values()) == sum(sizes.values())
    assert list(total) == list(Tier)
