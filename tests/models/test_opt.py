"""The plain forward against Hugging Face's answers."""

import functools

import flax
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st

from flexjax.checkpoint import open_store
from flexjax.models import opt
from flexjax.models.config import (
    decoder_layer_shapes,
    embedding_shapes,
    final_shapes,
    named_config,
    tensor_shapes,
)
from flexjax.models.opt import (
    DecoderLayer,
    Embedding,
    Final,
    LayerNorm,
    apply,
    forward,
    unflatten,
)
from tests.golden_checkpoints import GOLDEN_NAMES


@pytest.fixture(params=GOLDEN_NAMES)
def checkpoint(request, golden):
    return golden(request.param)


def read_params(folder) -> tuple[dict, dict]:
    """The parameter tree of a store, and its tensors by name."""
    store = open_store(folder)
    tensors = {}
    for name, entry in store.tensors.items():
        data = np.empty(entry.shape, entry.dtype)
        store.read(name, data)
        tensors[name] = jnp.asarray(data)
    return unflatten(tensors), tensors


def left_padded(prompts: list[list[int]]) -> tuple[jax.Array, jax.Array]:
    length = max(map(len, prompts))
    ids = np.ones((len(prompts), length), np.int32)
    start = np.array([length - len(prompt) for prompt in prompts], np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, start[row] :] = prompt
    return jnp.asarray(ids), jnp.asarray(start)


def test_prefill_logits_scores_and_greedy_tokens_are_hugging_faces(checkpoint):
    config = open_store(checkpoint.store).config
    params, _ = read_params(checkpoint.store)
    run = jax.jit(functools.partial(forward, config=config))
    logits = run(params, *left_padded(checkpoint.prompts))
    np.testing.assert_allclose(
        logits[:, -1], checkpoint.prefill_logits, atol=2e-4, rtol=0
    )
    ids = jnp.asarray(np.array(checkpoint.score_ids, np.int32))
    logits = run(params, ids, jnp.zeros(len(ids), jnp.int32))
    scores = jax.nn.log_softmax(logits[:, :-1])
    found = np.take_along_axis(np.asarray(scores), np.asarray(ids)[:, 1:, None], axis=2)
    np.testing.assert_allclose(
        found[..., 0], checkpoint.score_logprobs, atol=2e-4, rtol=0
    )
    pairs = zip(checkpoint.prompts, checkpoint.greedy_ids, strict=True)
    whole = [prompt + greedy for prompt, greedy in pairs]
    logits = run(params, *left_padded(whole))
    best = np.asarray(logits.argmax(axis=-1))
    assert best[:, -17:-1].tolist() == checkpoint.greedy_ids


@pytest.mark.parametrize("offset", [0, 300, 10_000])
def test_a_norm_is_exact_however_far_from_zero_its_input_is(offset):
    rng = np.random.default_rng(0)
    x = (offset + rng.normal(0, 0.1, (3, 4096))).astype(np.float32)
    wide = x.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    expected = centred / np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
    found = jax.jit(functools.partial(apply, LayerNorm(affine=False)))({}, x)
    # What a float of that size can tell of so small a difference, and the mean's error.
    np.testing.assert_allclose(
        found, expected, atol=1e-5 + 20 * offset * 1.2e-7, rtol=0
    )


SIZES = ["opt-125m", "opt-350m", "galactica-125m"]


def shapes_of(params) -> dict[str, tuple[int, ...]]:
    flat = flatten_dict(params["params"], sep=".")
    return {name: leaf.shape for name, leaf in flat.items()}


def assert_modules_name(config) -> None:
    """The modules use just the tensors that the config names."""
    hidden, embed = config.hidden_size, config.embed_dim
    dtype, key = jnp.float32, jax.random.key(0)
    state = jax.ShapeDtypeStruct((1, 2, hidden), dtype)
    rows = jax.ShapeDtypeStruct((1, 2, embed), dtype)
    positions = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    found = jax.eval_shape(Embedding(config).init, key, rows, positions)
    shapes = embedding_shapes(config)
    del shapes["embed_tokens.weight"]
    assert shapes_of(found) == shapes
    layer = functools.partial(DecoderLayer(config).init, attend=lambda q, k, v: v)
    found = jax.eval_shape(layer, key, state)
    assert shapes_of(found) == decoder_layer_shapes(config)
    found = jax.eval_shape(Final(config).init, key, state)
    assert (shapes_of(found) if found else {}) == final_shapes(config)


@pytest.mark.parametrize("name", SIZES)
def test_published_models_use_just_their_tensors(name):
    assert_modules_name(named_config(name))


def test_golden_models_use_just_their_tensors(checkpoint):
    store = open_store(checkpoint.store)
    assert_modules_name(store.config)
    assert store.tensors.keys() == tensor_shapes(store.config).keys()


@pytest.mark.parametrize("name", ["opt-pre-ln", "opt-post-ln-projected"])
def test_a_missing_tensor_is_an_error_and_a_spare_one_is_not_read(golden, name):
    config = open_store(golden(name).store).config
    _, tensors = read_params(golden(name).store)
    ids, start = left_padded([[5, 6, 7]])

    def trace(tensors) -> None:
        run = functools.partial(forward, config=config)
        jax.eval_shape(run, unflatten(tensors), ids, start)

    trace(tensors | {"layers.0.spare.weight": ids, "spare.weight": ids})
    for missing in [*tensors][:4] + [*tensors][-4:]:
        with pytest.raises((flax.errors.ScopeParamNotFoundError, KeyError)):
            trace({name: data for name, data in tensors.items() if name != missing})


def test_a_bfloat16_model_has_float32_logits_near_its_own(golden):
    checkpoint = golden("opt-bf16")
    config = open_store(checkpoint.store).config
    _, tensors = read_params(checkpoint.store)
    narrow = {name: data.astype(ml_dtypes.bfloat16) for name, data in tensors.items()}
    logits = forward(unflatten(narrow), *left_padded(checkpoint.prompts), config)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits[:, -1], checkpoint.prefill_logits, atol=0.15)


def test_unflatten_splits_names_at_their_dots():
    leaves = [jnp.zeros(n) for n in range(3)]
    tree = unflatten(dict(zip(["a.b.c", "a.b.d", "e"], leaves, strict=True)))
    assert tree == {"a": {"b": {"c": leaves[0], "d": leaves[1]}}, "e": leaves[2]}


@settings(max_examples=40, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 255, 256, 257, 600]),
    inputs=st.sampled_from([8, 24]),
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
)
def test_a_product_is_the_same_on_whichever_side_the_weights_stand(rows, inputs, dtype):
    """Short rows and long ones, blocks that are full and ones that are padded."""
    random = np.random.default_rng(rows)
    x, weight = (
        jnp.asarray(random.standard_normal((count, inputs)), dtype)
        for count in (rows, 40)
    )
    wide = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opt, "LONG_ROW", 16)
        # Traced anew: what is patched is part of no cache's key.
        product = jax.jit(lambda *sides: opt.contract_last(*sides))(x[None], weight)
    assert product.dtype == jnp.float32
    np.testing.assert_allclose(product[0], wide, rtol=1e-5, atol=1e-5)
