"""When a row has ended, and the text it then has."""

import dataclasses
from collections.abc import Callable, Sequence

from flexjax.outputs import FinishReason
from flexjax.sampling_params import SamplingParams

Decode = Callable[[Sequence[int]], str]

_WINDOW = 16  # tokens decoded again for each new one, at least
_INCOMPLETE = "\ufffd"  # what the bytes of an unfinished character decode to


@dataclasses.dataclass(frozen=True)
class Finish:
    """How a row ended: `stop_reason` is the stop token or string, None for the rest."""

    finish_reason: FinishReason
    stop_reason: int | str | None = None


class StopChecker:
    """The tokens of one growing row; tells after each whether it was the last.

    A stop token stays in `token_ids` and is left out of the text. Of stop strings that
    one token completes, the one that begins first ends the text; of several that begin
    there, the one named first. Without stop strings nothing is decoded before the text
    is asked for.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        eos_token_id: int | None,
        decode: Decode | None = None,
    ) -> None:
        """`decode` may be left out where neither text nor stop strings are wanted."""
        if params.stop and decode is None:
            raise ValueError(
                f"stop={params.stop!r} needs a tokenizer to find strings in tokens; "
                "use stop_token_ids, or a model folder with a tokenizer"
            )
        self.token_ids: list[int] = []
        self.finish: Finish | None = None
        self._params = params
        self._decode = decode or (lambda _: "")
        self._eos_token_id = None if params.ignore_eos else eos_token_id
        self._stream = TextStream(self._decode) if params.stop else None
        self._cut: int | None = None  # where a stop string begins in the text

    def push(self, token_id: int) -> Finish | None:
        """Takes the next token; answers how the row ended if this was the last."""
        assert self.finish is None, "a token came after the end of its row"
        self.token_ids.append(token_id)
        self.finish = self._ended_by_token(token_id) or self._ended_by_string(token_id)
        if self.finish is None and len(self.token_ids) == self._params.max_tokens:
            self.finish = Finish(FinishReason.LENGTH)
        return self.finish

    @property
    def text(self) -> str:
        """The text so far, cut before whatever ended it."""
        if self._stream is not None and self._cut is not None:
            return self._stream.text[: self._cut]
        ends_in_stop_token = (
            self.finish is not None and self.finish.finish_reason is FinishReason.STOP
        )
        return self._decode(
            self.token_ids[:-1] if ends_in_stop_token else self.token_ids
        )

    def _ended_by_token(self, token_id: int) -> Finish | None:
        if token_id == self._eos_token_id:
            return Finish(FinishReason.STOP)
        if token_id in self._params.stop_token_ids:
            return Finish(FinishReason.STOP, token_id)
        return None

    def _ended_by_string(self, token_id: int) -> Finish | None:
        if self._stream is None:
            return None
        num_new = self._stream.push(token_id)
        text = self._stream.text
        found: list[tuple[int, int]] = []
        for order, stop in enumerate(self._params.stop):
            at = text.find(stop, max(0, len(text) - num_new - len(stop) + 1))
            if at >= 0:
                found.append((at, order))
        if not found:
            return None
        self._cut, order = min(found)
        return Finish(FinishReason.STOP, self._params.stop[order])


class TextStream:
    """Turns tokens into text as they come, by decoding a short window of the last ones.

    A character whose bytes are spread over tokens enters the text once it is complete.
    """

    def __init__(self, decode: Decode) -> None:
        self.text = ""
        self._decode = decode
        self._window: list[int] = []
        self._num_seen = 0  # characters of the window's text that are in `text`
        self._clean = 0  # the window's last place between two whole characters

    def push(self, token_id: int) -> int:
        """Takes the next token; returns how many characters the text grew by."""
        self._window.append(token_id)
        fresh = self._decode(self._window)[self._num_seen :]
        whole = fresh.rstrip(_INCOMPLETE)
        self.text += whole
        self._num_seen += len(whole)
        if whole == fresh:
            # One clean token before it stays as context: some decoders treat the first
            # token of a text in their own way (they drop its leading space).
            if len(self._window) > _WINDOW:
                self._window = self._window[self._clean :]
                self._num_seen = len(self._decode(self._window))
            self._clean = len(self._window)
        return len(whole)
