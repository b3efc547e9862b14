"""Which prompts begin alike, and which of these are worth computing once."""

import functools
import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from flexjax.arrangement import Group

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
        self._lengths: list[int] = []
        self._num_kept = 0

    def add(self, prompt: Sequence[int]) -> None:
        """Takes the next prompt, which is at the next place."""
        place, node = len(self._lengths), self._root
        self._lengths.append(len(prompt))
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

    def _choose(
        self, node: _Node, below: Sequence[_Choice], gen_len: int, batch_size: int
    ) -> _Choice:
        """What is best for the prompts that begin as `node` says."""
        lengths = [self._lengths[place] for place in node.places]
        of_node = _Count(len(lengths), sum(lengths), min(lengths, default=sys.maxsize))
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
