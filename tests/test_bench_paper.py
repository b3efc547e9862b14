"""The cost model, with the figures of the paper's machine, gives what was published."""

import pytest

from bench.paper import PAPER, predicted, searched
from flexjax.policy import validate


@pytest.mark.parametrize("published", PAPER, ids=lambda row: row.model)
def test_the_paper_s_throughputs_are_predicted_within_a_quarter(published):
    assert validate(published.policy) == published.policy
    found = predicted(published).tokens_per_s
    assert found == pytest.approx(published.tokens_per_s, rel=0.25)


@pytest.mark.parametrize("published", PAPER, ids=lambda row: row.model)
def test_a_barrier_makes_nothing_much_faster(published):
    free, waiting = (predicted(published, barrier=barrier) for barrier in (False, True))
    assert waiting.total_s >= 0.97 * free.total_s


@pytest.mark.parametrize("published", PAPER, ids=lambda row: row.model)
def test_what_is_searched_is_as_good_as_what_the_paper_chose(published):
    """Although a plan leaves a reserve of the memory that the paper fills."""
    found = searched(published).prediction.tokens_per_s
    assert found >= predicted(published).tokens_per_s
