"""Laws of the shape of a run, and of the buckets that bound compilations."""

import dataclasses

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flexjax.workload import Workload, bucket, padded_alike
from tests.drawn import works

lengths = st.integers(1, 200_000)


@given(lengths)
def test_a_bucket_has_room_and_is_its_own_bucket(length):
    assert bucket(length) >= length
    assert bucket(bucket(length)) == bucket(length)
    assert bucket(length) % 32 == 0


@given(lengths)
def test_a_longer_sequence_has_no_smaller_bucket(length):
    assert bucket(length) <= bucket(length + 1)


@given(lengths)
def test_at_most_an_eighth_of_a_long_bucket_is_padding(length):
    assert bucket(length) - length < max(32, bucket(length) / 8)


@pytest.mark.parametrize("power", range(5, 15))
def test_few_buckets_lie_between_two_powers_of_two(power):
    lengths = range(2**power + 1, 2 ** (power + 1) + 1)
    assert len({bucket(length) for length in lengths}) <= 8


@given(lengths=st.lists(st.integers(1, 5000), min_size=1, max_size=9))
def test_batches_are_padded_to_few_lengths_none_beyond_the_longest(lengths):
    padded = padded_alike(lengths)
    assert max(padded) == bucket(max(lengths))
    for length, slots in zip(lengths, padded, strict=True):
        assert length <= slots <= max(64, 1.5 * length)
    between = {slots for slots in padded if 512 < slots <= 1024}
    assert len(between - {max(padded)}) <= 2


@pytest.mark.parametrize("length", [0, -1])
def test_nothing_has_no_bucket(length):
    with pytest.raises(ValueError, match=f"a length of {length} has no bucket"):
        bucket(length)


@given(work=works(most_tokens=100))
def test_every_step_begins_where_the_one_before_ended(work):
    ends = [work.past_len(step) + work.seq_len(step) for step in range(work.gen_len)]
    assert work.past_len(0) == 0
    assert [work.past_len(step) for step in range(1, work.gen_len)] == ends[:-1]
    assert ends == list(range(work.prompt_len, work.prompt_len + work.gen_len))
    for batch in range(work.num_batches):
        first = work.prompt_lens[batch] if work.prompt_lens else work.prompt_len
        alone = dataclasses.replace(work, prompt_len=first, prompt_lens=())
        for step in range(work.gen_len):
            for name in ("seq_len", "past_len", "cache_slots"):
                of_batch = getattr(work, name)(step, batch)
                assert of_batch == getattr(alone, name)(step)


@given(work=works(most_tokens=100))
@example(work=Workload(num_decoder_layers=1, prompt_len=31, gen_len=2))
def test_the_cache_has_room_for_what_is_stored_and_never_shrinks(work):
    slots = [work.cache_slots(step) for step in range(work.gen_len)]
    assert slots == sorted(slots)
    for step, room in enumerate(slots):
        assert room >= work.past_len(step) + work.seq_len(step)
        assert room == bucket(room)
    assert slots[-1] <= bucket(work.prompt_len + work.gen_len - 1)
    if work.reserves:
        assert len(set(slots)) == 1
    else:
        whole = dataclasses.replace(work, reserves=True)
        assert {whole.cache_slots(step) for step in range(work.gen_len)} == {slots[-1]}


@given(work=works())
def test_a_cache_is_kept_exactly_while_a_later_step_reads_it(work):
    kept = [work.keeps_cache(step) for step in range(work.gen_len)]
    assert kept == [True] * (work.gen_len - 1) + [False]


@given(work=works())
def test_layers_are_decoder_layers_then_blocks_of_the_vocabulary(work):
    decoders = [work.is_decoder(layer) for layer in range(work.num_layers)]
    assert decoders == [True] * work.num_decoder_layers + [False] * work.num_head_blocks


@given(work=works(), visit=st.integers(-1, 30))
@example(work=Workload(num_decoder_layers=1, num_head_blocks=9), visit=0)
def test_as_much_is_ahead_as_takes_no_more_than_so_many_decoder_layers(work, visit):
    def size(visit):
        is_decoder = work.is_decoder(visit % work.num_layers)
        return work.blocks_per_layer if is_decoder else 1

    room = work.layers_ahead * work.blocks_per_layer
    last = work.last_ahead(visit)
    assert sum(size(each) for each in range(visit + 1, last + 1)) <= room
    is_round = last + 1 == visit + work.num_layers  # the next would be its own again
    assert is_round or sum(map(size, range(visit + 1, last + 2))) > room
    assert visit + work.layers_ahead <= last < visit + work.num_layers
