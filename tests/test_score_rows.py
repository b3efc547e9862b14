"""Sequences that share a row are scored as they are by themselves."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexjax.arrangement import Group
from flexjax.checkpoint import open_store
from flexjax.llm import LLM
from flexjax.policy import Placement, Policy, Schedule, Tier
from flexjax.sampling_params import SamplingParams
from flexjax.schedule.footprint import by_tier
from flexjax.score_rows import ScoredRow, scored_inputs
from flexjax.shared_prefixes import rows_of
from tests.cells import every_other
from tests.test_engine import PLACEMENTS, in_group, make_engine, policy_of

NUMBERS = np.random.default_rng(5)
BEGIN = NUMBERS.integers(4, 90, 20).tolist()


def question(context, *choices):
    begin = BEGIN + NUMBERS.integers(4, 90, context).tolist()
    return [begin + NUMBERS.integers(4, 90, count).tolist() for count in choices]


# Some are alone in their row, two share nearly all, and one is all that others begin
# with; what all begin with is a prefix where there is one.
QUESTIONS = [
    question(9, 1, 1, 4),
    question(3, 17),
    question(14, 2, 6),
    question(2, 3),
    question(7, 1, 1, 1, 1, 8),
]
SEQUENCES = list(itertools.chain(*QUESTIONS))
CONTEXTS = [9, 3, 14, 2, 7]
ENDS = [0, *itertools.accumulate(map(len, QUESTIONS))]
ROWS = [
    Group(len(BEGIN) + context - 1 if end - first > 1 else 0, range(first, end))
    for context, first, end in zip(CONTEXTS, ENDS, ENDS[1:], strict=False)
]


def scores_of(engine, rows, groups=()):
    """By the places of sequences, and the tokens that were spared."""
    scores = {}
    engine.score_blocks(SEQUENCES, rows, scores.update, groups=groups)
    needed = by_tier(engine.times.predicted_peak)
    for tier in Tier:
        assert engine.ledger.peak(tier) <= needed[tier], tier
    assert sorted(scores) == list(range(len(SEQUENCES)))
    return scores, engine.times.num_shared


def assert_same(one, other, atol=2e-4) -> None:
    for place, scores in one.items():
        assert len(scores.logprobs) == len(SEQUENCES[place]) - 1
        np.testing.assert_allclose(
            scores.logprobs, other[place].logprobs, atol=atol, rtol=0
        )
        np.testing.assert_array_equal(scores.is_greedy, other[place].is_greedy)


CELLS = [
    *every_other(itertools.product(PLACEMENTS, [Schedule.ZIGZAG], [(2, 2)])),
    *itertools.product(["disk"], [Schedule.SERIAL, Schedule.ROW_BY_ROW], [(3, 2)]),
]


@pytest.mark.parametrize(
    ("placement", "schedule", "shape"), [in_group("scores", *cell) for cell in CELLS]
)
def test_sharing_a_row_changes_no_score(placement, schedule, shape, golden, tmp_path):
    policy = policy_of(PLACEMENTS[placement], schedule, shape)
    engine = make_engine(open_store(golden("opt-pre-ln").store), policy, tmp_path)
    try:
        alone, spared = scores_of(engine, [Group(0, [i]) for i in range(ENDS[-1])])
        assert spared == 0
        shared, spared = scores_of(engine, ROWS)
        assert spared == 2 * 28 + 33 + 4 * 26
        assert_same(alone, shared)
        # Behind a prefix, the rows of which are those that some sequences share too.
        behind, spared = scores_of(
            engine, ROWS, [Group(19, [0, 2, 3]), Group(17, [1, 4])]
        )
        assert spared > 2 * 28 + 33 + 4 * 26
        assert_same(alone, behind)
    finally:
        engine.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["opt-post-ln-projected", "opt-gelu-no-bias"])
@pytest.mark.parametrize("kv_cache_bits", [None, 8])
def test_sharing_a_row_changes_no_score_of_any_variant(
    name, kv_cache_bits, golden, tmp_path
):
    policy = Policy(
        weights=Placement(host=1.0),
        kv_cache=Placement(host=1.0),
        batch_size=2,
        num_batches=3,
        kv_cache_bits=kv_cache_bits,
        group_size=8,
    )
    engine = make_engine(open_store(golden(name).store), policy, tmp_path)
    try:
        alone, _ = scores_of(engine, [Group(0, [i]) for i in range(ENDS[-1])])
        for groups in ((), [Group(19, range(len(ROWS)))]):
            shared, _ = scores_of(engine, ROWS, groups)
            assert_same(alone, shared)
    finally:
        engine.close()


def test_choices_are_scored_together_and_given_away_block_by_block():
    policy = Policy(batch_size=3, num_batches=1)
    choices = [
        sequence
        for count in (30, 41, 25, 52)
        for sequence in question(count, 1, 2, 3, 0)  # the last begins all others
    ]
    rows, _ = rows_of(list(map(scored_inputs, choices)), 1024)
    assert len(rows) == 4
    with LLM(policy=policy, dtype="float32") as llm:
        calls = []
        llm.score_each(choices, on_scores=calls.append)
        assert [len(call) for call in calls] == [12, 4]
        assert llm.metrics["num_shared_tokens"] == sum(
            3 * (20 + count - 2) for count in (30, 41, 25, 52)
        )
        found = calls[0] | calls[1]
        for place, sequence in enumerate(choices):
            np.testing.assert_allclose(
                found[place].logprobs, llm.score([sequence])[0], atol=2e-4
            )


def test_the_last_token_takes_no_position():
    with LLM(dtype="float32", max_model_len=24) as llm:
        longest = [*question(4, 1, 1), *question(5, 0), [7]]
        found = llm.score(longest)
        assert [len(scores) for scores in found] == [24, 24, 24, 0]
    with LLM(dtype="float32") as llm:
        for sequence, scores in zip(longest, found, strict=True):
            (whole,) = llm.score([[*sequence, 9]])
            np.testing.assert_allclose(scores, whole[:-1], atol=2e-4)


@given(
    shared=st.integers(1, 5),
    rests=st.lists(st.integers(0, 4), min_size=1, max_size=4),
)
def test_each_input_of_a_row_is_before_its_target(shared, rests):
    sequences = [
        list(range(shared + 2)) + [100 * place + i for i in range(1, count + 1)]
        for place, count in enumerate(rests, 1)
    ]
    row = ScoredRow(sequences, shared if len(rests) > 1 else 0)
    pairs = set(zip(row.tokens, row.targets, strict=True))
    assert pairs == {
        pair for sequence in sequences for pair in itertools.pairwise(sequence)
    }


def test_greedy_tokens_are_those_that_are_generated():
    with LLM(dtype="float32") as llm:
        prompts = ["It is a truth universally", "She had never", "The rain"]
        greedy = SamplingParams(temperature=0.0, max_tokens=12)
        outputs = llm.generate(prompts, greedy)
        whole = [out.prompt_token_ids + out.outputs[0].token_ids for out in outputs]
        other = [[*sequence[:-1], sequence[-1] ^ 1] for sequence in whole]
        scores = {}
        llm.score_each([*whole, *other], on_scores=scores.update)
        for place, out in enumerate(outputs):
            count = len(out.outputs[0].token_ids)
            assert scores[place].is_greedy[-count:].all()
            changed = scores[place + len(whole)].is_greedy[-count:]
            assert changed[:-1].all()
            assert not changed[-1]


def test_what_raises_in_a_call_ends_it_and_the_next_one_works():
    class Enough(Exception):
        pass

    def stop(scores):
        raise Enough

    with LLM(dtype="float32") as llm:
        with pytest.raises(Enough):
            llm.score_each([[5, 6, 7]], on_scores=stop)
        assert len(llm.score([[5, 6, 7]])[0]) == 2
