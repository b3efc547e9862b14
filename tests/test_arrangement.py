"""Prompts are put into blocks, and batches behind what they begin with."""

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexjax.arrangement import Group, blocks_of, one_block, shape_of, within
from flexjax.policy import Policy


@st.composite
def groups_drawn(draw):
    """Groups of all places in turn, and lengths of prompts that are long enough."""
    counts = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    shared = [draw(st.sampled_from([0, 5, 40])) for _ in counts]
    ends = list(itertools.accumulate(counts))
    places = [range(end - count, end) for count, end in zip(counts, ends, strict=True)]
    lengths = [draw(st.integers(41, 99)) for _ in range(ends[-1])]
    return list(map(Group, shared, places)), lengths


policies = st.builds(
    Policy, batch_size=st.integers(1, 5), num_batches=st.integers(1, 4)
)


@given(drawn=groups_drawn(), policy=policies)
def test_every_prompt_has_its_place_behind_what_it_shares(drawn, policy):
    groups, lengths = drawn
    blocks = blocks_of(groups, lengths, policy)
    places = sorted(place for block in blocks for place in block.rows)
    assert places == list(range(len(lengths)))
    group_of = {place: group for group in groups for place in group.places}
    for block in blocks:
        assert block.batch_size <= policy.batch_size
        assert 1 <= len(block.batches) == block.prefix_ends[-1] <= policy.num_batches
        assert len(block.num_shared) == len(block.prefix_ends)
        firsts = (0, *block.prefix_ends)
        spared = 0
        for first, end, count in zip(
            firsts, firsts[1:], block.num_shared, strict=False
        ):
            behind = [place for batch in block.batches[first:end] for place in batch]
            (group,) = {id(group_of[place]) for place in behind}
            assert group_of[behind[0]].num_shared == count
            spared += count * (len(behind) - 1)
            assert id(group_of[behind[0]]) == group
        assert block.num_spared == spared
        for number, batch in enumerate(block.batches):
            assert 1 <= len(batch) <= block.batch_size
            assert block.shared_by(number) == group_of[batch[0]].num_shared
        # All share something, or none does: else rows would be padded for nothing.
        assert len({count > 0 for count in block.num_shared}) == 1
    # Of a block, longer rows come first, group by group.
    for group in groups:
        mine = [p for block in blocks for p in block.rows if group_of[p] is group]
        assert [lengths[p] for p in mine] == sorted(
            (lengths[p] for p in group.places), reverse=True
        )


@given(
    policy=policies,
    num_groups=st.integers(2, 6),
    each=st.integers(1, 9),
)
def test_a_planned_block_is_shaped_as_one_of_like_groups(policy, num_groups, each):
    groups = [
        Group(5, range(first, first + each))
        for first in range(0, num_groups * each, each)
    ]
    policy = dataclasses.replace(policy, batch_size=min(policy.batch_size, each))
    blocks = blocks_of(groups, [50] * num_groups * each, policy)
    batch_size = blocks[0].batch_size
    whole = [block for block in blocks if len(block.batches) == policy.num_batches]
    planned = shape_of(policy, batch_size * policy.num_batches, each)
    if whole:
        assert whole[0].shape == planned


def test_all_alike_is_one_block_after_the_other():
    policy = Policy(batch_size=2, num_batches=2)
    lengths = [7, 9, 8, 10, 6]
    first, second = blocks_of([Group(3, range(5))], lengths, policy)
    assert first == one_block([3, 1, 2, 0], policy, 3)
    assert second == one_block([4], policy, 3)
    assert first.shape == shape_of(policy, 4)
    assert second.shape == shape_of(policy, 1)
    assert first.of("abcd").rows == list("abcd")


@pytest.mark.parametrize(
    ("num_rows", "alike", "expected"),
    [
        (6, 0, (2, 3, (3,))),
        (6, 2, (2, 3, (1, 2, 3))),
        (6, 4, (2, 3, (2, 3))),
        (6, 1, (2, 3, (1, 2, 3))),
        (6, 9, (2, 3, (3,))),
        (1, 4, (1, 1, (1,))),
    ],
)
def test_a_shape_is_of_rows_of_which_so_many_begin_alike(num_rows, alike, expected):
    assert shape_of(Policy(batch_size=2, num_batches=3), num_rows, alike) == expected


def test_groups_of_some_places_are_counted_as_these_are():
    groups = [Group(5, [0, 3, 4]), Group(0, [1]), Group(7, [2, 5])]
    assert within(groups, [5, 4, 0]) == [Group(5, [2, 1]), Group(7, [0])]
