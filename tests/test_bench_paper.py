"""The cost model, with the figures of the paper's machine, gives what was published."""

import pytest

from bench.paper import PAPER, predicted_tokens_per_s
from flexjax.policy import validate


@pytest.mark.parametrize("published", PAPER, ids=lambda row: row.model)
def test_the_paper_s_throughputs_are_predicted_within_a_quarter(published):
    assert validate(published.policy) == published.policy
    found, _ = predicted_tokens_per_s(published)
    assert found == pytest.approx(published.tokens_per_s, rel=0.25)
