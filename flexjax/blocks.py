"""The rows of a block that generates: what goes in, and what comes of the logits."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flexjax.arrangement import Block
from flexjax.attention import Branches
from flexjax.logprobs import TokenLogprobs, token_logprobs
from flexjax.memory.layout import WeightLayout
from flexjax.memory.ledger import Ledger
from flexjax.models.config import OPTConfig
from flexjax.outputs import Logprob
from flexjax.padded_prompts import PaddedPrompts
from flexjax.policy import Kind, Tier
from flexjax.sampling import make_controls, penalize, pick_sampler, row_keys
from flexjax.sampling_params import SamplingParams
from flexjax.schedule.ops import Cell
from flexjax.steps import head_step
from flexjax.stopping import StopChecker
from flexjax.workload import Workload, bucket


class RowSize(NamedTuple):
    """What a row is given room for, in tokens."""

    prompt_len: int
    max_tokens: int


@dataclasses.dataclass
class Row:
    """One prompt on its way: its tokens, and where it will end."""

    index: int  # among all prompts of the call
    prompt: Sequence[int]
    params: SamplingParams
    checker: StopChecker
    logprobs: list[dict[int, Logprob]] = dataclasses.field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        """All tokens so far: what a block that goes on with the row begins with."""
        return [*self.prompt, *self.checker.token_ids]

    @property
    def size(self) -> RowSize:
        """Of what a block begins with, and what is still to come."""
        num_done = len(self.checker.token_ids)
        return RowSize(len(self.prompt) + num_done, self.params.max_tokens - num_done)

    @property
    def has_ended(self) -> bool:
        return self.checker.finish is not None


class GenerateRows:
    """Rows that generate: logits of the last slot become the next token.

    A block ends when its rows have ended, or earlier where `is_worth_preempting` says
    so, given them and how many had ended, summed over the steps so far.
    """

    last_only = True

    def __init__(
        self,
        block: Block[Row],
        work: Workload,
        layout: WeightLayout,
        *,
        seed: int,
        ledger: Ledger,
        on_tokens: Callable[[int], None],
        is_worth_preempting: Callable[[Sequence[Row], int], bool],
    ) -> None:
        self._rows, self._head = block.rows, layout.head
        config = layout.config
        self._ledger, self._on_tokens = ledger, on_tokens
        self._is_worth_preempting = is_worth_preempting
        self._num_steps = [0] * work.num_batches  # that each batch has its tokens of
        self._num_idle, self._is_over = 0, False
        prompts = block.of([row.tokens for row in self._rows])
        self._padded = PaddedPrompts(prompts, work, config.pad_token_id)
        self._batches = [
            _BatchSampler(rows, work, config, seed=seed) for rows in block.batches
        ]
        self._logits: dict[int, list[jax.Array]] = {}

    def token_ids(self, step: int, batch: int) -> np.ndarray:
        if step == 0:
            return self._padded.token_ids(batch)
        return self._batches[batch].newest[:, None]

    def start(self, batch: int) -> jax.Array:
        return self._padded.start(batch)

    def origin(self, batch: int) -> jax.Array:
        return self._padded.origin(batch)

    def branches(self, batch: int) -> Branches | None:
        del batch  # each of whose rows is one prompt
        return None

    def read_head(
        self, cell: Cell, block: int, table: jax.Array, hidden: jax.Array
    ) -> Any:
        logits = head_step(table, hidden)
        self._ledger.hold(Tier.DEVICE, Kind.ACTIVATIONS, logits.nbytes)
        blocks = self._logits.setdefault(cell.batch, [])
        blocks.append(logits)
        if block + 1 < self._head.num_blocks:
            return logits
        whole = blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)
        sampled = self._batches[cell.batch].sample(whole)
        self._let_go(cell.batch)
        return sampled

    def clear(self) -> None:
        """Lets go of the logits that a failed run left behind."""
        for batch in list(self._logits):
            self._let_go(batch)

    def _let_go(self, batch: int) -> None:
        nbytes = sum(logits.nbytes for logits in self._logits.pop(batch))
        self._ledger.hold(Tier.DEVICE, Kind.ACTIVATIONS, -nbytes)

    def take(self, batch: int, sampled: Any) -> None:
        """Hands the sampled tokens of a batch to its rows, which may end with them."""
        self._on_tokens(self._batches[batch].take(*sampled))
        # Asked by the first batch of a step, so that all batches end with the same one.
        is_first = self._num_steps[batch] == max(self._num_steps)
        self._num_steps[batch] += 1
        if is_first and not self._is_over:
            self._num_idle += sum(row.has_ended for row in self._rows)
            self._is_over = self._is_worth_preempting(self._rows, self._num_idle)

    def is_alive(self, batch: int) -> bool:
        """Whether the batch goes on: some row of it wants another token."""
        has_ended = all(row.has_ended for row in self._batches[batch].rows)
        return not (has_ended or self._is_over)


class _BatchSampler:
    """Chooses the tokens of one batch, for each row as its parameters say."""

    def __init__(
        self, rows: Sequence[Row], work: Workload, config: OPTConfig, *, seed: int
    ) -> None:
        self.rows, self._work = rows, work
        self.newest = np.full(work.batch_size, config.pad_token_id, np.int32)
        self._pad = config.pad_token_id
        missing = work.batch_size - len(rows)
        params = [row.params for row in rows]
        params += [SamplingParams(temperature=0.0)] * missing
        self._params = params
        indices = [row.index for row in rows] + [0] * missing
        self._keys = row_keys(params, indices, seed=seed)
        self._sampler = pick_sampler(params)
        self._penalized = any(row.repetition_penalty != 1.0 for row in params)
        wanted = [row.logprobs for row in params if row.logprobs is not None]
        self._num_top = max(wanted) if wanted else None

    def sample(
        self, logits: jax.Array
    ) -> tuple[jax.Array, TokenLogprobs | None, jax.Array]:
        """Dispatches the choice of one token a row.

        Returns:
            Token ids, their log-probabilities if a row wants any, and which rows have
            logits that are numbers.
        """
        is_finite = jnp.isfinite(jnp.max(logits, axis=-1))
        steps = np.zeros(self._work.batch_size, np.int32)
        steps[: len(self.rows)] = [len(row.checker.token_ids) for row in self.rows]
        controls = make_controls(self._params, self._keys, steps)
        weighed = logits
        if self._penalized:
            penalty = controls.repetition_penalty
            weighed = penalize(logits, jnp.asarray(self._seen()), penalty)
        ids = self._sampler(weighed, controls)
        if self._num_top is None:
            return ids, None, is_finite
        num_top = min(self._num_top, logits.shape[-1])
        return ids, token_logprobs(logits, ids, num_top=num_top), is_finite

    def take(
        self, ids: jax.Array, logprobs: TokenLogprobs | None, is_finite: jax.Array
    ) -> int:
        """Gives each row its token; returns how many rows took one.

        Raises:
            ValueError: the logits of a row that wants a token are not numbers.
        """
        tokens, are_finite, count = np.asarray(ids), np.asarray(is_finite), 0
        for place, row in enumerate(self.rows):
            if not (row.has_ended or are_finite[place]):
                raise ValueError(
                    f"the logits of prompt {row.index} are not finite after "
                    f"{len(row.checker.token_ids)} tokens; the weights may be damaged, "
                    "or their dtype overflows: try dtype='bfloat16' or 'float32'"
                )
        table = None if logprobs is None else jax.tree.map(np.asarray, logprobs)
        self.newest = np.full_like(self.newest, self._pad)
        for place, row in enumerate(self.rows):
            if row.has_ended:
                continue
            token = int(tokens[place])
            if table is not None and row.params.logprobs is not None:
                row.logprobs.append(_entry(table, place, token, row.params.logprobs))
            row.checker.push(token)
            self.newest[place] = token
            count += 1
        return count

    def _seen(self) -> np.ndarray:
        """Int32 `[batch, length]`: the tokens of each row so far, padded with -1."""
        found = [row.tokens for row in self.rows]
        length = bucket(max(map(len, found)))
        seen = np.full((self._work.batch_size, length), -1, np.int32)
        for place, tokens in enumerate(found):
            seen[place, : len(tokens)] = tokens
        return seen


def _entry(
    table: TokenLogprobs, place: int, token: int, num_top: int
) -> dict[int, Logprob]:
    """The table of one token: the most likely ones, and the one that was chosen."""
    entry = {
        int(table.top_ids[place, rank]): Logprob(
            logprob=float(table.top_logprobs[place, rank]), rank=rank + 1
        )
        for rank in range(min(num_top, table.top_ids.shape[1]))
    }
    chosen = Logprob(logprob=float(table.logprob[place]), rank=int(table.rank[place]))
    return entry | {token: chosen}
