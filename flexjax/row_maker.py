"""Prompts become the rows of an engine, and rows that have ended become outputs."""

import functools
import operator
import pathlib
from collections.abc import Callable, Sequence

from flexjax.arrangement import Group
from flexjax.blocks import Row, RowSize
from flexjax.models.config import OPTConfig
from flexjax.outputs import CompletionOutput, Logprob, RequestOutput
from flexjax.prompt_file import PromptFile
from flexjax.prompts import Prompt, as_list, checked_ids, items, one_for_each
from flexjax.sampling_params import SamplingParams
from flexjax.shared_prefixes import SharedPrefixes
from flexjax.stopping import StopChecker
from flexjax.tokenizer import Tokenizer, has_tokenizer, load_tokenizer


class RowMaker:
    """What a model, its tokenizer and its number of positions make of prompts.

    Args of the constructor:
        config: the model's.
        folder: where its tokenizer is, if it has one.
        max_model_len: positions to use at most; None are all that the model has.

    Raises:
        ValueError: it has not so many.
    """

    def __init__(
        self, config: OPTConfig, folder: pathlib.Path, max_model_len: int | None
    ) -> None:
        self._config, self._folder = config, folder
        self.max_model_len = _max_model_len(max_model_len, config)
        self._tokenizer = load_tokenizer(folder) if has_tokenizer(folder) else None

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer.

        Raises:
            ValueError: it came with none.
        """
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._folder)
        return self._tokenizer

    @property
    def tokenizer_checksum(self) -> str | None:
        """Of the tokenizer; None if there is none."""
        return self._tokenizer and self._tokenizer.checksum

    def row(
        self, index: int, prompt: Prompt, params: SamplingParams, *, name: str
    ) -> Row:
        """The row of a prompt.

        Raises:
            ValueError: it cannot be used; the message has its name.
        """
        if isinstance(prompt, str):
            if not prompt:
                raise ValueError(f"{name} is empty; give it at least a word")
            ids = self._encoded(name, prompt)
        else:
            ids = items(f"{name} is", prompt, "a text or a list of token ids")
        ids = checked_ids(name, ids, self._config.vocab_size)
        if len(ids) + params.max_tokens > self.max_model_len:
            raise ValueError(
                f"{name} has {len(ids)} tokens and max_tokens={params.max_tokens}, but "
                f"the model has positions for {self.max_model_len}; shorten the prompt "
                "or ask for fewer tokens"
            )
        for token in params.stop_token_ids:
            if token >= self._config.vocab_size:
                raise ValueError(
                    f"stop_token_ids of {name} has {token}, but the vocabulary ends at "
                    f"{self._config.vocab_size - 1}"
                )
        decode = self._tokenizer and self._tokenizer.decode
        eos = self._config.eos_token_id
        return Row(
            index, ids, params, StopChecker(params, eos_token_id=eos, decode=decode)
        )

    def sequences(self, token_ids: Sequence[Sequence[int]]) -> list[list[int]]:
        """Sequences that are to be scored, checked.

        The last token needs no position, as nothing is scored behind it.

        Raises:
            ValueError: one cannot be used; the message counts them from 0.
        """
        checked = []
        for index, given in enumerate(as_list(token_ids)):
            name = f"sequence {index}"
            ids = items(f"{name} is", given, "a list of token ids")
            ids = checked_ids(name, ids, self._config.vocab_size)
            if len(ids) > self.max_model_len + 1:
                raise ValueError(
                    f"{name} has {len(ids)} tokens, but the model has positions for "
                    f"{self.max_model_len} and the last token; shorten it"
                )
            checked.append(ids)
        return checked

    def output(self, row: Row, prompt: Prompt) -> RequestOutput:
        """What has come of a prompt, whose row has ended."""
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

    def _encoded(self, name: str, text: str) -> list[int]:
        try:
            return self.tokenizer.encode(text)
        except ValueError as error:
            raise ValueError(f"{name} cannot be used: {error}") from error

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


class Requests:
    """Prompts and their parameters; rows are made of them when a block begins.

    Args of the constructor:
        maker: of their rows.
        prompts: are looked up when they are asked for, and not kept.
        params: for all prompts, or one for each.
        indices: of those that are wanted; None is all.

    Raises:
        ValueError: the prompts are no sequence, or `indices` has what is none of them,
            or one twice.
    """

    def __init__(
        self,
        maker: RowMaker,
        prompts: Sequence[Prompt],
        *,
        params: SamplingParams | Sequence[SamplingParams] | None,
        indices: Sequence[int] | None,
    ) -> None:
        if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Sequence):
            raise ValueError(
                f"prompts are {prompts!r}, expected a sequence of texts or of lists of "
                "token ids"
            )
        self._maker, self._prompts = maker, prompts
        self._params = one_for_each(params, len(prompts))
        self._indices: Sequence[int] = range(len(prompts))
        if indices is not None:
            self._indices = [operator.index(index) for index in indices]
        self._sizes: list[RowSize] = []
        self._shared: SharedPrefixes | None = SharedPrefixes()
        if len(set(self._indices)) < len(self._indices):
            raise ValueError("indices has a prompt twice; give each once")
        for index in self._indices:
            if not 0 <= index < len(prompts):
                raise ValueError(
                    f"indices has {index}, but the {len(prompts)} prompts count from 0"
                )

    def __len__(self) -> int:
        return len(self._indices)

    def sizes(self, on_prompts: Callable[[int], object]) -> list[RowSize]:
        """The sizes of all rows, in the order of `indices`.

        Args:
            on_prompts: called whenever prompts have been looked up, with their number.

        Raises:
            ValueError: one cannot be used; the message has its name, which is its line
                in a file, or else its number from 0.
        """
        share = functools.cache(RowSize)  # a few values, for millions of prompts
        shared = self._shared
        assert shared is not None
        for index in self._indices:
            row = self._row(index)
            shared.add(row.prompt)
            self._sizes.append(share(*row.size))
            on_prompts(1)
        return self._sizes

    def groups(self, batch_size: int | None = None) -> list[Group]:
        """Groups of all rows, see `SharedPrefixes`; once, after `sizes`.

        Args:
            batch_size: if there is a policy.
        """
        gen_len = max((size.max_tokens for size in self._sizes), default=1)
        shared, self._shared = self._shared, None  # which may be large
        assert shared is not None
        return shared.groups(gen_len, batch_size)

    def rows(self, places: Sequence[int]) -> list[Row]:
        """New rows, given their places in `indices`.

        Raises:
            ValueError: a prompt is no longer as long as it was.
        """
        rows = [self._row(self._indices[place]) for place in places]
        for row, place in zip(rows, places, strict=True):
            if row.size != self._sizes[place]:
                raise ValueError(
                    f"{self._name(row.index)} had {self._sizes[place].prompt_len} "
                    f"tokens when it was first looked up, and has {len(row.prompt)} "
                    "now; leave prompts alone until the run has ended"
                )
        return rows

    def outputs(self, rows: Sequence[Row]) -> dict[int, RequestOutput]:
        """What has come of rows that have ended, by the index of their prompt."""
        return {
            row.index: self._maker.output(row, self._prompts[row.index]) for row in rows
        }

    def _row(self, index: int) -> Row:
        return self._maker.row(
            index, self._prompts[index], self._params[index], name=self._name(index)
        )

    def _name(self, index: int) -> str:
        if isinstance(self._prompts, PromptFile):
            return self._prompts.name(index)
        return f"prompt {index}"


def _max_model_len(wanted: int | None, config: OPTConfig) -> int:
    most = config.max_position_embeddings
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
