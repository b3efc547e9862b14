"""The front door: text or token ids in, text and log-probabilities out."""

import contextlib
import functools
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from checkpoints_tools.resolve import resolve_for
from flexjax.blocks import Row
from flexjax.cache_folder import default_cache
from flexjax.checkpoint import EMBEDDED_MODEL, WeightStore, open_store
from flexjax.engine import Engine
from flexjax.memory.lanes import Span
from flexjax.outputs import CompletionOutput, Logprob, RequestOutput
from flexjax.plan.auto import Choice
from flexjax.planned_engine import PlannedEngine
from flexjax.policy import Policy, read_policy, validate
from flexjax.policy_args import AUTO
from flexjax.prompts import Prompt, as_list, checked_ids, items, one_for_each
from flexjax.sampling_params import SamplingParams, read_seed
from flexjax.stopping import StopChecker
from flexjax.tokenizer import Tokenizer, has_tokenizer, load_tokenizer


class LLM:
    """An OPT model that runs under a policy.

    Args of the constructor:
        model: a folder with a Hugging Face checkpoint, a converted store, or a Hub id;
            None is the small model that comes with flexjax. A checkpoint is converted
            into a cache folder the first time.
        policy: a `Policy`, or the path of a JSON file that holds one. "auto" leaves it
            to the first call, whose prompts it is planned for: everything on the
            device where it fits, else what `flexjax.plan` finds; a later call that asks
            for more is planned anew.
        dtype: "bfloat16", "float16", "float32", or "auto": the checkpoint's own, but
            bfloat16 for float16 on a CPU.
        offload_dir: where KV cache and activations on disk are spilled to, in a folder
            that goes when this is closed; the cache folder's, if not given.
        max_model_len: positions to use at most; the model's own, if not given.
        seed: of prompts whose parameters name none.
        progress: whether to show progress bars; only on a terminal, if not given.
        trace: whether to keep, in `trace`, what every lane did; costs memory.

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
        seed, given = read_seed("seed", seed), _read_policy(policy)
        self._progress = sys.stderr.isatty() if progress is None else progress
        device = jax.devices()[0]
        named = EMBEDDED_MODEL if model is None else model
        folder = resolve_for(given or Policy(), named, dtype, device=device)
        store = open_store(folder)
        self.config = store.config
        self.max_model_len = _max_model_len(max_model_len, store)
        self._folder = folder
        self._tokenizer = load_tokenizer(folder) if has_tokenizer(folder) else None
        spill = default_cache() if offload_dir is None else pathlib.Path(offload_dir)
        self._planned = PlannedEngine(
            store,
            given,
            device=device,
            offload_dir=spill,
            seed=seed,
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
        """The policy that was given or planned; None before the first call plans it."""
        return self._planned.policy

    @property
    def plan(self) -> Choice | None:
        """How the policy was chosen, if none was given, once it is."""
        return self._planned.choice

    @property
    def placement(self) -> dict[str, Any]:
        """Requested and effective placement by kind and tier; empty before a plan."""
        return self._planned.placement

    @property
    def trace(self) -> list[Span]:
        """What every lane did in the last run, for `flexjax.trace.write_trace`.

        Empty unless the model was made with `trace=True`.
        """
        engine = self._planned.engine
        return [] if engine is None else engine.timeline.spans

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer.

        Raises:
            ValueError: it came with none.
        """
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._folder)
        return self._tokenizer

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
        requests = as_list(prompts)
        params = one_for_each(sampling_params, len(requests))
        rows = [
            self._row(index, prompt, row_params)
            for index, (prompt, row_params) in enumerate(
                zip(requests, params, strict=True)
            )
        ]
        asked = [row.params.max_tokens for row in rows]
        max_tokens = max(asked, default=1)
        lengths = [len(row.prompt) for row in rows]
        with (
            self._planned.running(lengths, max_tokens) as engine,
            self._bar(sum(asked), "generating", "token") as bar,
        ):
            engine.generate(rows, _updates(bar, engine, on_tokens))
            self.metrics = self._planned.report(engine, lengths, max_tokens)
        return [
            self._output(row, prompt)
            for row, prompt in zip(rows, requests, strict=True)
        ]

    def score(self, token_ids: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Log-probability of every token but the first, given those before it.

        Args:
            token_ids: sequences, of any number and lengths.

        Returns:
            For each sequence, log p(token t+1 | tokens up to t), float32
            `[length - 1]`, from the raw logits.

        Raises:
            ValueError, OSError: as `generate`.
        """
        sequences = [
            self._checked_ids(
                f"sequence {index}",
                items(f"sequence {index} is", ids, "a list of token ids"),
                0,
            )
            for index, ids in enumerate(as_list(token_ids))
        ]
        lengths = [len(sequence) for sequence in sequences]
        with (
            self._planned.running(lengths, 1) as engine,
            self._bar(sum(lengths), "scoring", "token") as bar,
        ):
            scores = engine.score(sequences, _updates(bar, engine))
            self.metrics = self._planned.report(engine, lengths, 1)
        return scores

    def _row(self, index: int, prompt: Prompt, params: SamplingParams) -> Row:
        if isinstance(prompt, str):
            if not prompt:
                raise ValueError(f"prompt {index} is empty; give it at least a word")
            ids = self.tokenizer.encode(prompt)
        else:
            ids = items(f"prompt {index} is", prompt, "a text or a list of token ids")
        ids = self._checked_ids(f"prompt {index}", ids, params.max_tokens)
        for token in params.stop_token_ids:
            if token >= self.config.vocab_size:
                raise ValueError(
                    f"stop_token_ids of prompt {index} has {token}, but the vocabulary "
                    f"ends at {self.config.vocab_size - 1}"
                )
        decode = self._tokenizer and self._tokenizer.decode
        eos = self.config.eos_token_id
        return Row(
            index, ids, params, StopChecker(params, eos_token_id=eos, decode=decode)
        )

    def _checked_ids(self, name: str, ids: list[Any], max_tokens: int) -> list[int]:
        ids = checked_ids(name, ids, self.config.vocab_size)
        if len(ids) + max_tokens > self.max_model_len:
            wanted = f" and max_tokens={max_tokens}" if max_tokens else ""
            raise ValueError(
                f"{name} has {len(ids)} tokens{wanted}, but the model has positions "
                f"for {self.max_model_len}; shorten the prompt or ask for fewer tokens"
            )
        return ids

    def _output(self, row: Row, prompt: Prompt) -> RequestOutput:
        finish = row.checker.finish
        assert finish is not None
        wants_logprobs = row.params.logprobs is not None
        completion = CompletionOutput(
            index=0,
            text=row.checker.text,
            token_ids=row.checker.token_ids,
            logprobs=self._decoded(row.logprobs) if wants_logprobs else None,
            cumulative_logprob=_cumulative(row) if wants_logprobs else None,
            finish_reason=finish.finish_reason,
            stop_reason=finish.stop_reason,
        )
        return RequestOutput(
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=list(row.prompt),
            outputs=[completion],
        )

    def _decoded(self, tables: list[dict[int, Logprob]]) -> list[dict[int, Logprob]]:
        if self._tokenizer is None:
            return tables
        decode = self._tokenizer.decode
        return [
            {
                token: Logprob(
                    logprob=entry.logprob,
                    rank=entry.rank,
                    decoded_token=decode([token]),
                )
                for token, entry in table.items()
            }
            for table in tables
        ]

    def _bar(self, total: int, label: str, unit: str) -> tqdm:
        return _progress_bar(self._progress, total, label, unit)


def _progress_bar(is_shown: bool, total: int, label: str, unit: str) -> tqdm:
    return tqdm(
        total=total,
        desc=label,
        unit=unit,
        unit_scale=True,
        disable=not is_shown,
        file=sys.stderr,
    )


@contextlib.contextmanager
def _loading(is_shown: bool, nbytes: int) -> Iterator[Callable[[int], object]]:
    """What is told of weights that are loaded; no method, so that no cycle is made."""
    with _progress_bar(is_shown, nbytes, "loading", "B") as bar:
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


def _max_model_len(wanted: int | None, store: WeightStore) -> int:
    most = store.config.max_position_embeddings
    if wanted is None:
        return most
    if type(wanted) is not int or not 1 <= wanted <= most:
        raise ValueError(
            f"max_model_len is {wanted!r}, expected 1 to {most}, the positions that "
            "the model has"
        )
    return wanted


def _cumulative(row: Row) -> float:
    pairs = zip(row.logprobs, row.checker.token_ids, strict=True)
    return sum(table[token].logprob for table, token in pairs)
