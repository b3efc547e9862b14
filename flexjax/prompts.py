"""What users give as prompts: checked, and each with its parameters."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from flexjax.sampling_params import SamplingParams

Prompt = str | Sequence[int]
FIRST_ORDINARY_ID = 4  # OPT's; those before it have a meaning of their own


def as_list(prompts: Any) -> list[Any]:
    """Prompts as a list; a text or a list of token ids alone is a list of one.

    Raises:
        ValueError: they are neither.
    """
    if isinstance(prompts, str):
        return [prompts]
    prompts = items("prompts are", prompts, "texts or lists of token ids")
    is_one = bool(prompts) and isinstance(prompts[0], (int, np.integer))
    return [prompts] if is_one else prompts


def items(what: str, values: Any, expected: str) -> list[Any]:
    """Values as a list.

    Raises:
        ValueError: they are no list of anything; the message says `what` they are, and
            what is `expected`.
    """
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise ValueError(f"{what} {values!r}, expected {expected}")
    return list(values)


def random_prompts(vocab_size: int, count: int, length: int) -> list[list[int]]:
    """Prompts for benchmarks: each different, the same in every run."""
    random = np.random.default_rng(0)
    return random.integers(FIRST_ORDINARY_ID, vocab_size, (count, length)).tolist()


def one_for_each(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> Sequence[SamplingParams]:
    """Parameters for `count` prompts; one for all, or one for each.

    Raises:
        ValueError: there are more or fewer, or they are something else.
    """
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    params = list(params)
    if len(params) != count:
        raise ValueError(
            f"{len(params)} sampling_params for {count} prompts; give one for all, or "
            "one for each"
        )
    for index, one in enumerate(params):
        if not isinstance(one, SamplingParams):
            raise ValueError(
                f"sampling_params of prompt {index} are {one!r}, "
                "expected SamplingParams"
            )
    return params


def checked_ids(name: str, ids: list[Any], vocab_size: int) -> list[int]:
    """Token ids as plain integers.

    Raises:
        ValueError: there are none, or one is none; the message begins with `name`.
    """
    if not ids:
        raise ValueError(f"{name} has no tokens; give it at least one")
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, (int, np.integer)):
            raise ValueError(f"{name} has {token!r}, which is not a token id")
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"{name} has token id {token}, but the vocabulary is "
                f"0..{vocab_size - 1}"
            )
    return [int(token) for token in ids]
