"""Law 1 for quantized weights and caches: a plain forward of the same numbers."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints_tools.open_source import open_source
from checkpoints_tools.store_conversion import convert_to_store
from flexjax.checkpoint import open_store
from flexjax.models.opt import forward, unflatten
from flexjax.policy import Placement, Policy, Schedule, Tier, validate
from flexjax.quant import Quantization, cache_quantization, dequantize
from flexjax.schedule.footprint import by_tier
from tests.test_engine import (
    PLACEMENTS,
    SHAPES,
    in_group,
    make_engine,
    make_rows,
)

GROUP_SIZE = 16  # divides the width of every golden checkpoint's layers
BITS = [(4, None), (8, None), (None, 4), (None, 8), (4, 4), (8, 4), (4, 8)]


@pytest.fixture(scope="module")
def store_of(golden, tmp_path_factory):
    """Opens a golden checkpoint with weights of so many bits."""
    folder = tmp_path_factory.mktemp("quantized")

    @functools.cache
    def make(name, weight_bits):
        if weight_bits is None:
            return open_store(golden(name).store)
        how = Quantization(bits=weight_bits, group_size=GROUP_SIZE, dtype="float32")
        out = folder / f"{name}-{weight_bits}"
        source = open_source(golden(name).folder)
        convert_to_store(source, out, np.dtype(np.float32), name, how)
        return open_store(out)

    return make


def wide_weights(store):
    """Every tensor of a store as layers use it."""
    found = {}
    for name, entry in store.tensors.items():
        array = np.empty(entry.shape, entry.dtype)
        store.read(name, array)
        found[name] = jnp.asarray(array)
        if entry.quantization is not None:
            found[name] = dequantize(found[name], entry.quantization)
    return found


@pytest.fixture(scope="module")
def logprobs_of(store_of):
    """What a plain forward says after every token of some sequences."""

    @functools.cache
    def prepare(name, weight_bits, kv_cache_bits):
        store = store_of(name, weight_bits)
        policy = Policy(kv_cache_bits=kv_cache_bits, group_size=GROUP_SIZE)
        how = cache_quantization(policy, store.config, store.dtype)
        params = unflatten(wide_weights(store))
        return jax.jit(
            lambda ids, start: jax.nn.log_softmax(
                forward(params, ids, start, store.config, how)
            )
        )

    def find(name, bits, sequences):
        longest = max(map(len, sequences))
        start = np.array([longest - len(ids) for ids in sequences], np.int32)
        ids = np.array([[1] * (longest - len(ids)) + ids for ids in sequences])
        found = np.asarray(prepare(name, *bits)(ids.astype(np.int32), start))
        return [rows[first:] for rows, first in zip(found, start, strict=True)]

    return find


CELLS = [
    in_group(shape, bits, placement, schedule, shape)
    for i, (bits, placement) in enumerate(itertools.product(BITS, PLACEMENTS))
    for schedule, shape in [(list(Schedule)[i % 3], SHAPES[i % 4])]
]


@pytest.mark.parametrize(("bits", "placement", "schedule", "shape"), CELLS)
def test_every_cell_gives_the_answers_of_a_plain_forward(
    bits, placement, schedule, shape, golden, store_of, logprobs_of, tmp_path
):
    check("opt-pre-ln", bits, PLACEMENTS[placement], schedule, shape, locals())


@pytest.mark.parametrize("name", ["opt-post-ln-projected", "opt-no-affine-norm"])
def test_other_variants_give_the_answers_of_a_plain_forward(
    name, golden, store_of, logprobs_of, tmp_path
):
    placements = PLACEMENTS["mixed, activations on disk"]
    check(name, (4, 4), placements, Schedule.ZIGZAG, (2, 2), locals())


def check(name, bits, placements, schedule, shape, fixtures):
    weights, cache, activations = placements
    checkpoint, store = fixtures["golden"](name), fixtures["store_of"](name, bits[0])
    policy = validate(
        Policy(
            weights=weights,
            kv_cache=cache,
            activations=activations,
            batch_size=shape[0],
            num_batches=shape[1],
            schedule=schedule,
            weight_bits=bits[0],
            kv_cache_bits=bits[1],
            group_size=GROUP_SIZE,
        )
    )
    engine = make_engine(store, policy, fixtures["tmp_path"])
    rows = make_rows(checkpoint.prompts)
    engine.generate(rows)
    needed = by_tier(engine.times.predicted_peak)
    for tier in Tier:
        assert engine.ledger.peak(tier) <= needed[tier], tier
    whole = [[*row.prompt, *row.checker.token_ids] for row in rows]
    scores = engine.score(whole)
    engine.close()
    expected = fixtures["logprobs_of"](name, bits, whole)
    # An element that falls just beside a code's border may get another code where sums
    # are in another order.
    atol = 2e-4 if bits[1] is None else 2e-2
    for row, score, said in zip(rows, scores, expected, strict=True):
        ids = np.array([*row.prompt, *row.checker.token_ids])
        plain = said[np.arange(len(ids) - 1), ids[1:]]
        np.testing.assert_allclose(score, plain, atol=atol, rtol=0)
        new = slice(len(row.prompt) - 1, len(ids) - 1)
        best = said[new].max(axis=-1)
        assert (plain[new] >= best - atol).all()
        pairs = zip(row.logprobs, row.checker.token_ids, strict=True)
        seen = [table[token].logprob for table, token in pairs]
        np.testing.assert_allclose(seen, plain[new], atol=atol, rtol=0)


def test_weights_are_within_half_a_step_of_the_checkpoint_and_others_are_the_same(
    golden, store_of
):
    plain = wide_weights(open_store(golden("opt-pre-ln").store))
    store = store_of("opt-pre-ln", 4)
    for name, found in wide_weights(store).items():
        how, exact = store.tensors[name].quantization, np.asarray(plain[name])
        if how is None:
            assert (np.asarray(found) == exact).all()
            continue
        groups = exact.reshape(len(exact), -1, GROUP_SIZE)
        step = np.ptp(groups, axis=-1, keepdims=True) / how.levels
        error = np.abs(np.asarray(found).reshape(groups.shape) - groups)
        assert (error <= step * 0.501 + 1e-7).all(), name
    bits = {
        name: entry.quantization and entry.quantization.bits
        for name, entry in store.tensors.items()
    }
    assert bits["layers.0.fc1.weight"] == 4
    assert bits["embed_tokens.weight"] == 8
    assert bits["layers.0.fc1.bias"] is bits["embed_positions.weight"] is None


def test_a_tier_holds_quantized_weights_as_they_are_stored(store_of, tmp_path):
    store = store_of("opt-pre-ln", 4)
    total = sum(entry.nbytes for entry in store.tensors.values())
    policy = validate(Policy(weights=Placement(host=1.0), weight_bits=4, group_size=16))
    engine = make_engine(store, policy, tmp_path)
    assert engine.weights.home_bytes()[Tier.HOST] == total
    engine.close()
