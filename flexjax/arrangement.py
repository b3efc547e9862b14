"""How prompts are put into blocks, and their batches behind what these begin with."""

import bisect
import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from flexjax.policy import Policy
from flexjax.workload import bucket, longest_first


class Group(NamedTuple):
    """Prompts that begin alike.

    Attributes:
        num_shared: tokens with which all of them begin, and that are computed once: a
            block, or a row where this is what one row holds. 0 where they share none.
        places: of the prompts.
    """

    num_shared: int
    places: Sequence[int]


class BlockShape(NamedTuple):
    """Batches of a block.

    Attributes:
        batch_size: rows of each.
        num_batches: of the block.
        prefix_ends: of batches that begin alike, the one behind the last.
    """

    batch_size: int
    num_batches: int
    prefix_ends: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block[T]:
    """What runs together.

    Attributes:
        batches: rows, or what stands for them; none has more than `batch_size`.
        batch_size: to which they are filled up.
        prefix_ends: see `BlockShape`.
        num_shared: tokens with which batches begin alike, for each of these ends.
    """

    batches: Sequence[Sequence[T]]
    batch_size: int
    prefix_ends: tuple[int, ...]
    num_shared: tuple[int, ...]

    @property
    def rows(self) -> list[T]:
        """Those of all batches."""
        return [row for batch in self.batches for row in batch]

    @property
    def shape(self) -> BlockShape:
        return BlockShape(self.batch_size, len(self.batches), self.prefix_ends)

    @property
    def num_spared(self) -> int:
        """Tokens that are not computed, as another row of the block has them too."""
        ends = (0, *self.prefix_ends)
        return sum(
            count * (sum(map(len, self.batches[first:end])) - 1)
            for first, end, count in zip(ends, ends[1:], self.num_shared, strict=False)
        )

    def shared_by(self, batch: int) -> int:
        """Tokens with which all rows of a batch begin."""
        return self.num_shared[bisect.bisect_right(self.prefix_ends, batch)]

    def of[U](self, rows: Sequence[U]) -> "Block[U]":
        """The same block of something else, that comes in the order of `rows`."""
        batches, first = [], 0
        for batch in self.batches:
            batches.append(rows[first : first + len(batch)])
            first += len(batch)
        return Block(
            batches=batches,
            batch_size=self.batch_size,
            prefix_ends=self.prefix_ends,
            num_shared=self.num_shared,
        )


def row_length(row: Group, lengths: Sequence[int], num_before: int = 0) -> int:
    """Tokens of a row of sequences of such lengths, behind a prefix of so many."""
    num_alike = max(row.num_shared, num_before)
    own = sum(lengths[place] - num_alike for place in row.places)
    return own + num_alike - num_before


def one_block[T](rows: Sequence[T], policy: Policy, num_shared: int = 0) -> Block[T]:
    """The block of rows that all begin with so many equal tokens."""
    batch_size = min(policy.batch_size, len(rows))
    batches = list(_cut(rows, batch_size))
    return Block(
        batches=batches,
        batch_size=batch_size,
        prefix_ends=(len(batches),),
        num_shared=(num_shared,),
    )


def blocks_of(
    groups: Sequence[Group], lengths: Sequence[int], policy: Policy
) -> list[Block[int]]:
    """Blocks of places, in the order in which they run.

    Those that share nothing come first, if there are any, the longest prompts before
    the others. Groups follow by the longest of what their prompts have of their own,
    each with its longest prompts first: so those of about the same length come
    together, and little is filled up.

    Args:
        groups: of all places.
        lengths: of whole prompts, by their place.
        policy: that blocks run under.
    """
    blocks: list[Block[int]] = []
    several: list[Group] = []
    for group in groups:
        order = longest_first([lengths[place] for place in group.places])
        places = [group.places[i] for i in order]
        if group.num_shared and len(groups) > 1:
            several.append(Group(group.num_shared, places))
        else:
            blocks += [
                one_block(some, policy, group.num_shared)
                for some in _cut(places, policy.block_size)
            ]
    return blocks + _behind_prefixes(several, lengths, policy)


def _behind_prefixes(
    groups: Sequence[Group], lengths: Sequence[int], policy: Policy
) -> list[Block[int]]:
    """Blocks of batches that each begin with what their group does.

    The longest prompt of a group is its first.
    """
    # Those whose rows or prefixes are filled up to about the same length come together.
    ordered = sorted(
        groups,
        key=lambda group: (
            bucket(lengths[group.places[0]] - group.num_shared),
            group.num_shared,
        ),
        reverse=True,
    )
    most = max((len(group.places) for group in groups), default=1)
    batch_size = min(policy.batch_size, most)
    batches = [
        (number, batch)
        for number, group in enumerate(ordered)
        for batch in _cut(group.places, batch_size)
    ]
    blocks = []
    for some in _cut(batches, policy.num_batches):
        count = Counter(number for number, _ in some)  # in their order
        blocks.append(
            Block(
                batches=[batch for _, batch in some],
                batch_size=batch_size,
                prefix_ends=tuple(itertools.accumulate(count.values())),
                num_shared=tuple(ordered[number].num_shared for number in count),
            )
        )
    return blocks


def shape_of(policy: Policy, num_rows: int, rows_per_prefix: int = 0) -> BlockShape:
    """Of a block of so many rows, of which so many begin alike; 0 stands for all.

    What fills up the last batch of those that begin alike counts as rows. Batches are
    as large as the policy's, though the engine makes none larger than a group is.
    """
    alike = min(rows_per_prefix or num_rows, num_rows)
    batch_size = min(policy.batch_size, num_rows)
    num_batches = min(policy.num_batches, math.ceil(num_rows / batch_size))
    each = math.ceil(alike / batch_size)
    ends = (*range(each, num_batches, each), num_batches)
    return BlockShape(batch_size, num_batches, ends)


def within(groups: Sequence[Group], places: Sequence[int]) -> list[Group]:
    """The groups of some places alone, each in the order in which it is here."""
    position = {place: number for number, place in enumerate(places)}
    found = [
        Group(group.num_shared, [position[p] for p in group.places if p in position])
        for group in groups
    ]
    return [group for group in found if group.places]


def _cut[T](rows: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for first in range(0, len(rows), size):
        yield rows[first : first + size]
