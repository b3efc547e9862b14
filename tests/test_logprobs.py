"""Laws of log-probabilities: against float64, and whole rows against blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexjax.logprobs import (
    finish_score,
    fold_block,
    is_greedy,
    start_score,
    token_logprobs,
)

VOCAB = 23


def some_logits(*shape, seed=0, scale=3.0, offset=0.0):
    rng = np.random.default_rng(seed)
    return np.asarray(scale * rng.normal(size=shape) + offset, np.float32)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def score(logits, targets, sizes):
    return finish_score(folded(logits, targets, sizes))


def folded(logits, targets, sizes):
    """Folds `logits` in blocks of these sizes."""
    state = start_score(targets)
    first = 0
    for size in sizes:
        block = jnp.asarray(logits[..., first : first + size])
        state = fold_block(state, block, first, targets)
        first += size
    assert first == logits.shape[-1]
    return state


@given(
    cuts=st.lists(st.integers(1, VOCAB - 1), max_size=4, unique=True).map(sorted),
    magnitude=st.sampled_from([(1.0, 0.0), (50.0, 0.0), (3.0, 1e4), (1e5, -1e6)]),
    seed=st.integers(0, 3),
)
def test_any_split_into_blocks_scores_like_log_softmax(cuts, magnitude, seed):
    scale, offset = magnitude
    logits = some_logits(2, 3, VOCAB, seed=seed, scale=scale, offset=offset)
    targets = np.random.default_rng(seed).integers(0, VOCAB, (2, 3))
    edges = [0, *cuts, VOCAB]
    got = score(logits, jnp.asarray(targets), np.diff(edges).tolist())
    expected = np.take_along_axis(log_softmax(logits), targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=2e-6)


@given(
    cuts=st.lists(st.integers(1, 5), max_size=3, unique=True).map(sorted),
    logits=st.lists(st.integers(-2, 2), min_size=6, max_size=6),
)
def test_greedy_is_the_first_of_equal_logits(cuts, logits):
    targets = jnp.arange(6)
    rows = np.tile(np.float32(logits), (6, 1))
    state = folded(rows, targets, np.diff([0, *cuts, 6]).tolist())
    assert is_greedy(state).tolist() == [n == np.argmax(logits) for n in range(6)]


def test_blocks_of_nothing_change_nothing():
    logits = some_logits(4, 8)
    targets = jnp.array([0, 3, 4, 7])
    padded = np.full((4, 24), -np.inf, np.float32)
    padded[:, 8:16] = logits
    np.testing.assert_allclose(
        score(padded, targets + 8, [8, 8, 8]), score(logits, targets, [8]), rtol=1e-6
    )


def test_a_ruled_out_target_scores_minus_infinity():
    logits = some_logits(2, 6)
    logits[:, 1] = -np.inf
    got = score(logits, jnp.array([1, 2]), [2, 4])
    assert got[0] == -np.inf
    assert np.isfinite(got[1])


def test_blocks_of_one_size_compile_once():
    traced = []

    @jax.jit
    def fold(state, block, first_id):
        traced.append(first_id)
        return fold_block(state, block, first_id, targets)

    targets = jnp.array([1, 9])
    logits = some_logits(2, 16)
    state = start_score(targets)
    for first in range(0, 16, 4):
        state = fold(state, jnp.asarray(logits[:, first : first + 4]), first)
    assert len(traced) == 1
    expected = log_softmax(logits)[np.arange(2), targets]
    np.testing.assert_allclose(finish_score(state), expected, rtol=1e-5)


def test_scoring_works_in_bfloat16_blocks_and_under_jit():
    logits = jnp.asarray(some_logits(3, VOCAB)).astype(jnp.bfloat16)
    targets = jnp.array([0, 5, 22])
    got = jax.jit(
        lambda x: finish_score(fold_block(start_score(targets), x, 0, targets))
    )(logits)
    expected = log_softmax(logits.astype(jnp.float32))[np.arange(3), targets]
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@given(
    rows=st.lists(
        # few distinct values: ties everywhere
        st.lists(st.integers(-3, 3), min_size=VOCAB, max_size=VOCAB),
        min_size=3,
        max_size=3,
    ),
    ids=st.lists(st.integers(0, VOCAB - 1), min_size=3, max_size=3),
    num_top=st.sampled_from([0, 1, 5, VOCAB]),
)
def test_chosen_and_top_tokens_are_ranked_alike(rows, ids, num_top):
    logits = np.asarray(rows, np.float32)
    got = token_logprobs(jnp.asarray(logits), jnp.asarray(ids), num_top=num_top)
    expected = log_softmax(logits)
    for row, token in enumerate(ids):
        order = np.lexsort((np.arange(VOCAB), -logits[row]))
        assert got.top_ids[row].tolist() == order[:num_top].tolist()
        assert order[got.rank[row] - 1] == token
        np.testing.assert_allclose(
            got.top_logprobs[row], expected[row][order[:num_top]], rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(
            got.logprob[row], expected[row, token], rtol=1e-5, atol=1e-6
        )


def test_large_logits_keep_their_differences():
    logits = some_logits(4, VOCAB, scale=2.0, offset=3e4)
    ids = jnp.array([0, 1, 2, 3])
    got = token_logprobs(jnp.asarray(logits), ids, num_top=2)
    expected = log_softmax(logits)
    np.testing.assert_allclose(got.logprob, expected[np.arange(4), ids], rtol=1e-5)
    np.testing.assert_allclose(
        got.top_logprobs, -np.sort(-expected, -1)[:, :2], rtol=1e-5
    )


def test_a_row_does_not_see_its_batch():
    logits = jnp.asarray(some_logits(5, 101))
    ids = jnp.arange(5) * 7
    together = token_logprobs(logits, ids, num_top=3)
    for row in range(5):
        alone = token_logprobs(logits[row : row + 1], ids[row : row + 1], num_top=3)
        for one, all_ in zip(
            jax.tree.leaves(alone), jax.tree.leaves(together), strict=True
        ):
            np.testing.assert_array_equal(one[0], all_[row])


def test_more_top_tokens_than_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match="top_k"):
        token_logprobs(jnp.zeros((1, 3)), jnp.zeros(1, int), num_top=4)
