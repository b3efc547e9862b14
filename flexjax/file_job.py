"""A file of prompts becomes a file of answers, over as many runs as it takes."""

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

from flexjax.answer_file import AnswerFile
from flexjax.llm import LLM
from flexjax.outputs import RequestOutput
from flexjax.policy import Policy
from flexjax.prompt_file import PromptFile
from flexjax.sampling_params import SamplingParams


def answer_prompts(
    llm: LLM,
    prompts: PromptFile,
    answers: AnswerFile,
    *,
    params: SamplingParams,
    block_latency_s: float = math.inf,
    notice: Callable[[str], object] = lambda text: None,
) -> None:
    """Continues every prompt of a file into another, a JSON line each, in their order.

    A line has the prompt's `index`, the line that it came from as `input`, and as
    `output` what `CompletionOutput` says. Answers are on the disk when their block
    ends: a later call of the same job goes on with what is missing, and gives what one
    call would have given, but for the last digits where blocks have another size.

    Args:
        llm: the model; its `metrics` are those of what was missing.
        prompts: the file.
        answers: the other file, opened for as many.
        params: for all prompts.
        block_latency_s: as of `LLM.generate_each`; what is lost at most, if given.
        notice: is told what was found, in a sentence.

    Raises:
        ValueError: the answers were begun as another job; or as `LLM.generate`.
        OSError: the disk failed; what was answered is kept.
    """
    if answers.count != len(prompts):
        raise ValueError(
            f"{answers.path} was opened for {answers.count} prompts, but "
            f"{prompts.path} has {len(prompts)}; open it for as many"
        )
    answers.begin(_task(llm, prompts, params))
    missing = answers.missing()
    if (found := len(prompts) - len(missing)) > 0:
        notice(f"{answers.partial} has {found:,} of {len(prompts):,} answers; going on")

    def add(outputs: dict[int, RequestOutput]) -> None:
        answers.add(
            {
                index: f'{{"index": {index}, "input": {prompts.json(index)}, '
                f'"output": {_answer(output)}}}'
                for index, output in outputs.items()
            }
        )

    if missing:
        llm.generate_each(
            prompts,
            params,
            indices=missing,
            block_latency_s=block_latency_s,
            on_outputs=add,
        )
    answers.finish()


def _task(llm: LLM, prompts: PromptFile, params: SamplingParams) -> dict[str, Any]:
    """All that the answers depend on.

    Of a policy that is what rounds; the rest says where things are, and when. How
    weights are quantized is a matter of the model's checksum.
    """
    policy = llm.policy or Policy()  # a plan rounds nothing
    sampling = dataclasses.asdict(params)
    return {
        "dtype": llm.dtype,
        "weight_bits": llm.weight_bits,
        "checksum of the model": llm.checksum,
        "checksum of the prompts": prompts.checksum,
        "kv_cache_bits": policy.kv_cache_bits,
        "group_size": policy.group_size if policy.kv_cache_bits else None,
        "activation_bits": policy.activation_bits,
        "attention_sparsity": policy.attention_sparsity,
        "seed of every prompt": sampling.pop("seed"),
        "seed": llm.seed,
        **sampling,
    }


def _answer(output: RequestOutput) -> str:
    """The one completion as JSON, without what was not asked for."""
    values = dataclasses.asdict(output.outputs[0])
    del values["index"]  # of the completion
    asked = {name: value for name, value in values.items() if value is not None}
    return json.dumps(asked, ensure_ascii=False)
