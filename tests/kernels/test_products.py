"""The kernel is XLA's product of what `dequantize` makes of the weights."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexjax.kernels import compiled
from flexjax.kernels.products import (
    SOURCE,
    can_multiply_quantized,
    contract_quantized,
    is_multiplied,
)
from flexjax.models.opt import contract_last
from flexjax.quant import Quantization, QuantizedArray, dequantize, quantize

pytestmark = pytest.mark.skipif(
    not can_multiply_quantized(), reason="no kernel for this processor, or no compiler"
)


def drawn(seed, rows, inputs, outputs, how):
    """Inputs and quantized weights, and what XLA makes of them in float32."""
    rng = np.random.default_rng(seed)
    x, weight = (
        jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
        for shape in ((rows, inputs), (outputs, inputs))
    )
    quantized = QuantizedArray(quantize(weight, how), how)
    wide = dequantize(quantized.data, how)
    expected = jax.lax.dot_general(
        x.astype(jnp.float32),
        wide.astype(jnp.float32),
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
    )
    return x, quantized, wide, np.asarray(expected)


@given(
    seed=st.integers(0, 1000),
    rows=st.integers(1, 100) | st.sampled_from([1024, 1030, 2050]),
    halves=st.integers(1, 20),
    outputs=st.integers(1, 70) | st.sampled_from([512, 600]),
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([32, 64, 96, 320]),
)
@settings(max_examples=60)
def test_a_product_is_that_of_the_wide_weights(
    seed, rows, halves, outputs, bits, group_size
):
    how = Quantization(bits=bits, group_size=group_size, dtype="bfloat16")
    inputs = 2 * halves * group_size
    assert is_multiplied(how, inputs)
    x, weight, wide, expected = drawn(seed, rows, inputs, outputs, how)
    found = jax.jit(contract_quantized)(x, weight)
    # Sums in another order: each of `inputs` products is rounded once.
    scale = np.abs(np.asarray(x, np.float32)) @ np.abs(np.asarray(wide, np.float32)).T
    error = np.abs(np.asarray(found) - expected)
    assert (error <= 1e-5 * scale).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_every_weight_is_what_dequantize_makes_of_it(bits):
    """By rows that are each one 1 and zeros, which no sum can blur."""
    how = Quantization(bits=bits, group_size=32, dtype="bfloat16")
    _, weight, wide, _ = drawn(1, 1, 512, 40, how)
    found = contract_last(jnp.eye(512, dtype=jnp.bfloat16), weight)
    np.testing.assert_array_equal(found, np.asarray(wide, np.float32).T)


def test_products_may_run_beside_each_other():
    """Threads that wait for one another's shares would hang."""
    how = Quantization(bits=4, group_size=64, dtype="bfloat16")
    step = jax.jit(contract_quantized)
    cases = [drawn(seed, 65, 1024, 700, how) for seed in range(4)]
    calls = [step(x, weight) for x, weight, _, _ in cases * 8]
    for found, (*_, expected) in zip(calls, itertools.cycle(cases), strict=False):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    ("bits", "group_size", "inputs", "dtype"),
    [
        (4, 16, 512, "bfloat16"),  # groups are less than is made wide at once
        (4, 64, 64, "bfloat16"),  # a group lies in both halves
        (8, 40, 80, "bfloat16"),
        (4, 64, 512, "float32"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(bits, group_size, inputs, dtype):
    how = Quantization(bits=bits, group_size=group_size, dtype=dtype)
    assert not is_multiplied(how, inputs)
    weight = QuantizedArray(jnp.zeros((3, how.width(inputs)), jnp.uint8), how)
    with pytest.raises(ValueError, match="no kernel multiplies with weights of"):
        contract_last(jnp.zeros((2, inputs), jnp.bfloat16), weight)


def test_weights_for_other_inputs_are_refused():
    how = Quantization(bits=4, group_size=64, dtype="bfloat16")
    weight = QuantizedArray(jnp.zeros((3, how.width(256)), jnp.uint8), how)
    with pytest.raises(ValueError, match="x is .2, 512., but the weights are .3, 256."):
        contract_last(jnp.zeros((2, 512), jnp.bfloat16), weight)


def forget():
    for function in (compiled.library, can_multiply_quantized):
        function.cache_clear()


@pytest.fixture
def anew(tmp_path):
    """As if nothing had been compiled in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "default_cache", lambda: tmp_path)
        forget()
        yield tmp_path
    forget()
    # Now, and not in a test with a cache folder of its own: the handler of a library
    # that is compiled once more cannot be registered in place of the first.
    assert can_multiply_quantized()


@pytest.mark.parametrize("cxx", [None, "/bin/false"])
def test_without_a_working_compiler_xla_does_the_work(anew, monkeypatch, caplog, cxx):
    monkeypatch.setattr(compiled, "COMPILERS", ("no-such-compiler",))
    monkeypatch.setenv("CXX", cxx or "")
    assert not can_multiply_quantized()
    assert "the kernel products is not to be had" in caplog.text
    assert not list((anew / "kernels").glob("*"))


def test_what_is_compiled_is_kept(anew, monkeypatch):
    assert compiled.library(SOURCE) is not None
    (made,) = (anew / "kernels").iterdir()
    compiled.library.cache_clear()
    monkeypatch.setattr(compiled, "_compile", None)  # not called again
    assert compiled.library(SOURCE) is not None
    assert list((anew / "kernels").iterdir()) == [made]


@pytest.mark.parametrize(
    ("flags", "suits"),
    [
        ([], False),
        (compiled.NEEDED[1:], False),
        (compiled.NEEDED, True),
        ([*compiled.NEEDED, compiled.BETTER], False),
    ],
)
def test_the_kernel_is_for_processors_that_have_nothing_better(
    flags, suits, monkeypatch
):
    monkeypatch.setattr(compiled, "_processor_flags", lambda: frozenset(flags))
    monkeypatch.setattr(compiled.platform, "machine", lambda: "x86_64")
    assert compiled.is_wanted() == suits
    monkeypatch.setattr(compiled.platform, "machine", lambda: "aarch64")
    assert not compiled.is_wanted()
