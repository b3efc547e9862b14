"""Weights that are multiplied with as they are quantized give what wide ones give."""

from unittest import mock

import numpy as np
import pytest

from flexjax import LLM, Placement, Policy, SamplingParams
from flexjax.kernels.products import PRODUCTS
from flexjax.memory import link
from flexjax.policy import Tier

pytestmark = [
    pytest.mark.skipif(
        not PRODUCTS.is_there(),
        reason="no processor for the kernel, or no compiler",
    ),
    pytest.mark.xdist_group("narrow"),
]

PROMPTS = [[5, 6, 7, 8, 9, 10, 11] * 3, [20, 30, 40, 50] * 4, [300, 301, 302]]
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
PLACEMENTS = {
    "device": Placement(device=1.0),
    "host": Placement(host=1.0),
    "disk": Placement(),
    "mixed": Placement(device=0.3, host=0.3),
}


def outcome(policy):
    """Log-probabilities of all prompts, new tokens, and bytes of weights."""
    with LLM(None, policy=policy) as llm:
        scores = llm.score(PROMPTS)
        outputs = llm.generate(PROMPTS, GREEDY)
        peak, predicted = (
            llm.metrics[name] for name in ("peak_bytes", "predicted_peak_bytes")
        )
        for tier in Tier:
            assert peak[tier.value] <= predicted[tier.value]
        return scores, [out.outputs[0].token_ids for out in outputs], peak["device"]


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(("bits", "cache_bits"), [(4, None), (8, 4)])
def test_narrow_weights_give_what_wide_ones_give(
    bits, cache_bits, placement, monkeypatch
):
    policy = Policy(
        weights=PLACEMENTS[placement],
        kv_cache=Placement(host=0.5),
        weight_bits=bits,
        kv_cache_bits=cache_bits,
        batch_size=2,
        num_batches=2,
    )
    narrow = outcome(policy)
    monkeypatch.setattr(link, "PRODUCTS", mock.Mock(**{"is_there.return_value": False}))
    wide = outcome(policy)
    for found, expected in zip(narrow[0], wide[0], strict=True):
        np.testing.assert_allclose(found, expected, atol=0.02)
    assert narrow[1] == wide[1]
    assert narrow[2] < wide[2]  # nothing is made wide
