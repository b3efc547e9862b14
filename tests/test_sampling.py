"""Laws of sampling: against a slow float64 reference, and between the samplers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from flexjax import sampling
from flexjax.sampling import draw, draw_filtered, greedy, kept, penalize
from flexjax.sampling_params import SamplingParams

SAMPLERS = [greedy, draw, draw_filtered]
ROUNDING = 1e-5  # how far float32 sums may move a threshold
FILTERS = [
    {},
    {"top_k": 3},
    {"top_p": 0.6},
    {"min_p": 0.2},
    {"top_k": 4, "top_p": 0.7, "min_p": 0.05},
]


def controls_for(params, steps=None, seed=0):
    keys = sampling.row_keys(params, range(len(params)), seed=seed)
    steps = np.zeros(len(params), int) if steps is None else np.asarray(steps)
    return sampling.make_controls(params, keys, steps)


def some_logits(rows, vocab, seed=0, scale=3.0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(scale * rng.normal(size=(rows, vocab)), jnp.float32)


def reference_kept(tempered, top_k, top_p, min_p):
    """What the filters leave, by sorting one row: ties with the last kept stay."""
    tempered = np.asarray(tempered, np.float64)
    weights = np.exp(tempered - tempered.max())
    is_kept = weights >= min_p
    if 0 < top_k < len(weights):
        is_kept &= weights >= np.sort(weights)[-top_k]
    if top_p < 1:
        weights = np.where(is_kept, weights, 0)
        descending = np.sort(weights)[::-1] / weights.sum()
        last = np.flatnonzero(np.cumsum(descending) >= top_p)[0]
        is_kept &= weights / weights.sum() >= descending[last]
    return is_kept


logits_and_settings = st.tuples(
    st.lists(
        # few distinct values make ties common; finer steps than 0.01 may tie in float32
        st.one_of(
            st.integers(-6, 6).map(float),
            st.integers(-3000, 3000).map(lambda n: n / 100),
            st.just(-np.inf),
        ),
        min_size=11,
        max_size=11,
    ).filter(lambda row: max(row) > -np.inf),
    st.builds(
        SamplingParams,
        temperature=st.floats(0.1, 5),
        top_k=st.integers(-1, 13),
        top_p=st.floats(0.01, 1) | st.just(1.0),
        min_p=st.floats(0, 1) | st.just(0.0),
    ),
)


@given(st.lists(logits_and_settings, min_size=6, max_size=6))
def test_filters_keep_what_sorting_keeps(rows):
    logits = np.asarray([row for row, _ in rows], np.float32)
    got = np.asarray(kept(jnp.asarray(logits), controls_for([p for _, p in rows])))
    for row, is_kept, (_, params) in zip(logits, got, rows, strict=True):
        tempered = (row - row.max()) / np.float32(params.temperature)
        least, most = (
            reference_kept(
                tempered,
                params.top_k,
                params.top_p * (1 + sign * ROUNDING),
                min(1.0, params.min_p * (1 - sign * ROUNDING)),
            )
            for sign in (-1, 1)
        )
        drawable = np.isfinite(row)
        assert np.all(is_kept[least & drawable])
        assert not np.any(is_kept[drawable & ~most])
        assert np.any(is_kept & drawable)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("vocab", [1, 5, 301])
def test_a_row_does_not_see_its_batch(sampler, vocab):
    logits = some_logits(9, vocab)
    params = [
        SamplingParams(temperature=t, seed=s, **filters)
        for s, (t, filters) in enumerate(
            zip(
                [0.0, 0.5, 1.0, 2.0, 1.0, 0.0, 1e9, 0.7, 1.0], 2 * FILTERS, strict=False
            )
        )
    ]
    controls = controls_for(params, steps=range(9))
    together = np.asarray(sampler(logits, controls))
    for size in (1, 2, 4):
        for at in range(0, 9 - size + 1, size):
            rows = slice(at, at + size)
            mine = jax.tree.map(lambda x, rows=rows: x[rows], controls)
            np.testing.assert_array_equal(sampler(logits[rows], mine), together[rows])
    backwards = jax.tree.map(lambda x: x[::-1], controls)
    np.testing.assert_array_equal(sampler(logits[::-1], backwards), together[::-1])


def test_samplers_agree_where_more_than_one_applies():
    logits = some_logits(64, 97)
    cold = controls_for([SamplingParams(temperature=0.0, top_k=5, top_p=0.4)] * 64)
    warm = controls_for([SamplingParams(temperature=0.8)] * 64)
    for sampler in SAMPLERS:
        np.testing.assert_array_equal(sampler(logits, cold), logits.argmax(-1))
    np.testing.assert_array_equal(draw(logits, warm), draw_filtered(logits, warm))


@pytest.mark.parametrize("filters", FILTERS)
def test_filters_change_only_draws_that_they_rule_out(filters):
    logits = some_logits(200, 40)
    free = controls_for([SamplingParams()] * 200)
    bound = controls_for([SamplingParams(**filters)] * 200)
    unfiltered = np.asarray(draw(logits, free))
    filtered = np.asarray(draw_filtered(logits, bound))
    is_kept = np.asarray(kept(logits, bound))
    stays = is_kept[np.arange(200), unfiltered]
    np.testing.assert_array_equal(filtered[stays], unfiltered[stays])
    assert np.all(is_kept[np.arange(200), filtered])


def test_same_seed_and_step_give_the_same_token_and_others_do_not():
    logits = jnp.zeros((100, 50))
    mine = [SamplingParams(seed=7)] * 100
    same = np.asarray(draw(logits, controls_for(mine, steps=[3] * 100)))
    assert len(set(same.tolist())) == 1
    by_step = np.asarray(draw(logits, controls_for(mine, steps=range(100))))
    by_seed = draw(logits, controls_for([SamplingParams(seed=s) for s in range(100)]))
    assert by_step[3] == same[0]
    for tokens in (by_step, np.asarray(by_seed)):
        assert len(set(tokens.tolist())) > 30


def test_a_longer_vocabulary_leaves_the_noise_of_the_shorter():
    logits = some_logits(30, 61)
    longer = jnp.pad(logits, ((0, 0), (0, 20)), constant_values=-jnp.inf)
    controls = controls_for([SamplingParams()] * 30)
    np.testing.assert_array_equal(draw(logits, controls), draw(longer, controls))


def test_keys_are_those_of_jax_and_hold_64_bits():
    params = [SamplingParams(seed=5), SamplingParams(), SamplingParams(seed=2**40 + 5)]
    keys = sampling.row_keys(params, [10, 11, 12], seed=1)
    np.testing.assert_array_equal(keys[0], jax.random.key_data(jax.random.key(5)))
    engine = jax.random.fold_in(jax.random.key(1), 11)
    np.testing.assert_array_equal(keys[1], jax.random.key_data(engine))
    assert keys[2].tolist() == [2**8, 5]


def test_rows_without_a_seed_differ_by_prompt_and_by_engine():
    params = [SamplingParams()] * 3
    keys = [sampling.row_keys(params, [0, 1, 2], seed=seed) for seed in (0, 1)]
    assert len({tuple(key) for key in np.concatenate(keys).tolist()}) == 6
    alone = sampling.row_keys(params[:1], [2], seed=1)
    np.testing.assert_array_equal(alone[0], keys[1][2])


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
@pytest.mark.parametrize("filters", FILTERS)
def test_draws_follow_the_distribution(temperature, filters):
    row = np.array([0.1, 2.0, -1.0, 1.2, 0.0, 1.9, -3.0, 0.7], np.float32)
    params = SamplingParams(temperature=temperature, **filters)
    num = 20_000
    controls = controls_for([params] * num, seed=3)
    tokens = np.asarray(draw_filtered(jnp.tile(row, (num, 1)), controls))
    weights = np.exp(row.astype(np.float64) / temperature)
    weights *= reference_kept(
        row / temperature, params.top_k, params.top_p, params.min_p
    )
    counts = np.bincount(tokens, minlength=len(row))
    assert counts[weights == 0].sum() == 0
    drawable = weights > 0
    expected = num * weights[drawable] / weights.sum()
    if len(expected) > 1:
        assert scipy.stats.chisquare(counts[drawable], expected).pvalue > 1e-3


def test_a_large_vocabulary_is_drawn_evenly():
    num, vocab = 64, 50272
    bins = np.zeros(8)
    for step in range(4):
        controls = controls_for([SamplingParams()] * num, steps=[step] * num)
        tokens = np.asarray(draw(jnp.zeros((num, vocab)), controls))
        bins += np.histogram(tokens, bins=8, range=(0, vocab))[0]
    assert scipy.stats.chisquare(bins).pvalue > 1e-3


NARROWEST = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1e-4),
    SamplingParams(temperature=1e-30),
    SamplingParams(temperature=1e30, top_p=1e-30),
    SamplingParams(top_p=1e-7),
    SamplingParams(min_p=1.0),
    SamplingParams(top_k=1),
]


@pytest.mark.parametrize("params", NARROWEST)
def test_extremes_of_the_settings_are_greedy(params):
    logits = some_logits(20, 37, scale=100.0)
    logits = jnp.where(logits < -50, -jnp.inf, logits)
    controls = controls_for([params] * 20)
    samplers = [draw_filtered] if params.has_filter else [draw, draw_filtered]
    for sampler in samplers:
        np.testing.assert_array_equal(sampler(logits, controls), logits.argmax(-1))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_only_possible_token_is_taken(sampler):
    logits = jnp.where(jnp.arange(23) == 11, -1e30, -jnp.inf)
    logits = jnp.tile(logits, (50, 1)).astype(jnp.float32)
    params = [SamplingParams(temperature=t, top_p=0.5) for t in (0.0, 1e-3, 1.0, 1e30)]
    tokens = sampler(logits, controls_for(params + [SamplingParams()] * 46))
    assert set(np.asarray(tokens).tolist()) == {11}


def test_tokens_that_tie_with_the_last_kept_are_kept():
    logits = jnp.array([[3.0, 1.0, 3.0, 2.0, 2.0]])
    for asked, expected in [
        ({"top_k": 1}, [0, 2]),
        ({"top_k": 3}, [0, 2, 3, 4]),
        ({"top_p": 0.01}, [0, 2]),
        ({"min_p": 1.0}, [0, 2]),
    ]:
        got = kept(logits, controls_for([SamplingParams(**asked)]))
        assert np.flatnonzero(got[0]).tolist() == expected
    assert greedy(logits, controls_for([SamplingParams()]))[0] == 0


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_rows_without_a_distribution_stay_inside_the_vocabulary(sampler, bad):
    logits = jnp.full((4, 6), bad, jnp.float32).at[1].set(jnp.arange(6.0))
    params = [SamplingParams(temperature=0.0, top_k=2, top_p=0.5)] * 4
    tokens = np.asarray(sampler(logits, controls_for(params)))
    assert np.all((tokens >= 0) & (tokens < 6))
    assert tokens[1] == 5


@given(
    rows=st.lists(
        st.tuples(
            st.lists(st.integers(-1, 8), min_size=4, max_size=4),
            st.sampled_from([0.5, 1.0, 1.3]),
        ),
        min_size=3,
        max_size=3,
    )
)
def test_penalty_moves_seen_tokens_once(rows):
    logits = np.asarray(some_logits(3, 9)).copy()
    logits[:, 2], logits[:, 3] = 0.0, -np.inf
    expected = logits.copy()
    for row, (ids, penalty) in enumerate(rows):
        for token in set(ids) - {-1}:
            by = np.float32(penalty)
            value = logits[row, token]
            expected[row, token] = value / by if value > 0 else value * by
    ids, penalties = zip(*rows, strict=True)
    got = penalize(
        jnp.asarray(logits), jnp.asarray(ids), jnp.asarray(penalties, jnp.float32)
    )
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ([{"temperature": 0.0}, {"temperature": 0.0, "top_k": 3}], greedy),
        ([{"temperature": 0.0}, {}], draw),
        ([{"top_k": -1, "top_p": 1.0}], draw),
        ([{}, {"top_k": 3}], draw_filtered),
        ([{"top_p": 0.9}], draw_filtered),
        ([{"min_p": 0.1}], draw_filtered),
    ],
)
def test_the_cheapest_sampler_is_picked(asked, expected):
    params = [SamplingParams(**one) for one in asked]
    assert sampling.pick_sampler(params) is expected


def test_controls_are_a_pytree_that_steps():
    controls = controls_for([SamplingParams()] * 2)
    later = dataclasses.replace(controls, step=controls.step + 1)
    assert jax.tree.structure(later) == jax.tree.structure(controls)
    assert later.step.tolist() == [1, 1]
