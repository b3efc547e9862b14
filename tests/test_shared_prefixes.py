"""Which prompts begin alike is found, and only where that is worth it."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexjax import shared_prefixes
from flexjax.arrangement import Group, row_length
from flexjax.shared_prefixes import SharedPrefixes, rows_of

NUMBERS = np.random.default_rng(0)


def tokens(count):
    return NUMBERS.integers(4, 50_000, count).tolist()


def groups_of(prompts, gen_len=1, batch_size=None):
    tree = SharedPrefixes()
    for prompt in prompts:
        tree.add(prompt)
    return tree.groups(gen_len, batch_size)


def as_sets(groups):
    return {(group.num_shared, frozenset(group.places)) for group in groups}


def of_subjects(sizes, begin, own=30):
    """Prompts of subjects in turn, and the places of each one's."""
    begins = [tokens(count) for count in begin]
    order = [
        subject
        for turn in range(max(sizes))
        for subject, size in enumerate(sizes)
        if turn < size
    ]
    places = [
        [place for place, other in enumerate(order) if other == subject]
        for subject in range(len(sizes))
    ]
    return [begins[subject] + tokens(own) for subject in order], places


prompts_drawn = st.lists(
    st.lists(st.sampled_from([[4], [5, 5], [6, 6, 6]]), min_size=1, max_size=6).map(
        lambda parts: list(itertools.chain(*parts))
    ),
    max_size=12,
)


@given(
    prompts=prompts_drawn,
    least=st.integers(1, 6),
    most_kept=st.sampled_from([0, 150, 10_000]),
    new=st.integers(0, 8),
    batch_size=st.integers(1, 9),
)
def test_each_prompt_is_in_one_group_that_begins_as_it_does(
    prompts, least, most_kept, new, batch_size
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_prefixes, "LEAST_SHARED", least)
        patch.setattr(shared_prefixes, "MOST_KEPT", most_kept)
        patch.setattr(shared_prefixes, "TOKENS_OF_A_NEW_ONE", new)
        patch.setattr(shared_prefixes, "TOKENS_OF_A_PASS", new)
        groups = groups_of(prompts, 1, batch_size)
    places = sorted(place for group in groups for place in group.places)
    assert places == list(range(len(prompts)))
    for count, of_group in groups:
        assert count == 0 or (count >= least and len(of_group) > 1)
        assert len({tuple(prompts[place][:count]) for place in of_group}) <= 1
        # The last token of a prompt is its own, however much of it others have.
        assert all(len(prompts[place]) > count for place in of_group)
    if most_kept < 10_000:
        return
    # What all begin with is shared in any case, and more if that is better.
    columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
    alike = [len(set(column)) == 1 for column in columns]
    common = [*alike, False].index(False)
    if common >= least and len(prompts) > 1:
        assert all(group.num_shared for group in groups)
        assert len(groups) > 1 or groups[0].num_shared == common


def test_subjects_of_an_evaluation_are_groups():
    prompts, places = of_subjects([20, 35, 9], [300, 200, 500])
    expected = [(300, places[0]), (200, places[1]), (500, places[2])]
    assert as_sets(groups_of(prompts)) == {(n, frozenset(p)) for n, p in expected}


def test_a_group_may_go_on_from_another():
    """As where one subject of many has more examples."""
    common = tokens(100)
    more = common + tokens(400)
    prompts = [[*common, *tokens(30)] for _ in range(40)]
    prompts += [[*more, *tokens(30)] for _ in range(40)]
    assert as_sets(groups_of(prompts)) == {
        (100, frozenset(range(40))),
        (500, frozenset(range(40, 80))),
    }
    # Few that have little more are left with the others.
    prompts = prompts[:40] + [[*more[:120], *tokens(30)] for _ in range(2)]
    assert groups_of(prompts, 32) == [Group(100, range(42))]


def test_a_few_that_have_nothing_in_common_are_a_group_of_their_own_if_it_is_worth_it():
    prompts, places = of_subjects([500, 500], [300, 200])
    odd = [tokens(200) for _ in range(3)]
    found = groups_of(prompts + odd, 32)
    assert as_sets(found) == {
        (300, frozenset(places[0])),
        (200, frozenset(places[1])),
        (0, frozenset({1000, 1001, 1002})),
    }
    # Of few prompts, a block more costs what it saves.
    assert groups_of(prompts[:60] + odd, 32) == [Group(0, range(63))]
    assert groups_of(prompts[:60] + odd, 1) == [Group(0, range(63))]
    assert len(groups_of(prompts[:60] + odd, 1, 8)) == 3
    assert len(groups_of(prompts[:200] + odd, 1)) == 3


@pytest.mark.parametrize(
    ("size", "batch_size", "counts"),
    [(64, 64, [100, 100]), (4, 64, [0]), (4, 4, [100, 100])],
)
def test_batches_that_would_be_almost_empty_are_not_made(size, batch_size, counts):
    prompts, _ = of_subjects([size, size], [100, 100], own=50)
    found = groups_of(prompts, 32, batch_size)
    assert [group.num_shared for group in found] == counts


def test_the_same_prompt_is_computed_once():
    prompt = tokens(90)
    assert groups_of([prompt] * 3) == [Group(89, range(3))]


def test_no_prompt_is_lost_in_a_deep_tree():
    """Each prompt goes on from the one before it."""
    whole = tokens(3000)
    groups = groups_of([whole[:count] for count in range(70, 3001, 2)])
    assert sum(len(group.places) for group in groups) == len(range(70, 3001, 2))


def test_nothing_is_shared_with_nobody():
    assert groups_of([]) == [Group(0, range(0))]
    assert groups_of([tokens(200)]) == [Group(0, range(1))]


def chosen_of(num_questions, num_choices, *, shared=(), context=50, own=3):
    """What a task of multiple choice scores, in any order."""
    found = []
    for _ in range(num_questions):
        question = [*shared, *tokens(context)]
        found += [question + tokens(own) for _ in range(num_choices)]
    return [found[place] for place in NUMBERS.permutation(len(found))]


@given(
    prompts=prompts_drawn,
    most=st.sampled_from([4, 12, 40, 1000]),
    least=st.integers(2, 6),
    most_kept=st.sampled_from([0, 150, 10_000]),
    batch_size=st.none() | st.integers(1, 9),
)
def test_each_sequence_is_in_one_row_that_begins_as_it_does(
    prompts, most, least, most_kept, batch_size
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_prefixes, "LEAST_SHARED", least)
        patch.setattr(shared_prefixes, "MOST_KEPT", most_kept)
        patch.setattr(shared_prefixes, "TOKENS_OF_A_PASS", 0)
        patch.setattr(shared_prefixes, "PASSES_OF_A_LOAD", 0)
        rows, groups = rows_of(prompts, most, batch_size)
    lengths = list(map(len, prompts))
    places = sorted(place for row in rows for place in row.places)
    assert places == list(range(len(prompts)))
    for num_shared, of_row in rows:
        if len(of_row) > 1:
            assert row_length(Group(num_shared, of_row), lengths) <= most
            # One more is the same in all, and each has at least this one for itself.
            begins = {tuple(prompts[place][: num_shared + 1]) for place in of_row}
            assert len(begins) == 1
            assert min(lengths[place] for place in of_row) > num_shared
    assert sorted(place for group in groups for place in group.places) == list(
        range(len(rows))
    )
    for num_shared, of_group in groups:
        of_rows = [rows[place] for place in of_group]
        alike = {
            tuple(prompts[place][: num_shared + 1 if num_shared else 0])
            for row in of_rows
            for place in row.places
        }
        assert len(alike) <= 1
        assert all(row.num_shared >= num_shared for row in of_rows if row.places[1:])


def test_choices_of_a_question_share_a_row():
    sequences = chosen_of(20, 4)
    rows, groups = rows_of(sequences, 1024)
    assert [(row.num_shared, len(row.places)) for row in rows] == [(49, 4)] * 20
    assert groups == [Group(0, range(20))]


def test_questions_of_a_subject_share_a_prefix_and_their_choices_a_row():
    sequences = chosen_of(100, 4, shared=tokens(500))
    rows, groups = rows_of(sequences, 1024)
    assert [(row.num_shared, len(row.places)) for row in rows] == [(549, 4)] * 100
    assert groups == [Group(499, range(100))]


def test_many_choices_share_a_prefix_where_a_row_cannot_hold_them():
    sequences = chosen_of(1, 300, context=200)
    rows, groups = rows_of(sequences, 1024)
    assert len(rows) == 300
    assert groups == [Group(199, range(300))]


def test_what_begins_alike_by_chance_does_not_share_a_row():
    shared = tokens(100)
    # Many prompts go on with one of a few words.
    sequences = [[*shared, place % 20 + 4, *tokens(30)] for place in range(400)]
    for begin in ([], shared):
        some = [begin + sequence[100:] for sequence in sequences]
        rows, _ = rows_of(some, 1024)
        assert len(rows) == 400
