"""Which prompts begin alike, and what of that is worth computing once."""

import functools
import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from flexjax.arrangement import Group, row_length

# Fewer tokens that prompts have in common are left where they are: they would save
# little beside what it takes to compile steps for their shapes.
LEAST_SHARED = 64
# What sharing costs is counted in tokens of a prompt: that a new one takes as long as
# so many, since its step waits for weights or caches; and that a pass over the weights,
# of which a block makes one a token, takes as long as so many. All of these are
# choices, not rates of a particular machine: the more is saved, the less they matter.
TOKENS_OF_A_NEW_ONE = 8
TOKENS_OF_A_PASS = 2048
# Rows of a batch whose size is still to be planned: one of fewer takes about as long,
# since it reads the same weights.
LEAST_BATCH = 32
PASSES_OF_A_LOAD = 16  # over the weights: what it takes to load them for another policy
# Tokens that are kept of all prompts, so that millions of them fit in memory; a node is
# taken to be as large as so many. What comes later can still begin as others do.
MOST_KEPT = 1 << 24
TOKENS_OF_A_NODE = 64

# Where sequences are scored in one row, tokens attend to all of it, and those of other
# branches count for nothing. In a row of so many tokens attention takes as long as all
# products: six times the hidden size, which is 2048 in OPT-1.3B; half of that, since
# attention is further from what a machine can do.
TOKENS_OF_ATTENTION = 6144
LEAST_SPARED = 1 / 8  # of the time of their rows, for sequences to be put into one


class _Node:
    """Prompts that begin alike, and how they go on."""

    __slots__ = ("children", "depth", "places", "tokens")

    def __init__(self, tokens: np.ndarray, depth: int) -> None:
        self.tokens, self.depth = tokens, depth  # behind the parent's; of all so far
        self.children: dict[int, _Node] = {}  # by their first token
        self.places: list[int] = []  # of prompts that go on in no child

    def divide(self, count: int) -> None:
        """Makes what comes behind so many of its tokens a child of its own."""
        rest = _Node(self.tokens[count:], self.depth)
        rest.children, rest.places = self.children, self.places
        self.depth -= len(self.tokens) - count
        self.tokens = self.tokens[:count]
        self.children, self.places = {int(rest.tokens[0]): rest}, []


class _Count(NamedTuple):
    """How many prompts there are, their tokens, and those of the shortest."""

    prompts: int = 0
    tokens: int = 0
    shortest: int = sys.maxsize

    def joined(self, other: "_Count") -> "_Count":
        return _Count(
            self.prompts + other.prompts,
            self.tokens + other.tokens,
            min(self.shortest, other.shortest),
        )

    def num_shared(self, depth: int) -> int:
        """Of `depth` tokens those that are no prompt's last, which is its own."""
        return min(depth, self.shortest - 1)

    def cost(self, gen_len: int, *, num_shared: int = 0, batch_size: int = 1) -> float:
        """Of a group: what it shares, and what each row of its batches has besides."""
        if not self.prompts:
            return 0.0
        own = self.tokens / self.prompts - num_shared
        num_rows = batch_size * math.ceil(self.prompts / batch_size)
        return num_shared + num_rows * (own + TOKENS_OF_A_NEW_ONE * gen_len)


class _Rows(NamedTuple):
    """What is best for the sequences of a node and those below it, by themselves."""

    everyone: _Count
    places: list[int]
    rows: list[Group]
    cost: float  # of the rows


class _Choice(NamedTuple):
    """What is best for the prompts of a node and those below it."""

    everyone: _Count
    groups: list[Group]
    cost: float  # of the groups
    rest: list[int]  # places of those in none
    of_rest: _Count


class SharedPrefixes:
    """A radix tree of many prompts, which are told one by one."""

    def __init__(self) -> None:
        self._root = _Node(np.empty(0, np.int32), 0)
        self._known: list[int] = []  # tokens of each prompt that the tree may have
        self._lengths: list[int] = []
        self._num_kept = 0

    def add(self, prompt: Sequence[int], num_tokens: int | None = None) -> None:
        """Takes the next prompt, which is at the next place.

        If `num_tokens` are given, it goes on to have so many.
        """
        place, node = len(self._lengths), self._root
        self._known.append(len(prompt))
        self._lengths.append(len(prompt) if num_tokens is None else num_tokens)
        rest = np.asarray(prompt, np.int32)
        while len(rest):
            child = node.children.get(int(rest[0]))
            if child is None:
                if self._num_kept < MOST_KEPT:
                    self._num_kept += TOKENS_OF_A_NODE + len(rest)
                    # A copy: a view would keep all of the prompt.
                    child = _Node(rest.copy(), node.depth + len(rest))
                    node.children[int(rest[0])] = node = child
                break  # else it is told apart no further
            count = _num_alike(child.tokens, rest)
            if count < len(child.tokens):
                child.divide(count)
                self._num_kept += TOKENS_OF_A_NODE
            node, rest = child, rest[count:]
        node.places.append(place)

    def groups(self, gen_len: int, batch_size: int | None = None) -> list[Group]:
        """Groups of all places, the last of which may share nothing.

        From the longest beginnings to the shortest: prompts that are in no group yet
        make one, or they all do, or none, whichever costs least.

        Args:
            gen_len: tokens that each prompt gets.
            batch_size: rows to which the last batch of each group is filled up, if
                there are as many; None where it is planned for these groups.
        """
        # The rest has blocks of its own, and where it is planned a policy of its own.
        num_passes = gen_len + (0 if batch_size else PASSES_OF_A_LOAD)
        everyone = range(len(self._lengths))
        if len(everyone) < 2:
            return [Group(0, everyone)]
        batch_size = min(batch_size or LEAST_BATCH, len(everyone))
        found: dict[int, _Choice] = {}
        for node in _children_first(self._root):
            below = [found.pop(id(child)) for child in node.children.values()]
            found[id(node)] = self._choose(node, below, gen_len, batch_size)
        best = found[id(self._root)]
        groups, cost = best.groups, best.cost
        if best.rest:
            groups = [*groups, Group(0, sorted(best.rest))]
            cost += best.of_rest.cost(gen_len) + TOKENS_OF_A_PASS * num_passes
        common = best.everyone.num_shared(self._depth())
        common = common if common >= LEAST_SHARED else 0
        # Nothing is filled up where all are in one group.
        if best.everyone.cost(gen_len, num_shared=common) <= cost:
            return [Group(common, everyone)]
        return groups

    def rows(self, most: int) -> list[Group]:
        """All places, in rows of up to `most` tokens that each have a sequence or more.

        Those that begin alike share a row where all of them fit into it, and where it
        is counted to spare enough; each row's group shares the tokens that its
        sequences have in common, but for one, see `ScoredRow`.
        """
        found: dict[int, _Rows] = {}
        for node in _children_first(self._root):
            below = [found.pop(id(child)) for child in node.children.values()]
            found[id(node)] = self._rows(node, below, most)
        return found[id(self._root)].rows

    def _rows(self, node: _Node, below: Sequence[_Rows], most: int) -> _Rows:
        alone = [Group(0, [place]) for place in node.places]
        everyone = _joined([self._count(node), *(each.everyone for each in below)])
        places = [*node.places, *(place for each in below for place in each.places)]
        cost = sum(each.cost for each in below)
        cost += sum(row_cost(self._lengths[place]) for place in node.places)
        num_shared = node.depth - 1
        num_tokens = everyone.tokens - num_shared * (everyone.prompts - 1)
        together = row_cost(num_tokens)
        if num_shared > 0 and num_tokens <= most and is_spared(together, cost):
            return _Rows(everyone, places, [Group(num_shared, places)], together)
        rows = [*alone, *(row for each in below for row in each.rows)]
        return _Rows(everyone, places, rows, cost)

    def _count(self, node: _Node) -> _Count:
        """Of a node's own prompts."""
        return _Count(
            len(node.places),
            sum(self._lengths[place] for place in node.places),
            min((self._known[place] for place in node.places), default=sys.maxsize),
        )

    def _choose(
        self, node: _Node, below: Sequence[_Choice], gen_len: int, batch_size: int
    ) -> _Choice:
        """What is best for the prompts that begin as `node` says."""
        of_node = self._count(node)
        choice = _Choice(
            everyone=_joined([of_node, *(each.everyone for each in below)]),
            groups=[group for each in below for group in each.groups],
            cost=sum(each.cost for each in below),
            rest=[place for each in below for place in each.rest] + node.places,
            of_rest=_joined([of_node, *(each.of_rest for each in below)]),
        )
        best, found = choice.cost + choice.of_rest.cost(gen_len), choice
        for groups, before, count in (
            (choice.groups, choice.cost, choice.of_rest),
            ([], 0.0, choice.everyone),
        ):
            shared = count.num_shared(node.depth)
            if count.prompts < 2 or shared < LEAST_SHARED:
                continue
            cost = before + count.cost(
                gen_len, num_shared=shared, batch_size=batch_size
            )
            if cost < best:
                of_others = [] if groups else [g.places for g in choice.groups]
                places = sorted(itertools.chain(choice.rest, *of_others))
                best, found = (
                    cost,
                    choice._replace(
                        groups=[*groups, Group(shared, places)],
                        cost=cost,
                        rest=[],
                        of_rest=_Count(),
                    ),
                )
        return found

    def _depth(self) -> int:
        """With how many tokens all prompts begin."""
        node = self._root
        while len(node.children) == 1 and not node.places:
            (node,) = node.children.values()
        return node.depth


def rows_of(
    sequences: Sequence[Sequence[int]], most: int, batch_size: int | None = None
) -> tuple[list[Group], list[Group]]:
    """Rows in which sequences are scored, and groups of these rows.

    Few sequences that begin alike share a row, and many rows a prefix.

    Args:
        sequences: of token ids, those that are computed, see `scored_inputs`.
        most: tokens of a row of several.
        batch_size: if there is a policy.

    Returns:
        Groups of places in `sequences`, one for each row, and groups of places in
        these, see `Engine.score_blocks`.
    """
    tree, shared = SharedPrefixes(), SharedPrefixes()
    for sequence in sequences:
        tree.add(sequence)
    rows, lengths = tree.rows(most), list(map(len, sequences))
    for row in rows:
        begin = sequences[row.places[0]]
        if len(row.places) > 1:
            begin = begin[: row.num_shared + 2]  # the rest is not the whole row's
        shared.add(begin, row_length(row, lengths))
    divided: list[Group] = []
    groups: list[Group] = []
    for group in shared.groups(1, batch_size):
        # What follows the last token that is shared has to be the same too.
        num_shared, first = max(0, group.num_shared - 1), len(divided)
        for place in group.places:
            alone = [Group(0, [one]) for one in rows[place].places]
            each, together = (
                sum(row_cost(row_length(row, lengths, num_shared)) for row in some)
                for some in (alone, [rows[place]])
            )
            divided += [rows[place]] if is_spared(together, each) else alone
        groups.append(Group(num_shared, range(first, len(divided))))
    return divided, groups


def row_cost(num_tokens: int) -> float:
    """Of scoring a row, in tokens that attend to nothing."""
    return num_tokens + num_tokens * num_tokens / TOKENS_OF_ATTENTION


def is_spared(together: float, apart: float) -> bool:
    """Whether sequences take so much less in a row than in rows of their own."""
    return together <= (1 - LEAST_SPARED) * apart


def _joined(counts: Iterable[_Count]) -> _Count:
    return functools.reduce(_Count.joined, counts, _Count())


def _children_first(root: _Node) -> Iterator[_Node]:
    """All nodes, each behind those below it; however deep the tree is."""
    found, waiting = [], [root]
    while waiting:
        node = waiting.pop()
        found.append(node)
        waiting += node.children.values()
    return reversed(found)


def _num_alike(one: np.ndarray, other: np.ndarray) -> int:
    """With how many equal tokens two begin."""
    least = min(len(one), len(other))
    different = np.flatnonzero(one[:least] != other[:least])
    return int(different[0]) if len(different) else least
