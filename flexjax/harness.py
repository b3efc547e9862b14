"""flexjax as a model of lm-evaluation-harness, so that its tasks run on it.

Importing this registers the model's name, "flexjax"; `flexjax.evaluate` does so for the
command line. All requests of a task are one job here: those that begin alike share what
they begin with, and answers are cached when a block ends.
"""

# pyright: reportMissingImports=false
# The harness is an extra, and large.

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import maybe_truncate, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from flexjax.llm import LLM
from flexjax.outputs import RequestOutput, Scores
from flexjax.policy_args import AUTO
from flexjax.sampling_params import SamplingParams

logger = logging.getLogger(__name__)
# Of a task's settings those that are sampling parameters here, with the same meaning,
# and of these the ones by which tokens are drawn.
_SAMPLING = {field.name for field in dataclasses.fields(SamplingParams)} - {
    *("max_tokens", "stop", "logprobs")
}
_DRAWING = ("top_k", "top_p", "min_p", "seed")
_MODEL_ARGS = ("dtype", "offload_dir", "max_model_len", "seed")


@register_model("flexjax")
class FlexjaxLM(TemplateLM):
    """What the harness asks of a model, answered by an `LLM`.

    Args of the constructor:
        pretrained: the model, as of `LLM`.
        policy: path of a policy.json; "auto" plans one for each kind of request.
        max_gen_toks: tokens to generate where a task does not say.
        batch_size, max_batch_size, device, trust_remote_code: the harness gives them to
            all models; here the policy says the first two and JAX the third, and no
            model brings code.
        options: `dtype`, `offload_dir`, `max_model_len` and `seed`, as of `LLM`.

    Raises:
        ValueError, OSError: as `LLM`; or the model has no tokenizer, or an argument is
            unknown.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        policy: str = AUTO,
        max_gen_toks: int = 256,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        trust_remote_code: bool | None = None,
        **options: Any,
    ) -> None:
        del batch_size, max_batch_size, device, trust_remote_code
        super().__init__()
        if unknown := sorted(options.keys() - set(_MODEL_ARGS)):
            known = ", ".join(("pretrained", "policy", "max_gen_toks", *_MODEL_ARGS))
            raise ValueError(
                f"{', '.join(unknown)} in model_args is not known; known are {known}"
            )
        if pretrained is None:
            logger.warning(
                "model_args names no pretrained=MODEL: the small model that comes with "
                "flexjax is evaluated"
            )
        self.llm = LLM(pretrained, policy=policy, **options)
        self.tokenizer = self.llm.tokenizer
        self.max_gen_toks = max_gen_toks
        self._name = pretrained or "flexjax"

    @property
    def eot_token_id(self) -> int:
        return self.llm.config.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        return self.llm.max_model_len

    @property
    def tokenizer_name(self) -> str:
        return f"{self._name}-{self.tokenizer.checksum}".replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        if add_special_tokens is None:  # what has a bos token already gets no other
            begin = self.tokenizer.special_tokens.get("bos_token")
            add_special_tokens = begin is None or not string.startswith(begin)
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        answers: dict[int, tuple[float, bool]] = {}
        for texts, _, rest in requests:
            if not rest:
                raise ValueError(
                    f"the continuation {texts[1]!r} has no token of its own behind "
                    f"{texts[0][-40:]!r}, so it cannot be scored; leave out the task"
                )

        def take(index: int, found: tuple[float, bool]) -> None:
            answers[index] = found
            self.cache_hook.add_partial("loglikelihood", requests[index][0], found)

        self._score([(context, rest) for _, context, rest in requests], take)
        return [answers[index] for index in range(len(requests))]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """See `LM`; a window scores as many tokens as the model has positions."""
        windows = [
            [
                make_disjoint_window(window)
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            for request in requests
        ]
        places = [place for place, some in enumerate(windows) for _ in some]
        totals, missing = [0.0] * len(requests), list(map(len, windows))

        def take(index: int, found: tuple[float, bool]) -> None:
            place = places[index]
            totals[place] += found[0]
            missing[place] -= 1
            if not missing[place]:
                args, total = requests[place].args, totals[place]
                self.cache_hook.add_partial("loglikelihood_rolling", args, total)

        self._score([window for some in windows for window in some], take)
        return totals

    def generate_until(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[str]:
        prompts, params = [], []
        for request in requests:
            context, settings = request.args
            wanted = sampling_params(settings, self.max_gen_toks)
            if wanted.max_tokens >= self.max_length:
                raise ValueError(
                    f"max_gen_toks is {wanted.max_tokens}, but the model has positions "
                    f"for {self.max_length}, prompt included; ask for fewer"
                )
            tokens, _ = maybe_truncate(
                self.tok_encode(context), wanted.max_tokens, self.max_length
            )
            prompts.append(tokens)
            params.append(wanted)
        texts: dict[int, str] = {}

        def take(outputs: Mapping[int, RequestOutput]) -> None:
            for index, output in outputs.items():
                texts[index] = text = output.outputs[0].text
                args = requests[index].args
                self.cache_hook.add_partial("generate_until", args, text)

        self.llm.generate_each(prompts, params, on_outputs=take)
        return [texts[index] for index in range(len(requests))]

    def _score(
        self,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        take: Callable[[int, tuple[float, bool]], object],
    ) -> None:
        """Gives the log-likelihood of the second of each pair, given the first.

        Of what is too long, the first tokens are left out. With it comes whether greedy
        decoding would have generated it.
        """
        # The last one is computed by no one, so it takes no position.
        sequences, num_cut, most = [], 0, self.max_length + 1
        for context, rest in pairs:
            if len(rest) > self.max_length:
                raise ValueError(
                    f"a continuation has {len(rest)} tokens, but the model has "
                    f"positions for {self.max_length}; leave out the task"
                )
            whole = [*(context or [self.prefix_token_id]), *rest]
            num_cut += len(whole) > most
            sequences.append(whole[-most:])
        if num_cut:
            logger.warning(
                "%d of %d requests have more than %d tokens, the first of which are "
                "left out",
                num_cut,
                len(pairs),
                most,
            )

        def give(scores: Mapping[int, Scores]) -> None:
            for index, of_all in scores.items():
                count = len(of_all.logprobs)
                found = of_all.between(count - len(pairs[index][1]), count)
                likelihood = float(found.logprobs.sum(dtype=float))
                take(index, (likelihood, bool(found.is_greedy.all())))

        self.llm.score_each(sequences, on_scores=give)


def sampling_params(
    settings: Mapping[str, Any], default_max_tokens: int
) -> SamplingParams:
    """Those of a task's settings for generation, in the harness's words.

    Raises:
        ValueError: a setting is unknown, or has a value that it cannot have.
    """
    asked = {name: value for name, value in settings.items() if value is not None}
    asked.setdefault("temperature", 1.0 if asked.get("do_sample") else 0.0)
    if asked.get("num_beams") == 1:
        del asked["num_beams"]  # which is how it is
    known = dict(normalize_gen_kwargs(asked, default_max_tokens))
    stop, max_tokens = known.pop("until"), known.pop("max_gen_toks")
    known.pop("do_sample")
    if known["temperature"] == 0:
        known = {name: known[name] for name in known if name not in _DRAWING}
    if unknown := sorted(known.keys() - _SAMPLING):
        raise ValueError(
            f"a task asks to generate with {', '.join(unknown)}, which flexjax does "
            f"not know; it knows {', '.join(sorted(_SAMPLING))}"
        )
    stop = [text for text in stop if text]
    return SamplingParams(max_tokens=max_tokens, stop=stop, **known)
