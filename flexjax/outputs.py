"""What a generation gives back: plain values with vLLM's names and meanings."""

import dataclasses
import enum
from typing import NamedTuple

import numpy as np


class FinishReason(enum.StrEnum):
    """Why a row ended; equal to, and written to JSON as, its plain string."""

    STOP = "stop"  # end of sequence, a stop token or a stop string
    LENGTH = "length"  # max_tokens were generated


class Scores(NamedTuple):
    """What a model makes of tokens that are there: of each but the first.

    Attributes:
        logprobs: float32 `[length - 1]`, log p(token t+1 | tokens up to t).
        is_greedy: bool, same shape; whether greedy decoding would take the token.
    """

    logprobs: np.ndarray
    is_greedy: np.ndarray

    def between(self, first: int, end: int) -> "Scores":
        """Of some of the tokens."""
        return Scores(self.logprobs[first:end], self.is_greedy[first:end])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logprob:
    """How likely the model found one token, before temperature and penalties."""

    logprob: float
    rank: int | None = None  # 1 is the most likely token
    decoded_token: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionOutput:
    """One generated continuation of a prompt."""

    index: int
    text: str  # without the stop string or the stop token
    token_ids: list[int]  # everything generated, the stop token too
    logprobs: list[dict[int, Logprob]] | None = None  # one table a token, if asked for
    cumulative_logprob: float | None = None  # of the generated tokens, if asked for
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token or string; None: end of text


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """A prompt and what was generated from it; `dataclasses.asdict` is JSON-ready."""

    prompt: str | None  # None if the prompt came as token ids
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
