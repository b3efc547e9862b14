"""Which rows wait for a block, and when running ones have to join them.

A block runs until its last row has ended. Where texts end by themselves, most of its
steps would serve a few rows that live long. So they are preempted by recomputation, as
vLLM calls it: the block ends, their cache is given up, and when there are enough of
them for a block, its prefill works on what each has so far. That gives the same tokens,
since decode is prefill, and tokens are drawn by prompt and number.
"""

import bisect
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from flexjax.blocks import Row, RowSize
from flexjax.policy import Policy, Schedule
from flexjax.workload import bucket


class Waiting:
    """Rows that wait for a block: those to be made yet, and those that were preempted.

    Args of the constructor:
        blocks: places of the rows to be made, in the order in which they run.
        make_rows: makes the rows of a block.
        policy: that blocks run under.
        fits: whether there is memory for a block of rows of such sizes; one row that
            was in a block always fits.
    """

    def __init__(
        self,
        blocks: Iterable[Sequence[int]],
        make_rows: Callable[[Sequence[int]], Sequence[Row]],
        *,
        policy: Policy,
        fits: Callable[[Sequence[RowSize]], bool],
    ) -> None:
        self._blocks, self._make_rows = deque(blocks), make_rows
        self._num_to_make = sum(map(len, self._blocks))
        self._block_size, self._fits = policy.block_size, fits
        # New tokens attend to less than a prefill would, or a batch has its turn alone.
        self._can_preempt = (
            policy.attention_sparsity == 1
            and policy.schedule is not Schedule.ROW_BY_ROW
        )
        self._preempted: list[Row] = []

    def next_block(self) -> Sequence[Row]:
        """The rows of the next block, taken away from here; none when there are none.

        Preempted rows come when they fill a block, or when nothing else is left.
        """
        if self._blocks and len(self._preempted) < self._block_size:
            places = self._blocks.popleft()
            self._num_to_make -= len(places)
            return self._make_rows(places)
        longest_first = sorted(self._preempted, key=lambda row: -row.size.prompt_len)
        sizes = [row.size for row in longest_first]
        counts = range(2, min(len(sizes), self._block_size) + 1)
        count = 1 + bisect.bisect_left(
            counts, True, key=lambda count: not self._fits(sizes[:count])
        )
        self._preempted = longest_first[count:]
        return longest_first[:count]

    def is_worth_preempting(self, alive: Sequence[Row], num_idle: int) -> bool:
        """Whether what is left of a block should wait with others instead.

        It should once idle rows have cost what recomputing the others will, if a token
        costs as much in a prefill as a row in a step. So, as where skis are rented
        until that has cost their price, no knowledge of when rows end would do much
        better. By count, with ends drawn in seven ways, a step takes less time for
        their tokens from 1.05 to 6 times where it waits for weights, and up to 1.1
        times more where it only multiplies and all rows end at about the same time.

        Args:
            alive: its rows that have not ended.
            num_idle: rows that had ended, summed over the steps of the block so far.
        """
        if not (alive and self._can_preempt):
            return False
        sizes = [row.size for row in alive]
        num_recomputed = len(sizes) * bucket(max(size.prompt_len for size in sizes))
        num_waiting = self._num_to_make + len(self._preempted)
        return (
            num_idle >= num_recomputed
            and num_waiting >= len(alive)  # or they would be as few as they are
            and self._fits(sizes)
        )

    def preempt(self, rows: Iterable[Row]) -> int:
        """Takes those of a block's rows that have not ended; returns their number."""
        alive = [row for row in rows if not row.has_ended]
        self._preempted += alive
        return len(alive)
