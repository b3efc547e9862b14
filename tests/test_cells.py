"""A few cells of a product have all that meets in it."""

import itertools
import math

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
    for chosen in itertools.combinations(range(len(sizes)), 2):
        met = {tuple(cell[i] for i in chosen) for cell in found}
        assert len(met) == math.prod(sizes[i] for i in chosen)
    least = math.prod(sorted(sizes)[-2:])
    assert least <= len(found) <= (len(product) if runs_all else 2 * least)
