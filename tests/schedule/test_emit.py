"""Laws of the three emitters, held on their streams alone."""

import dataclasses
import itertools
from collections import Counter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flexjax.policy import Schedule
from flexjax.schedule.check import check
from flexjax.schedule.emit import (
    EMITTERS,
    always,
    hidden_stays,
    row_by_row,
    serial,
    zigzag,
)
from flexjax.schedule.ops import (
    Cache,
    Cell,
    Compute,
    Free,
    Hidden,
    Load,
    Store,
    Weights,
    is_prefix,
)
from flexjax.workload import Workload
from tests.drawn import until, works, works_with_endings

emitters = pytest.mark.parametrize("emit", EMITTERS.values(), ids=list(EMITTERS))
looking_ahead = pytest.mark.parametrize("emit", [row_by_row, zigzag])

# The smallest run, one that only scores, three of four batches ending early, and the
# same with the weights of all other layers on their way.
SMALLEST = Workload(num_decoder_layers=1), [1]
WITH_PREFIX = (
    Workload(
        num_decoder_layers=2, num_batches=2, gen_len=2, prefix_len=32, prefix_ends=(2,)
    ),
    [2, 1],
)
WITH_PREFIXES = (
    Workload(
        num_decoder_layers=2,
        num_batches=5,
        gen_len=3,
        prefix_len=32,
        prefix_ends=(2, 3, 5),
    ),
    [1, 2, 3, 1, 2],
)
SCORING = Workload(num_decoder_layers=2, num_head_blocks=2, num_batches=3), [1, 1, 1]
LONE_BATCH = (
    Workload(num_decoder_layers=2, num_parts=4, num_batches=4, gen_len=4),
    [4, 1, 1, 2],
)
FAR_AHEAD = dataclasses.replace(LONE_BATCH[0], layers_ahead=2), LONE_BATCH[1]
SMALL_BLOCKS = (
    dataclasses.replace(FAR_AHEAD[0], num_head_blocks=5, blocks_per_layer=2),
    LONE_BATCH[1],
)


def is_of_prefix(op):
    return isinstance(op, Compute) and is_prefix(op.batch)


def cells(ops):
    """Those of the batches."""
    return [
        Cell(op.step, op.layer, op.batch)
        for op in ops
        if isinstance(op, Compute) and not is_of_prefix(op)
    ]


def loads(ops, noun):
    return [op for op in ops if isinstance(op, Load) and isinstance(op.buffer, noun)]


def gaps(ops):
    """For each pair of batches' cells in a row: both, and the ops between them."""
    ops = [op for op in ops if not is_of_prefix(op)]
    places = [i for i, op in enumerate(ops) if isinstance(op, Compute)]
    for (first, second), (cell, after) in zip(
        itertools.pairwise(places), itertools.pairwise(cells(ops)), strict=True
    ):
        yield cell, after, ops[first + 1 : second]


def test_every_schedule_has_its_emitter():
    assert list(EMITTERS) == list(Schedule)


def test_serial_reads_as_the_loop_it_is():
    work = Workload(num_decoder_layers=1, gen_len=2)
    cache, hidden = Cache(0, 0), Hidden(0)
    assert list(serial(work)) == [
        Load(Weights(0), 0),
        Load(hidden, 0),
        Compute(0, 0, 0),
        Store(cache, 0),
        Store(hidden, 0),
        Free(cache),
        Free(hidden),
        Free(Weights(0)),
        Load(Weights(1), 0),
        Load(hidden, 0),
        Compute(0, 1, 0),
        Free(hidden),
        Free(Weights(1)),
        Load(Weights(0), 1),
        Load(cache, 1),
        Load(hidden, 1),
        Compute(1, 0, 0),
        Store(hidden, 1),  # nobody reads the cache of the last step
        Free(cache),
        Free(hidden),
        Free(Weights(0)),
        Load(Weights(1), 1),
        Load(hidden, 1),
        Compute(1, 1, 0),
        Free(hidden),
        Free(Weights(1)),
    ]


def test_zigzag_serves_every_batch_before_the_next_layer():
    work = Workload(num_decoder_layers=1, num_batches=2, gen_len=2)
    assert cells(zigzag(work)) == [
        (0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1),
        (1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1),
    ]  # fmt: skip


def test_row_by_row_ends_a_batch_before_the_next():
    work = Workload(num_decoder_layers=1, num_batches=2, gen_len=2)
    assert cells(row_by_row(work)) == [
        (0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0),
        (0, 0, 1), (0, 1, 1), (1, 0, 1), (1, 1, 1),
    ]  # fmt: skip


@emitters
@given(drawn=works_with_endings())
@example(drawn=SMALLEST)
@example(drawn=SCORING)
@example(drawn=LONE_BATCH)
@example(drawn=FAR_AHEAD)
@example(drawn=SMALL_BLOCKS)
@example(drawn=WITH_PREFIX)
@example(drawn=WITH_PREFIXES)
def test_every_stream_is_sound_whenever_batches_end(emit, drawn):
    work, ends = drawn
    check(emit(work, until(ends)), work)


@emitters
@given(drawn=works_with_endings())
def test_all_emitters_compute_the_same_cells_each_batch_in_order(emit, drawn):
    work, ends = drawn
    computed = cells(emit(work, until(ends)))
    assert set(computed) == set(cells(serial(work, until(ends))))
    for batch, end in enumerate(ends):
        expected = itertools.product(range(end), range(work.num_layers), [batch])
        assert [cell for cell in computed if cell.batch == batch] == list(expected)


@given(work=works())
def test_zigzag_loads_weights_once_a_step(work):
    expected = {
        Load(Weights(layer, part), step): 1
        for step in range(work.gen_len)
        for layer in range(work.num_layers)
        for part in range(work.num_parts)
    }
    assert Counter(loads(zigzag(work), Weights)) == expected


@given(work=works())
def test_row_by_row_loads_weights_once_a_step_and_batch(work):
    expected = {
        Load(Weights(layer, part), step): work.num_batches
        for step in range(work.gen_len)
        for layer in range(work.num_layers)
        for part in range(work.num_parts)
    }
    assert Counter(loads(row_by_row(work), Weights)) == expected


@looking_ahead
@given(drawn=works_with_endings())
@example(drawn=LONE_BATCH)
@example(drawn=FAR_AHEAD)
@example(drawn=SMALL_BLOCKS)
def test_an_early_end_wastes_one_load_of_the_layers_ahead_at_most(emit, drawn):
    work, ends = drawn
    needed, most = max(ends), work.gen_len
    if emit is row_by_row:
        needed, most = sum(ends), work.gen_len * work.num_batches
    loaded = Counter(op.buffer for op in loads(emit(work, until(ends)), Weights))
    assert len(loaded) == work.num_layers * work.num_parts
    layers_ahead = work.last_ahead(work.num_layers - 1) - work.num_layers + 1
    for weights, count in loaded.items():
        is_ahead = weights.layer < layers_ahead and needed < most
        assert count - needed == is_ahead


@looking_ahead
@given(drawn=works_with_endings())
@example(drawn=LONE_BATCH)
@example(drawn=FAR_AHEAD)
@example(drawn=SMALL_BLOCKS)
def test_while_a_cell_computes_all_transfers_of_the_next_are_under_way(emit, drawn):
    """What waits for the cell comes after every load of weights and cache."""
    work, ends = drawn
    for cell, after, between in gaps(list(emit(work, until(ends)))):
        used = Hidden(cell.batch), Cache(cell.layer, cell.batch)
        waits = [i for i, op in enumerate(between) if op in map(Free, used)]
        starts = [
            i
            for i, op in enumerate(between)
            if isinstance(op, Load) and not isinstance(op.buffer, Hidden)
        ]
        assert max(starts, default=-1) < min(waits, default=len(between))
        wants_cache = after.step > 0 and work.is_decoder(after.layer)
        cache = Load(Cache(after.layer, after.batch), after.step)
        assert between.count(cache) == wants_cache


@looking_ahead
@given(drawn=works_with_endings())
@example(drawn=LONE_BATCH)
@example(drawn=FAR_AHEAD)
@example(drawn=SMALL_BLOCKS)
def test_a_hidden_state_that_the_next_cell_goes_on_with_stays(emit, drawn):
    """And nothing waits for a cell before the next of its batch is issued."""
    work, ends = drawn
    for cell, after, between in gaps(list(emit(work, until(ends)))):
        if (cell.step, cell.batch) == (after.step, after.batch):
            buffers = {op.buffer for op in between}
            assert Hidden(cell.batch) not in buffers
            assert Free(Cache(cell.layer, cell.batch)) not in between


@given(work=works(), schedule=st.sampled_from(Schedule))
def test_whether_hidden_states_stay_is_known_beforehand(work, schedule):
    ops = list(EMITTERS[schedule](work, always))
    stored = any(isinstance(op, Store) and op.buffer == Hidden(0) for op in ops)
    assert stored != hidden_stays(schedule, work)


@emitters
@given(drawn=works_with_endings())
@example(drawn=LONE_BATCH)
@example(drawn=FAR_AHEAD)
@example(drawn=SMALL_BLOCKS)
def test_few_of_each_are_staged_at_most_and_nothing_in_the_end(emit, drawn):
    """The layers ahead and one more, two caches and two hidden states.

    And as many caches of prefixes, and the hidden states of all.
    """
    work, ends = drawn
    layer_size = work.blocks_per_layer
    most = 1 if emit is serial else work.layers_ahead + 1
    staged = set()
    for op in emit(work, until(ends)):
        match op:
            case Load(buffer):
                staged.add(buffer)
            case Compute(_, layer, batch) if work.is_decoder(layer):
                staged.add(Cache(layer, batch))
            case Free(buffer):
                staged.remove(buffer)
        layers = {buffer.layer for buffer in staged if isinstance(buffer, Weights)}
        sizes = [layer_size if work.is_decoder(layer) else 1 for layer in layers]
        assert sum(sizes) <= most * layer_size
        count = Counter(
            (type(buffer), is_prefix(buffer.batch))
            for buffer in staged
            if not isinstance(buffer, Weights)
        )
        states = count.pop((Hidden, True), 0)
        assert max(count.values(), default=0) <= 2
        assert states <= (1 if emit is row_by_row else len(work.prefixes))
    assert not staged


@emitters
@given(drawn=works_with_endings())
def test_who_is_alive_is_asked_once_and_when_it_can_be_known(emit, drawn):
    work, ends = drawn
    done, asked = set(), []

    def alive(step, batch):
        if step > 0 and ends[batch] >= step:
            assert Cell(step - 1, work.num_layers - 1, batch) in done
        asked.append((step, batch))
        return step < ends[batch]

    for op in emit(work, alive):
        if isinstance(op, Compute) and not is_of_prefix(op):
            done.add(Cell(op.step, op.layer, op.batch))
    assert len(asked) == len(set(asked))
    assert {(cell.step, cell.batch) for cell in done} <= set(asked)


@given(drawn=works_with_endings())
@example(drawn=LONE_BATCH)
@example(drawn=FAR_AHEAD)
@example(drawn=SMALL_BLOCKS)
def test_zigzag_waits_for_tokens_with_work_under_way(drawn):
    """With the batch before, or the weights of the first layer."""
    work, ends = drawn
    issued = []

    def alive(step, batch):
        if 0 < step <= max(ends):
            living = [b for b in range(batch) if ends[b] > step]
            if living:
                assert Compute(step, 0, living[-1]) in issued
            else:
                parts = range(work.num_parts)
                assert {Load(Weights(0, part), step) for part in parts} <= {*issued}
        return step < ends[batch]

    for op in zigzag(work, alive):
        issued += [op]
