"""Which cells of a product of settings are run, where there are too many of them."""

import itertools
import os
from collections.abc import Iterable, Sequence
from typing import Any

# With FLEXJAX_ALL_CELLS=1 all are run, for which there is no time in every change.
RUNS_ALL = os.environ.get("FLEXJAX_ALL_CELLS") == "1"


def every_other[Cell](cells: Iterable[Cell]) -> list[Cell]:
    """The first, the third and so on."""
    return [*cells] if RUNS_ALL else [*cells][::2]


def covering[Cell: Sequence[Any]](cells: Iterable[Cell]) -> list[Cell]:
    """Cells in which each pair of values meets that meets in any, in their order.

    Most faults need no more than two or three settings to come together (Kuhn, Wallace
    and Gallo, IEEE TSE 30(6), 2004), and few cells have all pairs: here the one that
    has most of those that are still missing comes next, as in AETG (Cohen et al., IEEE
    TSE 23(7), 1997).
    """
    waiting = list(cells)
    if RUNS_ALL or not waiting:
        return waiting
    pairs = list(itertools.combinations(range(len(waiting[0])), 2))
    meetings = [
        {(i, str(cell[i]), j, str(cell[j])) for i, j in pairs} for cell in waiting
    ]
    missing, found = set().union(*meetings), []
    while missing:
        best = max(range(len(waiting)), key=lambda i: len(meetings[i] & missing))
        missing -= meetings[best]
        found.append(best)
    return [waiting[i] for i in sorted(found)]
