"""The front door: text or token ids in, text and log-probabilities out."""

import contextlib
import functools
import math
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from checkpoints_tools.progress import progress_bar
from checkpoints_tools.resolve import resolve_for
from flexjax.arrangement import Group, row_length
from flexjax.blocks import Row
from flexjax.cache_folder import default_cache
from flexjax.checkpoint import EMBEDDED_MODEL, open_store
from flexjax.engine import Engine
from flexjax.memory.lanes import Span
from flexjax.outputs import RequestOutput, Scores
from flexjax.plan.auto import Choice
from flexjax.planned_engine import PlannedEngine
from flexjax.policy import Policy, read_policy, validate
from flexjax.policy_args import AUTO
from flexjax.prompts import Prompt, as_list, items
from flexjax.row_maker import Requests, RowMaker
from flexjax.sampling_params import SamplingParams, read_seed
from flexjax.score_rows import num_scored_inputs, scored_inputs
from flexjax.shared_prefixes import rows_of
from flexjax.tokenizer import Tokenizer
from flexjax.workload import PREFILL_TOKENS


class LLM:
    """An OPT model that runs under a policy.

    Args of the constructor:
        model: a folder with a Hugging Face checkpoint, a converted store, or a Hub id;
            None is the small model that comes with flexjax. A checkpoint is converted
            into a cache folder the first time.
        policy: a `Policy`, or the path of a JSON file that holds one. "auto" leaves it
            to the first call, whose prompts it is planned for: everything on the
            device where it fits, else what `flexjax.plan` finds; a later call that asks
            for more is planned anew. Prompts of very different lengths may get several
            policies, one after the other.
        dtype: "bfloat16", "float16", "float32", or "auto": the checkpoint's own, but
            bfloat16 for float16 on a CPU.
        offload_dir: where KV cache and activations on disk are spilled to, in a folder
            that goes when this is closed; the cache folder's, if not given.
        max_model_len: positions to use at most; the model's own, if not given.
        seed: of prompts whose parameters name none.
        progress: whether to show progress bars, which in a log file are a line now and
            then; only on a terminal, if not given.
        trace: whether to keep, in `trace`, what every lane did; costs memory.

    Attributes:
        config: of the model.
        dtype: of its weights, or of what they are quantized from.
        weight_bits: that its decoder layers' matrices are stored in, if quantized.
        max_model_len: positions that are used at most.
        seed: of prompts whose parameters name none.
        metrics: of the last run; empty before there is one. Where it had several
            policies, `parts` has those of each, in their order.

    Raises:
        ValueError: the model or the policy cannot be used; the message says why.
        OSError: the disk failed.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        policy: Policy | str | os.PathLike[str] | None = AUTO,
        dtype: str = "auto",
        offload_dir: str | os.PathLike[str] | None = None,
        max_model_len: int | None = None,
        seed: int = 0,
        progress: bool | None = None,
        trace: bool = False,
    ) -> None:
        self.seed, given = read_seed("seed", seed), _read_policy(policy)
        self._progress = sys.stderr.isatty() if progress is None else progress
        device = jax.devices()[0]
        named = EMBEDDED_MODEL if model is None else model
        folder = resolve_for(given or Policy(), named, dtype, device=device)
        store = open_store(folder)
        self.config, self._store_checksum = store.config, store.checksum
        self.dtype = store.dtype.name
        self.weight_bits = store.quantization and store.quantization.bits
        self._rows = RowMaker(store.config, folder, max_model_len)
        self.max_model_len = self._rows.max_model_len
        spill = default_cache() if offload_dir is None else pathlib.Path(offload_dir)
        self._planned = PlannedEngine(
            store,
            given,
            device=device,
            offload_dir=spill,
            seed=self.seed,
            keeps_spans=trace,
            loading=functools.partial(_loading, self._progress),
        )
        self.metrics: dict[str, Any] = {}

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of all memory and removes what was spilled; may be called again."""
        self._planned.close()

    @property
    def policy(self) -> Policy | None:
        """The policy that was given, or the last that was planned; None before that."""
        return self._planned.policy

    @property
    def plan(self) -> Choice | None:
        """How `policy` was chosen, if none was given, once it is."""
        return self._planned.choice

    @property
    def placement(self) -> dict[str, Any]:
        """Requested and effective placement under `policy`, by kind and tier."""
        return self._planned.placement

    @property
    def trace(self) -> list[Span]:
        """What every lane did in the last run, for `flexjax.trace.write_trace`.

        Empty unless the model was made with `trace=True`.
        """
        return self._planned.spans

    @property
    def checksum(self) -> str:
        """Of configuration, weights and tokenizer: all that makes one model another."""
        return f"{self._store_checksum}-{self._rows.tokenizer_checksum}"

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer.

        Raises:
            ValueError: it came with none.
        """
        return self._rows.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_tokens: Callable[[int], object] | None = None,
    ) -> list[RequestOutput]:
        """Continues every prompt; the outputs stand in the order of the prompts.

        Args:
            prompts: texts or lists of token ids, any number of them, of any lengths.
            sampling_params: for all prompts, or one for each.
            on_tokens: called in this thread whenever a batch has its tokens of a step,
                with their number; what it raises ends the call.

        Raises:
            ValueError: a prompt cannot be used; the message counts prompts from 0.
            OSError: a transfer failed; nothing of this call can be used.
        """
        outputs: dict[int, RequestOutput] = {}
        requests = [
            prompt
            if isinstance(prompt, str)
            else items(f"prompt {index} is", prompt, "a text or a list of token ids")
            for index, prompt in enumerate(as_list(prompts))
        ]
        self.generate_each(
            requests, sampling_params, on_outputs=outputs.update, on_tokens=on_tokens
        )
        return [outputs[index] for index in range(len(requests))]

    def generate_each(
        self,
        prompts: Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_outputs: Callable[[dict[int, RequestOutput]], object],
        indices: Sequence[int] | None = None,
        block_latency_s: float = math.inf,
        on_tokens: Callable[[int], object] | None = None,
    ) -> None:
        """Continues prompts and gives the outputs of each block away when it ends.

        For more prompts than memory holds: `prompts` are looked up, all of them once
        before the first block, so that whatever cannot be used is refused then, and
        each again with its block.

        Args:
            prompts: a sequence of texts or lists of token ids, which may read them from
                a file.
            sampling_params: for all prompts, or one for each.
            on_outputs: called in this thread when a block ends, with the outputs of
                the prompts that ended in it, by their index; what it raises ends the
                call. Those that share nothing come first, and longer prompts before
                shorter ones, but for those that were preempted.
            indices: of the prompts that are to be continued; all, if not given. What
                comes of a prompt is not changed by which others are, but for what
                rounding decides.
            block_latency_s: seconds that a block may take, as predicted, where policies
                are searched; where all fits on the device, blocks are small anyway. No
                prompt is preempted then.
            on_tokens: as of `generate`.

        Raises:
            ValueError, OSError: as `generate`; what was given away can be used.
        """
        requests = Requests(
            self._rows, prompts, params=sampling_params, indices=indices
        )
        with self._bar(len(requests), "reading", "prompt") as bar:
            sizes = requests.sizes(bar.update)
        asked = [size.max_tokens for size in sizes]
        with self._bar(sum(asked), "generating") as bar:

            def give(rows: Sequence[Row]) -> None:
                for row in rows:  # what ended early is no longer to come
                    bar.total -= row.params.max_tokens - len(row.checker.token_ids)
                on_outputs(requests.outputs(rows))

            def run(engine: Engine, places: Sequence[int], alike: list[Group]) -> None:
                bar.unpause()  # whatever it took to plan and to load
                engine.generate_blocks(
                    [sizes[place] for place in places],
                    lambda chosen: requests.rows([places[one] for one in chosen]),
                    on_rows=give,
                    on_tokens=_updates(bar, engine, on_tokens),
                    may_preempt=math.isinf(block_latency_s),
                    groups=alike,
                )

            max_tokens = max(asked, default=1)
            self.metrics = self._planned.run(
                [size.prompt_len for size in sizes],
                max_tokens,
                run,
                groups=requests.groups(self._batch_size),
                most_block_s=block_latency_s,
            )

    def score(self, token_ids: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Log-probability of every token but the first, given those before it.

        Args:
            token_ids: sequences, any number, each of up to one token more than the
                model has positions.

        Returns:
            For each sequence, log p(token t+1 | tokens up to t), float32
            `[length - 1]`, from the raw logits.

        Raises:
            ValueError, OSError: as `generate`.
        """
        scores: dict[int, Scores] = {}
        self.score_each(token_ids, on_scores=scores.update)
        return [scores[place].logprobs for place in range(len(scores))]

    def score_each(
        self,
        token_ids: Sequence[Sequence[int]],
        *,
        on_scores: Callable[[dict[int, Scores]], object],
    ) -> None:
        """Scores sequences and gives the scores of each block away when it ends.

        Args:
            token_ids: as of `score`. Those that begin alike may share a row of up to
                `PREFILL_TOKENS` tokens, or as many as the longest has; a policy that
                was given has to have room for a batch of such rows.
            on_scores: called in this thread when a block ends, with the scores of the
                sequences that were in it, by their index; what it raises ends the call.

        Raises:
            ValueError, OSError: as `generate`; what was given away can be used.
        """
        sequences = self._rows.sequences(token_ids)
        lengths = list(map(num_scored_inputs, sequences))
        # A plan is for rows that the model has positions for.
        most = min(max(PREFILL_TOKENS, *lengths, 1), self.max_model_len)
        inputs = map(scored_inputs, sequences)
        rows, groups = rows_of(list(inputs), most, self._batch_size)
        with self._bar(sum(lengths), "scoring") as bar:

            def run(engine: Engine, places: Sequence[int], alike: list[Group]) -> None:
                bar.unpause()
                update = _updates(bar, engine)

                def give(scores: dict[int, Scores]) -> None:
                    update(sum(lengths[place] for place in scores))
                    on_scores(scores)

                chosen = [rows[place] for place in places]
                engine.score_blocks(sequences, chosen, give, groups=alike)

            row_lens = [row_length(row, lengths) for row in rows]
            self.metrics = self._planned.run(row_lens, 1, run, groups=groups)

    @property
    def _batch_size(self) -> int | None:
        """Of the policy, if one was given."""
        policy = self._planned.policy
        return None if policy is None or self._planned.is_auto else policy.batch_size

    def _bar(self, total: int, label: str, unit: str = "token") -> tqdm:
        return progress_bar(total, label, unit, is_shown=self._progress)


@contextlib.contextmanager
def _loading(is_shown: bool, nbytes: int) -> Iterator[Callable[[int], object]]:
    """What is told of weights that are loaded; no method, so that no cycle is made."""
    with progress_bar(nbytes, "loading", is_shown=is_shown) as bar:
        yield bar.update


def _updates(
    bar: tqdm, engine: Engine, then: Callable[[int], object] | None = None
) -> Callable[[int], None]:
    """What a run calls when it has tokens."""

    def update(count: int) -> None:
        slowest = engine.times.slowest.value
        bar.set_postfix_str(f"slowest: {slowest}", refresh=False)
        bar.update(count)
        if then is not None:
            then(count)

    return update


def _read_policy(policy: Policy | str | os.PathLike[str] | None) -> Policy | None:
    """The policy that was given; None leaves it to a plan."""
    if isinstance(policy, Policy):
        return validate(policy)
    return None if policy in (None, AUTO) else read_policy(pathlib.Path(policy))
