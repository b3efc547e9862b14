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

from flexjax.arrangement import Block, one_block
from flexjax.blocks import Row, RowSize
from flexjax.policy import Policy, Schedule
from flexjax.workload import bucket, padded_alike

NUM_SIZES = 8  # of batches that are not full


class Waiting:
    """Rows that wait for a block: those to be made yet, and those that were preempted.

    Args of the constructor:
        blocks: places of the rows to be made, in the order in which they run.
        make_rows: makes rows, given their places.
        policy: that blocks run under.
        fits: whether there is memory for a block of rows of such sizes; if so, also for
            one of fewer of them.
        num_shared: tokens with which all rows begin, and that are not recomputed for
            each.
        may_preempt: whether rows may be preempted at all.
    """

    def __init__(
        self,
        blocks: Iterable[Block[int]],
        make_rows: Callable[[Sequence[int]], Sequence[Row]],
        *,
        policy: Policy,
        fits: Callable[[Sequence[RowSize]], bool],
        num_shared: int = 0,
        may_preempt: bool = True,
    ) -> None:
        self._blocks, self._make_rows = deque(blocks), make_rows
        self._num_to_make = sum(len(block.rows) for block in self._blocks)
        self._policy, self._fits = policy, fits
        self._num_shared = num_shared
        # Steps are compiled for a size of batches, so few sizes are to occur.
        self._quantum = -(-policy.batch_size // NUM_SIZES)
        # New tokens attend to less than a prefill would, or a batch has its turn alone.
        self._can_preempt = (
            may_preempt
            and policy.attention_sparsity == 1
            and policy.schedule is not Schedule.ROW_BY_ROW
        )
        self._preempted: list[Row] = []

    def next_block(self) -> Block[Row] | None:
        """The next block, whose rows are taken away from here; None if there is none.

        Preempted rows come when they fill a block, or when nothing else is left.
        """
        if self._blocks and len(self._preempted) < self._policy.block_size:
            block = self._blocks.popleft()
            places = block.rows
            self._num_to_make -= len(places)
            return block.of(self._make_rows(places))
        if not self._preempted:
            return None
        longest_first = sorted(self._preempted, key=lambda row: -row.size.prompt_len)
        count = self._num_that_fit([row.size for row in longest_first])
        self._preempted = longest_first[count:]
        return one_block(longest_first[:count], self._policy, self._num_shared)

    def _num_that_fit(self, sizes: Sequence[RowSize]) -> int:
        """How many of the first of these rows a block takes."""
        most = min(len(sizes), self._policy.block_size)
        step = self._quantum
        counts = [*range(1, min(step, most)), *range(step, most, step), most]
        place = bisect.bisect_left(
            counts, True, lo=1, key=lambda count: not self._fits(sizes[:count])
        )
        return counts[place - 1]

    def is_worth_preempting(self, rows: Sequence[Row], num_idle: int) -> bool:
        """Whether what is left of a block should wait with others instead.

        It should once idle rows have cost what recomputing the others will, as skis
        are rented until that has cost their price, unless the rest can cost no more:
        then no more is spent on recomputing than was on idle rows. A token of a prefill
        is taken to cost as much as a row of a step, which is too much where steps wait
        for weights or caches; and a row is taken to be as idle if all its batch has
        ended, which is right there, and wrong where steps only multiply.

        Args:
            rows: of the block.
            num_idle: rows that had ended, summed over the steps of the block so far.
        """
        alive = [row for row in rows if not row.has_ended]
        if not (alive and self._can_preempt):
            return False
        # Most are about to get one more token, in batches whose step is not over. What
        # is to come is rounded, so that `fits` is seldom asked something new.
        sizes = [
            RowSize(size.prompt_len + 1, bucket(size.max_tokens))
            for size in sorted((row.size for row in alive), reverse=True)
        ]
        own = [size.prompt_len - self._num_shared for size in sizes]
        padded = padded_alike(own[:: self._policy.batch_size])
        num_recomputed = sum(
            padded[place // self._policy.batch_size] for place in range(len(own))
        )
        most_to_come = max(row.size.max_tokens for row in alive)
        num_waiting = self._num_to_make + len(self._preempted)
        return (
            num_idle >= num_recomputed
            and (len(rows) - len(alive)) * most_to_come >= num_recomputed
            and num_waiting >= len(alive)  # or they would be as few as they are
            and self._fits(sizes)
        )

    def preempt(self, rows: Iterable[Row]) -> int:
        """Takes those of a block's rows that have not ended; returns their number."""
        alive = [row for row in rows if not row.has_ended]
        self._preempted += alive
        return len(alive)
