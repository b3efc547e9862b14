"""Weights come as far ahead as is told, and no sooner."""

import dataclasses

from hypothesis import example, given

from flexjax.schedule.emit import row_by_row, zigzag
from flexjax.schedule.ops import Compute, Free, Load, Weights, is_prefix
from tests.drawn import until, works, works_with_endings
from tests.schedule.test_emit import (
    FAR_AHEAD,
    LONE_BATCH,
    SMALL_BLOCKS,
    gaps,
    loads,
    looking_ahead,
)


@given(drawn=works_with_endings())
@example(drawn=LONE_BATCH)
@example(drawn=FAR_AHEAD)
@example(drawn=SMALL_BLOCKS)
def test_zigzag_asks_for_the_next_layers_while_batches_of_this_one_wait(drawn):
    work, ends = drawn
    asked = {}
    for op in zigzag(work, until(ends)):
        match op:
            case Load(Weights(layer), step):
                asked[layer] = step
            case Compute(step, layer, batch) if not is_prefix(batch):
                first = min(b for b, end in enumerate(ends) if end > step)
                last, most = (work.last_ahead(layer - late) for late in (1, 0))
                last += batch != first and last < most
                for visit in range(layer, last + 1):
                    more, next_layer = divmod(visit, work.num_layers)
                    if step + more < work.gen_len:
                        assert asked[next_layer] == step + more


@looking_ahead
@given(drawn=works_with_endings())
@example(drawn=FAR_AHEAD)
@example(drawn=SMALL_BLOCKS)
def test_looking_further_ahead_changes_only_when_weights_come_and_go(emit, drawn):
    work, ends = drawn

    def without_weights(work):
        return [
            op
            for op in emit(work, until(ends))
            if isinstance(op, Compute) or not isinstance(op.buffer, Weights)
        ]

    nearer = dataclasses.replace(work, layers_ahead=1)
    assert without_weights(work) == without_weights(nearer)


@looking_ahead
@given(work=works())
@example(work=FAR_AHEAD[0])
@example(work=SMALL_BLOCKS[0])
def test_weights_come_as_far_ahead_as_is_told_and_go_in_order(emit, work):
    """Layers are visited round and round; each visit loads what there is room for."""
    num_visits = work.gen_len * work.num_layers
    if emit is row_by_row:
        num_visits *= work.num_batches
    loaded, freed = [], []
    for op in emit(work):
        match op:
            case Load(Weights() as weights):
                loaded.append(weights)
            case Free(Weights() as weights):
                freed.append(weights)
            case Compute(step, layer, batch) if not is_prefix(batch):
                visit = step * work.num_layers + layer
                if emit is row_by_row:
                    visit += batch * work.gen_len * work.num_layers
                least = min(num_visits, work.last_ahead(visit - 1) + 1)
                most = min(num_visits, work.last_ahead(visit) + 1)
                assert work.num_parts * least <= len(loaded) <= work.num_parts * most
    expected = [
        Weights(visit % work.num_layers, part)
        for visit in range(num_visits)
        for part in range(work.num_parts)
    ]
    assert loaded == expected
    assert freed == expected


@given(drawn=works_with_endings())
@example(drawn=LONE_BATCH)
@example(drawn=FAR_AHEAD)
@example(drawn=SMALL_BLOCKS)
def test_zigzag_spreads_weights_so_that_no_cache_waits_behind_a_lump(drawn):
    work, ends = drawn
    for cell, after, between in gaps(list(zigzag(work, until(ends)))):
        # Who lives to see a step is known once its first layer is issued.
        known = cell.layer > 0 or len(set(ends)) == 1
        if cell.layer == after.layer and known:
            sharing = sum(end > cell.step for end in ends)
            new = work.last_ahead(cell.layer) - work.last_ahead(cell.layer - 1)
            most = -(-new * work.num_parts // sharing)
            assert len(loads(between, Weights)) <= most
