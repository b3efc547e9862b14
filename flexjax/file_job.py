"""A file of prompts becomes a file of answers, over as many runs as it takes."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

from flexjax.answer_file import AnswerFile
from flexjax.llm import LLM
from flexjax.outputs import RequestOutput
from flexjax.policy import Policy
from flexjax.prompt_file import PromptFile
from flexjax.sampling_params import SamplingParams

# What of a policy an answer depends on; the rest says where things are, and when.
_ROUNDS = ("kv_cache_bits", "activation_bits", "group_size", "attention_sparsity")


def answer_file_of_prompts(
    llm: LLM,
    prompts: PromptFile,
    path: pathlib.Path,
    params: SamplingParams,
    *,
    notice: Callable[[str], object] = lambda text: None,
) -> None:
    """Continues every prompt into `path`, a JSON line each, in their order.

    A line has the prompt's `index`, the line that it came from as `input`, and as
    `output` what `CompletionOutput` says. Answers are on the disk when their block
    ends, in `<path>.partial` until all are there: a later call of the same job goes on
    with what is missing, and gives what one call would have given.

    Args:
        llm: the model; its `metrics` are those of what was missing.
        prompts: the file.
        path: of the answers.
        params: for all prompts.
        notice: is told what was found, in a sentence.

    Raises:
        ValueError: `path` is there already, or was begun as another job; or as
            `LLM.generate`.
        OSError: the disk failed; what was answered is kept.
    """
    with AnswerFile(path, _task(llm, prompts, params), len(prompts)) as answers:
        missing = answers.missing()
        if (found := len(prompts) - len(missing)) > 0:
            notice(
                f"{answers.partial} has {found:,} of {len(prompts):,} answers; going on"
            )

        def add(outputs: dict[int, RequestOutput]) -> None:
            answers.add(
                {
                    index: {"input": prompts.line(index), "output": _answer(output)}
                    for index, output in outputs.items()
                }
            )

        if missing:
            llm.generate_each(prompts, params, indices=missing, on_outputs=add)
        answers.finish()


def _task(llm: LLM, prompts: PromptFile, params: SamplingParams) -> dict[str, Any]:
    """All that the answers depend on."""
    policy = llm.policy or Policy()  # a plan rounds nothing
    sampling = dataclasses.asdict(params)
    return {
        "checksum of the model": llm.checksum,
        "checksum of the prompts": prompts.checksum,
        **{name: getattr(policy, name) for name in _ROUNDS},
        "seed of every prompt": sampling.pop("seed"),
        "seed": llm.seed,
        **sampling,
    }


def _answer(output: RequestOutput) -> dict[str, Any]:
    """The one completion, without what was not asked for."""
    values = dataclasses.asdict(output.outputs[0])
    del values["index"]  # of the completion
    return {name: value for name, value in values.items() if value is not None}
