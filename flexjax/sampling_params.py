"""What a caller may ask of the choice of tokens: names and meanings are vLLM's."""

import dataclasses
import math
import numbers
import operator
from collections.abc import Callable, Sequence
from typing import Any

GREEDY_BELOW = 1e-5  # a lower temperature means greedy; dividing by it would overflow
MAX_SEED = 2**64 - 1  # a seed fills the two 32-bit words of a threefry key


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one prompt are chosen, and when to stop.

    Attributes:
        max_tokens: tokens to generate at most.
        temperature: divides the logits; 0 always takes the most likely token.
        top_k: keep the k most likely tokens, and whatever ties with the last of them;
            0 or -1 keep all.
        top_p: keep the fewest tokens whose probabilities sum to at least this much.
        min_p: keep tokens at least this likely, relative to the most likely one.
        repetition_penalty: above 1 makes tokens of the prompt and the output less
            likely, below 1 more likely.
        seed: makes the row repeatable; None leaves the choice to the engine's seed.
        stop: strings that end the text, which is cut before them; one or several.
        stop_token_ids: token ids that end the text.
        ignore_eos: go on past the end-of-sequence token.
        logprobs: report the chosen token's log-probability, and those of this many
            most likely tokens; None reports nothing.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, read in _READERS.items():
            object.__setattr__(self, name, read(name, getattr(self, name)))

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is left to chance."""
        return self.temperature < GREEDY_BELOW

    @property
    def has_filter(self) -> bool:
        """Whether some tokens may be ruled out before drawing."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0


Reader = Callable[[str, Any], Any]  # a field's name and value -> the value to keep


def _refuse(name: str, value: object, allowed: str) -> ValueError:
    return ValueError(f"{name}={value!r} cannot be used: {name} must be {allowed}")


def _whole(accepts: Callable[[int], bool], allowed: str) -> Reader:
    def read(name: str, value: Any) -> int:
        # NumPy's integers are welcome; True and False are not.
        is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if not (is_whole and accepts(operator.index(value))):
            raise _refuse(name, value, allowed)
        return operator.index(value)

    return read


def _real(accepts: Callable[[float], bool], allowed: str) -> Reader:
    def read(name: str, value: Any) -> float:
        is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        try:
            number = float(value) if is_real else math.nan
        except OverflowError:
            number = math.inf
        if not (math.isfinite(number) and accepts(number)):
            raise _refuse(name, value, allowed)
        return number

    return read


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _refuse(name, value, "True or False")
    return value


def _text(name: str, value: Any) -> str:
    if not (isinstance(value, str) and value):
        raise _refuse(name, value, "a string that is not empty")
    return value


def _or_none(read: Reader) -> Reader:
    return lambda name, value: None if value is None else read(name, value)


def _several(read: Reader, allowed: str) -> Reader:
    """A reader of any iterable of what `read` reads; None is none, a string is one."""

    def read_all(name: str, value: Any) -> tuple[Any, ...]:
        items = () if value is None else (value,) if isinstance(value, str) else value
        try:
            return tuple(read(name, item) for item in items)
        except (TypeError, ValueError):
            raise _refuse(name, value, allowed) from None

    return read_all


# Raises ValueError where a value is no seed.
read_seed = _whole(lambda s: 0 <= s <= MAX_SEED, f"a whole number from 0 to {MAX_SEED}")
_from_0 = _whole(lambda n: n >= 0, "a whole number from 0")

_READERS: dict[str, Reader] = {
    "max_tokens": _whole(lambda n: n >= 1, "a whole number from 1"),
    "temperature": _real(lambda t: 0 <= t <= 1e30, "from 0 (greedy) to 1e30"),
    "top_k": _whole(
        lambda k: -1 <= k < 2**31, "a whole number from 1 to 2**31 - 1, or 0 or -1: all"
    ),
    "top_p": _real(lambda p: 0 < p <= 1, "above 0 and at most 1 (1 keeps all tokens)"),
    "min_p": _real(lambda p: 0 <= p <= 1, "from 0 to 1 (0 keeps all tokens)"),
    "repetition_penalty": _real(
        lambda r: 1e-6 <= r <= 1e6, "from 1e-6 to 1e6 (1 changes nothing)"
    ),
    "seed": _or_none(read_seed),
    "stop": _several(_text, "a string or a list of strings, none of them empty"),
    "stop_token_ids": _several(_from_0, "a list of whole numbers from 0"),
    "ignore_eos": _flag,
    "logprobs": _or_none(_whole(lambda n: n >= 0, "None or a whole number from 0")),
}
