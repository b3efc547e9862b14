"""Laws of what emitters make of prefixes, held on their streams alone."""

from collections import Counter

from hypothesis import example, given

from flexjax.schedule.emit import row_by_row
from flexjax.schedule.ops import Cache, Compute, Free, Load, Store
from tests.drawn import until, works_with_endings
from tests.schedule.test_emit import (
    SMALLEST,
    WITH_PREFIX,
    WITH_PREFIXES,
    emitters,
    is_of_prefix,
)


@emitters
@given(drawn=works_with_endings())
@example(drawn=WITH_PREFIX)
@example(drawn=WITH_PREFIXES)
def test_a_prefix_is_computed_once_a_layer_and_comes_once_a_round(emit, drawn):
    work, ends = drawn
    ops = list(emit(work, until(ends)))
    last = work.num_layers if work.scores_prefixes else work.num_decoder_layers
    caches = [op for op in ops if isinstance(getattr(op, "buffer", None), Cache)]
    for prefix in work.prefixes:
        behind = [b for b in range(work.num_batches) if work.prefix_of(b) == prefix]
        computed = [op for op in ops if is_of_prefix(op) and op.batch == prefix]
        assert computed == [Compute(0, layer, prefix) for layer in range(last)]
        lives = [ends[batch] for batch in behind]
        rounds = sum(lives) if emit is row_by_row else max(lives)
        # Nothing is kept of it that nobody comes back for.
        is_read = work.gen_len * (len(behind) if emit is row_by_row else 1) > 1
        for layer in range(work.num_decoder_layers):
            of_this = [op for op in caches if op.buffer == Cache(layer, prefix)]
            count = Counter(map(type, of_this))
            assert count == +Counter({Load: rounds - 1, Store: is_read, Free: rounds})
    assert {op.batch for op in ops if is_of_prefix(op)} == set(work.prefixes)


def test_batches_begin_with_the_prefix_whose_end_comes_next():
    work = WITH_PREFIXES[0]
    assert [work.prefix_of(batch) for batch in range(5)] == [-1, -1, -2, -3, -3]
    assert work.prefix_of(-2) is None
    assert SMALLEST[0].prefix_of(0) is None
