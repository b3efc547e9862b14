"""The rows of a block that is scored, which may hold several sequences each."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexjax.arrangement import Block, Group
from flexjax.attention import Branches
from flexjax.logprobs import ScoreState, finish_score, is_greedy, start_score
from flexjax.memory.layout import WeightLayout
from flexjax.outputs import Scores
from flexjax.padded_prompts import PaddedPrompts
from flexjax.policy import Policy
from flexjax.schedule.ops import Cell, is_prefix
from flexjax.steps import score_step
from flexjax.workload import Workload


def num_scored_inputs(sequence: Sequence[int]) -> int:
    """How many tokens of a sequence are computed to score it.

    They are all but the last: nobody asks what comes behind it. A lone token is
    computed, so that no row is empty, though nothing of it is scored.
    """
    return max(1, len(sequence) - 1)


def scored_inputs(sequence: Sequence[int]) -> Sequence[int]:
    """The first tokens of a sequence, so many as `num_scored_inputs` says."""
    return sequence[: num_scored_inputs(sequence)]


@dataclasses.dataclass(frozen=True)
class ScoredRow:
    """Sequences that begin alike: what they share, and behind it the rest of each.

    Attributes:
        sequences: of token ids, one or several.
        num_shared: tokens that the inputs of all of several sequences begin with, and
            that stand in the row once. One token more of the inputs is the same in all,
            so that even the last of these is scored once.
    """

    sequences: Sequence[Sequence[int]]
    num_shared: int

    @property
    def trunk_len(self) -> int:
        """Tokens before all branches; a lone sequence has its last input in one."""
        is_alone = len(self.sequences) == 1
        num_inputs = num_scored_inputs(self.sequences[0])
        return num_inputs - 1 if is_alone else self.num_shared

    @property
    def branch_lens(self) -> list[int]:
        """Tokens of the inputs of each sequence behind the trunk."""
        trunk_len = self.trunk_len
        return [num_scored_inputs(each) - trunk_len for each in self.sequences]

    @property
    def num_spared(self) -> int:
        """Tokens that are not computed, as another sequence of the row has them."""
        return self.trunk_len * (len(self.sequences) - 1)

    @property
    def tokens(self) -> list[int]:
        """Those of the row."""
        trunk = self.sequences[0][: self.trunk_len]
        branches = (
            scored_inputs(sequence)[self.trunk_len :] for sequence in self.sequences
        )
        return [*trunk, *itertools.chain.from_iterable(branches)]

    @property
    def targets(self) -> list[int]:
        """What comes behind each of `tokens`; behind a lone one, the token itself."""
        trunk = self.sequences[0][1 : self.trunk_len + 1]
        branches = (
            sequence[self.trunk_len + 1 :] if len(sequence) > 1 else sequence
            for sequence in self.sequences
        )
        return [*trunk, *itertools.chain.from_iterable(branches)]


def scored_rows(
    sequences: Sequence[Sequence[int]], rows: Sequence[Group], policy: Policy
) -> list[ScoredRow]:
    """Rows of the sequences that are at their places.

    Raises:
        ValueError: attention is sparse.
    """
    if policy.attention_sparsity < 1:
        raise ValueError(
            f"attention_sparsity={policy.attention_sparsity!r} acts on new tokens "
            "alone, so scores would not say what generating would: score with "
            "attention_sparsity=1.0"
        )
    return [
        ScoredRow([sequences[place] for place in row.places], row.num_shared)
        for row in rows
    ]


class ScoreRows:
    """Rows that are scored: logits of every slot become one log-probability each."""

    last_only = False

    def __init__(
        self, block: Block[ScoredRow], work: Workload, layout: WeightLayout
    ) -> None:
        self._head, self._work, self._block = layout.head, work, block
        # Targets lie as tokens do. Rows behind a prefix go on with the same token, as
        # branches do behind what a row shares: so the last slot of both has one target.
        self._padded, self._targets = (
            PaddedPrompts(block.of(of_rows), work, layout.config.pad_token_id)
            for of_rows in (
                [row.tokens for row in block.rows],
                [row.targets for row in block.rows],
            )
        )
        self._branches = {
            number: _branches(batch, (work.batch_size, work.prompt_slots(number)))
            for number, batch in enumerate(block.batches)
        }
        self._states: dict[int, ScoreState] = {}
        self._scores: dict[int, tuple[Any, Any]] = {}

    def token_ids(self, step: int, batch: int) -> np.ndarray:
        del step
        return self._padded.token_ids(batch)

    def start(self, batch: int) -> jax.Array:
        return self._padded.start(batch)

    def origin(self, batch: int) -> jax.Array:
        return self._padded.origin(batch)

    def branches(self, batch: int) -> Branches | None:
        return self._branches.get(batch)

    def read_head(
        self, cell: Cell, block: int, table: jax.Array, hidden: jax.Array
    ) -> Any:
        targets = jnp.asarray(self._targets.token_ids(cell.batch))
        state = self._states.pop(cell.batch, None)
        if state is None:
            state = start_score(targets)
        first_id = np.int32(block * self._head.rows)
        state, done = score_step(state, table, hidden, first_id, targets)
        if block + 1 < self._head.num_blocks:
            self._states[cell.batch] = state
            return done
        scores = finish_score(state), is_greedy(state)
        if is_prefix(cell.batch):
            self._scores[cell.batch] = scores
        return scores

    def _num_shared(self, batch: int) -> int:
        """Tokens of a batch's rows that stand in its prefix."""
        is_alone = self._work.prefix_of(batch) is None
        return 0 if is_alone else self._block.shared_by(batch)

    def take(self, batch: int, scores: Any) -> None:
        """Keeps the finished scores of a batch."""
        logprobs, are_greedy = scores
        self._scores[batch] = np.asarray(logprobs), np.asarray(are_greedy)

    def clear(self) -> None:
        """Lets go of the scores that a failed run left behind."""
        self._states.clear()

    def is_alive(self, batch: int) -> bool:
        """Scoring ends with the prefill."""
        del batch
        return False

    def results(self) -> list[Scores]:
        """Of each sequence of each row, in their order."""
        found = []
        for number, batch in enumerate(self._block.batches):
            num_before, prefix = self._num_shared(number), self._work.prefix_of(number)
            before = []
            if prefix is not None:
                before.append(_last(self._scores[prefix], 0, num_before))
            for place, row in enumerate(batch):
                first = row.trunk_len - num_before
                num_own = first + sum(row.branch_lens)
                own = _last(self._scores[number], place, num_own)
                trunk = [*before, own.between(0, first)]
                for sequence, count in zip(row.sequences, row.branch_lens, strict=True):
                    # A lone token has a slot, but no score.
                    num_scored = len(sequence) - 1 - row.trunk_len
                    branch = own.between(first, first + num_scored)
                    found.append(_joined([*trunk, branch]))
                    first += count
        return found


def _branches(rows: Sequence[ScoredRow], size: tuple[int, int]) -> Branches | None:
    """Of the rows of a batch that has `size`.

    Returns:
        None where each row has one sequence.
    """
    if all(len(row.sequences) == 1 for row in rows):
        return None
    num_slots = size[1]
    trunk_end = np.full(size[0], num_slots, np.int32)
    begin = np.full(size, num_slots, np.int32)
    for place, row in enumerate(rows):
        first = num_slots - sum(row.branch_lens)
        trunk_end[place] = begin[place] = first
        for count in row.branch_lens:
            begin[place, first : first + count] = first
            first += count
    return Branches(jnp.asarray(trunk_end), jnp.asarray(begin))


def _last(scores: tuple[Any, Any], place: int, count: int) -> Scores:
    """Of the last slots of a row."""
    row = Scores(*(np.asarray(each)[place] for each in scores))
    num_slots = len(row.logprobs)
    return row.between(num_slots - count, num_slots)


def _joined(parts: Sequence[Scores]) -> Scores:
    return Scores(*map(np.concatenate, zip(*parts, strict=True)))
