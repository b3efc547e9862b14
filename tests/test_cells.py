"""A few cells of a product have all that meets in it."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import cells
from tests.cells import covering


@given(sizes=st.lists(st.integers(1, 4), min_size=3, max_size=5))
@pytest.mark.parametrize("runs_all", [False, True])
def test_all_pairs_meet_in_few_cells(sizes, runs_all):
    product = list(itertools.product(*map(range, sizes)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "RUNS_ALL", runs_all)
        found = covering(product)
    assert found == sorted(set(found))
    for one, other in itertools.combinations(range(len(sizes)), 2):
        pairs = {(cell[one], cell[other]) for cell in found}
        assert len(pairs) == sizes[one] * sizes[other]
    largest = sorted(sizes)[-2:]
    most = len(product) if runs_all else 2 * largest[0] * largest[1]
    assert len(found) <= most
