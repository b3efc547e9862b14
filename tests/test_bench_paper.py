"""The cost model, with the figures of the paper's machine, gives what was published."""

import pytest

from bench.paper import PAPER, predicted, searched
from flexjax.policy import validate
from tests.cells import RUNS_ALL


@pytest.mark.parametrize("published", PAPER, ids=lambda row: row.model)
def test_the_paper_s_throughputs_are_predicted_within_a_quarter(published):
    assert validate(published.policy) == published.policy
    found = predicted(published).tokens_per_s
    assert found == pytest.approx(published.tokens_per_s, rel=0.25)


def test_a_barrier_slows_down_what_overlaps_and_makes_nothing_much_faster():
    ratios = [
        predicted(row, barrier=True).total_s / predicted(row, barrier=False).total_s
        for row in PAPER
    ]
    assert min(ratios) >= 0.97
    assert max(ratios) > 1


@pytest.mark.skipif(not RUNS_ALL, reason="half a minute each: with FLEXJAX_ALL_CELLS=1")
@pytest.mark.parametrize("published", PAPER, ids=lambda row: row.model)
def test_what_is_searched_is_as_good_as_what_the_paper_chose(published):
    """Although a plan leaves a reserve of the memory that the paper fills."""
    found = searched(published).prediction.tokens_per_s
    assert found >= predicted(published).tokens_per_s
