"""Law 1 where inputs of products are rounded: a plain forward that rounds them too."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints_tools.resolve import resolve_model
from flexjax import LLM, Placement, Policy, SamplingParams
from flexjax.attention import prefill_attention
from flexjax.checkpoint import EMBEDDED_MODEL, open_store
from flexjax.kernels.products import PRODUCTS, round_rows
from flexjax.models import opt
from flexjax.policy import Schedule, Tier
from flexjax.quant import QuantizedArray, cache_quantization, dequantize
from flexjax.sparse import sparse_prefill_attention
from flexjax.steps import decode_step, prefill_step
from flexjax.workload import bucket
from tests.cells import every_other
from tests.test_engine import in_group
from tests.test_narrow_weights import PLACEMENTS, PROMPTS

GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, logprobs=1)
SPARSITY = 0.4
needs_kernel = pytest.mark.skipif(
    not PRODUCTS.is_there(), reason="no processor for the kernel, or no compiler"
)


def plain_contract(x, weight):
    """`contract_quantized` by the words of its docstrings, in XLA's float32."""
    how = weight.quantization
    codes, factors = round_rows(x, how.group_size)  # its tests say that it rounds so
    steps = jnp.repeat(factors[:, 0].T, how.group_size, axis=1)
    rows = codes.astype(jnp.float32) * steps
    exact = dataclasses.replace(how, dtype="float32")  # not rounded to bfloat16
    end = how.code_bytes(x.shape[1])
    numbers = weight.data[:, end:].reshape(len(weight.data), -1, 2)
    numbers = jax.lax.bitcast_convert_type(numbers, jnp.bfloat16).astype(jnp.float32)
    numbers = jax.lax.bitcast_convert_type(numbers, jnp.uint8)
    numbers = numbers.reshape(len(weight.data), -1)
    data = jnp.concatenate([weight.data[:, :end], numbers], axis=-1)
    wide = dequantize(data, exact)
    return jnp.matmul(rows, wide.T, precision=jax.lax.Precision.HIGHEST)


@functools.cache
def params_of(weight_bits):
    store = open_store(resolve_model(EMBEDDED_MODEL, weight_bits=weight_bits))
    tensors = {}
    for name, entry in store.tensors.items():
        array = np.empty(entry.shape, entry.dtype)
        store.read(name, array)
        how = entry.quantization
        array = jnp.asarray(array)
        tensors[name] = array if how is None else QuantizedArray(array, how, 8)
    return opt.unflatten(tensors), store


def plain_logprobs(policy, whole, prompt_lens, monkeypatch):
    """What a plain forward says after every token of some rows."""
    params, store = params_of(policy.weight_bits)
    longest = bucket(max(map(len, whole)))
    start = np.array([longest - len(ids) for ids in whole], np.int32)
    attention = prefill_attention
    if policy.attention_sparsity < 1:
        attention = functools.partial(
            sparse_prefill_attention,
            sparsity=policy.attention_sparsity,
            prompt_end=jnp.asarray(start + prompt_lens),
        )
    ids = jnp.array([[1] * (longest - len(row)) + row for row in whole], jnp.int32)
    how = cache_quantization(policy, store.config, store.dtype)
    with monkeypatch.context() as patch:
        patch.setattr(opt.products, "contract_quantized", plain_contract)
        said = jax.jit(
            lambda ids, start: opt.forward(
                params, ids, start, store.config, how, attention
            )
        )(ids, start)
    logprobs = np.asarray(jax.nn.log_softmax(said))
    return [row[first:] for row, first in zip(logprobs, start, strict=True)]


FEATURES = [
    {"host_attention": on_host, "attention_sparsity": sparsity}
    for on_host, sparsity in itertools.product((False, True), (1.0, SPARSITY))
]
CELLS = [
    in_group(
        bits,
        bits,
        cache_bits,
        placement,
        FEATURES[(i + i // 4) % 4],
        list(Schedule)[i % 3],
    )
    # A third of all, so that each placement and feature meets both widths.
    for i, (bits, placement) in enumerate(itertools.product((4, 8), PLACEMENTS))
    for cache_bits in [(None, 4, 8)[(i + i // 4) % 3]]
]


@needs_kernel
@pytest.mark.parametrize(
    ("bits", "cache_bits", "placement", "features", "schedule"), every_other(CELLS)
)
def test_a_run_that_rounds_is_a_plain_forward_that_rounds(
    bits, cache_bits, placement, features, schedule, monkeypatch
):
    policy = Policy(
        weights=PLACEMENTS[placement],
        kv_cache=Placement(device=0.3, host=0.4),
        weight_bits=bits,
        kv_cache_bits=cache_bits,
        activation_bits=8,
        batch_size=2,
        num_batches=2,
        schedule=schedule,
        **features,
    )
    with LLM(None, policy=policy) as model:
        outputs = [out.outputs[0] for out in model.generate(PROMPTS, GREEDY)]
        peaks = model.metrics["peak_bytes"], model.metrics["predicted_peak_bytes"]
        whole = [
            ids + list(out.token_ids) for ids, out in zip(PROMPTS, outputs, strict=True)
        ]
        is_sparse = policy.attention_sparsity < 1
        scores = None if is_sparse else model.score(whole)
        assert model.placement["activation_bits"] == 8
    for tier in Tier:
        assert peaks[0][tier.value] <= peaks[1][tier.value]
    lens = np.array([len(ids) for ids in PROMPTS])
    expected = plain_logprobs(policy, whole, lens, monkeypatch)
    # Where a sum in another order gives another bfloat16, it may give another code: so
    # logits of prefill and decode, or of other shapes, are a little apart.
    atol = 0.25
    for i, (ids, said, out) in enumerate(zip(whole, expected, outputs, strict=True)):
        plain = said[np.arange(len(ids) - 1), ids[1:]]
        if scores is not None:
            np.testing.assert_allclose(scores[i], plain, atol=atol, rtol=0)
        new = said[lens[i] - 1 : -1]
        assert (plain[lens[i] - 1 :] >= new.max(axis=-1) - atol).all()
        pairs = zip(out.logprobs, out.token_ids, strict=True)
        seen = [table[token].logprob for table, token in pairs]
        np.testing.assert_allclose(seen, plain[lens[i] - 1 :], atol=atol, rtol=0)


@needs_kernel
@pytest.mark.parametrize("bits", every_other([4, 8]))
def test_where_weights_are_changes_nothing(bits):
    found = []
    for weights in PLACEMENTS.values():
        policy = Policy(
            weights=weights,
            kv_cache=Placement(host=0.5),
            weight_bits=bits,
            activation_bits=8,
            batch_size=2,
            num_batches=2,
        )
        with LLM(None, policy=policy) as model:
            scores = np.concatenate(model.score(PROMPTS))
            outputs = model.generate(PROMPTS, GREEDY)
        found.append((scores, [out.outputs[0].token_ids for out in outputs]))
    for scores, token_ids in found[1:]:
        np.testing.assert_array_equal(scores, found[0][0])
        assert token_ids == found[0][1]


@needs_kernel
def test_rounding_changes_what_a_run_computes():
    """Else the law above would hold of runs that do not round."""
    policy = Policy(weight_bits=4)
    scores = []
    for activation_bits in (None, 8):
        changed = dataclasses.replace(policy, activation_bits=activation_bits)
        with LLM(None, policy=changed) as model:
            scores.append(np.concatenate(model.score(PROMPTS)))
    assert 0 < np.abs(scores[0] - scores[1]).max() < 0.5


@needs_kernel
def test_every_step_multiplies_rounded_rows():
    """All matrices of a layer; its queries, keys and values share what is rounded."""
    params, store = params_of(4)
    layer, config = params["layers"]["0"], store.config
    hidden = jnp.zeros((2, 1, 1, config.hidden_size), jnp.bfloat16)
    start = jnp.zeros(2, jnp.int32)
    prefill = prefill_step.lower(layer, hidden, start, config=config)
    slots = (2, config.num_attention_heads, 4, config.head_dim)
    past = ((jnp.zeros(slots, jnp.bfloat16),),) * 2
    length = np.int32(4)
    decode = decode_step.lower(layer, hidden, (past,), start, length, config=config)
    for step in (prefill, decode):
        text = step.as_text()
        assert text.count("custom_call @flexjax_contract_rounded") == 6
        assert "flexjax_contract_quantized" not in text


@needs_kernel
def test_a_store_that_is_quantized_rounds_without_its_bits_said():
    store = resolve_model(EMBEDDED_MODEL, weight_bits=4)
    found = []
    for weight_bits in (None, 4):
        policy = Policy(weight_bits=weight_bits, activation_bits=8)
        with LLM(store, policy=policy) as model:
            assert model.placement["weight_bits"] == 4
            found.append(np.concatenate(model.score(PROMPTS)))
    np.testing.assert_array_equal(*found)
