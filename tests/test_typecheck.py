"""Tests check shapes, or a wrong one would go by unseen."""

import importlib.util

import jax.numpy as jnp
import jaxtyping
import pytest

from flexjax.attention import prefill_attention


@pytest.mark.skipif(
    importlib.util.find_spec("beartype") is None,
    reason="without beartype nothing is checked",
)
def test_a_wrong_shape_or_type_is_caught():
    query, start = jnp.zeros((1, 2, 4, 8)), jnp.zeros(1, jnp.int32)
    assert prefill_attention(query, query, query, start).shape == query.shape
    with pytest.raises(jaxtyping.TypeCheckError):
        prefill_attention(query, query, query[:, :1], start)
    with pytest.raises(jaxtyping.TypeCheckError):
        prefill_attention(query, query, query, "many")
