"""`python -m flexjax.generate`: continues prompts under a policy."""

import argparse
import contextlib
import dataclasses
import io
import json
import math
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from flexjax.answer_file import AnswerFile, partial_path, refuse_finished
from flexjax.cli import run_command
from flexjax.outputs import RequestOutput
from flexjax.policy import Policy, to_json
from flexjax.policy_args import (
    add_policy_arguments,
    is_planned,
    policy_from_args,
)
from flexjax.prompt_file import PromptFile, prompts_path
from flexjax.prompts import Prompt, random_prompts
from flexjax.safe_files import ensure_distinct, ensure_writable, write_atomically
from flexjax.sampling_args import add_sampling_arguments, params_from_args
from flexjax.sampling_params import SamplingParams
from flexjax.sizes import format_bytes

if TYPE_CHECKING:
    from flexjax.llm import LLM

_DUMMY = "_DUMMY_"  # FlexGen's word for random weights
_EXAMPLE = """examples:
  python -m flexjax.generate --prompt "It is a truth"
  python -m flexjax.generate --model facebook/opt-6.7b --weights disk=1 \\
      --kv-cache host=1 --batch-size 16 --prompts prompts.txt --json outputs.json
  python -m flexjax.generate --model facebook/opt-6.7b --prompts rows.jsonl \\
      --output answers.jsonl
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m flexjax.generate",
        description="Continues prompts with an OPT model that may be larger than the "
        "memory of the device.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model",
        help="a folder with a checkpoint or a weight store, or a Hub id; the small "
        "model that comes with flexjax, if not given",
    )
    _add_file_arguments(parser)
    parser.add_argument(
        "--dtype",
        default="auto",
        metavar="TYPE",
        help="bfloat16, float16, float32 or auto, the checkpoint's own (default)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default 0)")
    add_sampling_arguments(parser)
    add_policy_arguments(parser, can_plan=True)
    parser.add_argument(
        "--prompt-len",
        type=int,
        metavar="N",
        help="instead of prompts: a block of random prompts of N tokens",
    )
    parser.add_argument(
        "--path",
        metavar="DIR",
        help=f"the model's folder; {_DUMMY} runs the named model with random weights",
    )
    return parser


def _add_file_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", nargs="+", metavar="TEXT", help="texts to continue")
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="a file with one prompt a line, blank lines left out, or - for what is "
        "piped in: texts; or in a .jsonl file, and where the first line is such a list "
        'or object, JSON texts, lists of token ids, or objects with a "prompt"',
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="write an answer to each line of --prompts here, as JSON lines, and print "
        "none; the same command goes on where a run of it was stopped. A file that is "
        "there is refused",
    )
    parser.add_argument(
        "--block-latency",
        type=float,
        metavar="SECONDS",
        help="of --output without a policy, where not all fits on the device: plan "
        "blocks that take no longer, so that a kill costs no more",
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="write outputs, metrics, placement and policy here; with --output, no "
        "outputs",
    )
    parser.add_argument(
        "--trace",
        metavar="FILE",
        help="write what every lane did when, for ui.perfetto.dev",
    )


def main(args: argparse.Namespace) -> None:
    """Runs the parsed command line."""
    params = params_from_args(args)
    policy = None if is_planned(args) else policy_from_args(args)
    _check_block_latency(args, policy)
    _ensure_files(args)
    with _read_prompts(args) as prompts:
        _run(args, prompts, params, policy=policy)


def _check_block_latency(args: argparse.Namespace, policy: Policy | None) -> None:
    if args.block_latency is None:
        return
    if args.output is None or policy is not None:
        raise ValueError(
            "--block-latency bounds the blocks of --output FILE where no policy is "
            "given; leave it out"
        )
    if not args.block_latency > 0:
        raise ValueError(
            f"--block-latency is {args.block_latency:g}, expected more than 0 seconds"
        )


def _run(
    args: argparse.Namespace,
    prompts: Sequence[Prompt] | None,
    params: SamplingParams,
    *,
    policy: Policy | None,
) -> None:
    model = _model(args)
    # Slow to load: after all that can be refused early.
    from flexjax.file_job import answer_prompts
    from flexjax.llm import LLM
    from flexjax.trace import write_trace

    with (
        _opened_answers(args, prompts) as answers,
        LLM(
            model,
            policy=policy,
            dtype=args.dtype,
            offload_dir=args.offload_dir,
            seed=args.seed,
            progress=None if args.output is None else True,
            trace=args.trace is not None,
        ) as llm,
    ):
        outputs: list[RequestOutput] = []
        if answers is not None:
            assert isinstance(prompts, PromptFile)
            bound_s = math.inf if args.block_latency is None else args.block_latency
            answer_prompts(
                llm,
                prompts,
                answers,
                params=params,
                block_latency_s=bound_s,
                notice=_say,
            )
            _say(f"{len(prompts):,} answers in {args.output}")
        else:
            if prompts is None:
                count = (policy or Policy()).block_size
                prompts = _random_prompts(llm, count, args.prompt_len)
            outputs = llm.generate(prompts, params)
    try:  # the file first, since a terminal may be closed; but a disk may be full
        if args.json is not None:
            _write_report(args, llm, outputs)
    finally:
        _print(outputs)
    if llm.plan is not None and llm.plan.plan is None:  # else it was said before
        _say(llm.plan.reason)
    if llm.metrics:  # else all was there
        _say(_summary(llm.metrics))
    if args.trace is not None:
        write_trace(pathlib.Path(args.trace), llm.trace)


def _opened_answers(
    args: argparse.Namespace, prompts: Sequence[Prompt] | None
) -> contextlib.AbstractContextManager[AnswerFile | None]:
    """Where answers go; opened before a model is, since another run may be at it."""
    if args.output is None or prompts is None:
        return contextlib.nullcontext()
    return AnswerFile(pathlib.Path(args.output), len(prompts))


def _write_report(
    args: argparse.Namespace, llm: "LLM", outputs: Sequence[RequestOutput]
) -> None:
    report = {
        "metrics": llm.metrics,
        "placement": llm.placement,
        "policy": None if llm.policy is None else to_json(llm.policy),
    }
    if args.output is None:
        report = {"outputs": [dataclasses.asdict(one) for one in outputs], **report}
    data = json.dumps(report, indent=1, ensure_ascii=False).encode()
    write_atomically(pathlib.Path(args.json), data)


def _say(text: str) -> None:
    """Tells the user; answers alone go to stdout."""
    print(text, file=sys.stderr)


def _ensure_files(args: argparse.Namespace) -> None:
    """Refuses files that would be lost, or could not be written after a long run."""
    flags = ("json", "trace", "output", "prompts", "policy")
    files = {f"--{flag}": getattr(args, flag) for flag in flags}
    if args.output is not None:
        if args.prompts is None:
            raise ValueError(
                "--output is for answers to --prompts FILE; --json FILE has those to "
                "other prompts"
            )
        output = pathlib.Path(args.output).resolve()
        if args.output.endswith("/") or not args.output or output.is_dir():
            raise ValueError(
                f"--output {args.output!r} names no file; name one, such as "
                "answers.jsonl"
            )
        refuse_finished(output)
        files["the partial file of --output"] = str(partial_path(output))
    ensure_distinct(files)
    for flag in ("json", "trace", "output"):
        if (name := getattr(args, flag)) is not None:
            ensure_writable(f"--{flag}", pathlib.Path(name))


def _print(outputs: Sequence[RequestOutput]) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    with contextlib.suppress(BrokenPipeError):  # whoever read has read enough
        for output in outputs:
            completion = output.outputs[0]
            print(output.prompt or output.prompt_token_ids, end="")
            print(f"{completion.text or completion.token_ids}\n")
        sys.stdout.flush()


@contextlib.contextmanager
def _read_prompts(args: argparse.Namespace) -> Iterator[Sequence[Prompt] | None]:
    """The prompts that were given; None asks for random ones."""
    given = [
        name
        for name in ("prompt", "prompts", "prompt_len")
        if getattr(args, name) is not None
    ]
    if len(given) != 1:
        raise ValueError(
            "give the prompts in one way: --prompt TEXT ..., --prompts FILE or "
            f"--prompt-len N (got {' and '.join(given) or 'none'})"
        )
    if args.prompt_len is not None:
        if args.prompt_len < 1:
            raise ValueError(f"--prompt-len is {args.prompt_len}, expected at least 1")
        yield None
    elif args.prompt is not None:
        yield args.prompt
    else:
        with PromptFile(prompts_path(args.prompts)) as prompts:
            yield prompts


def _random_prompts(llm: "LLM", count: int, length: int) -> list[list[int]]:
    if length > llm.max_model_len:
        raise ValueError(
            f"--prompt-len is {length}, but the model has positions for "
            f"{llm.max_model_len}; give at most that"
        )
    return random_prompts(llm.config.vocab_size, count, length)


def _model(args: argparse.Namespace) -> str | os.PathLike[str] | None:
    if args.path is None:
        return args.model
    if args.path != _DUMMY:
        if args.model is not None:
            raise ValueError("--model and --path both name a model; give one of them")
        if not pathlib.Path(args.path).is_dir():
            raise ValueError(
                f"--path {args.path} is no folder; give the model's folder"
            )
        return args.path
    if args.model is None:
        raise ValueError(f"--path {_DUMMY} needs --model, such as facebook/opt-6.7b")
    from checkpoints_tools.synthesize import random_store

    return random_store(args.model)


def _summary(metrics: dict) -> str:
    moved = ", ".join(
        f"{format_bytes(nbytes)} {link}"
        for link, nbytes in metrics["bytes_moved"].items()
    )
    peaks = ", ".join(
        f"{format_bytes(nbytes)} {tier}"
        for tier, nbytes in metrics["peak_bytes"].items()
    )
    rss = format_bytes(metrics["peak_rss_bytes"])
    return (
        f"{metrics['num_tokens']} tokens in {metrics['seconds']:.2f} s "
        f"({metrics['tokens_per_s']:.1f} tokens/s; prefill "
        f"{metrics['prefill']['seconds']:.2f} s), slowest: {metrics['slowest']}\n"
        f"moved: {moved or 'nothing'}\npeak: {peaks}; {rss} resident"
        f"{_beside_measured(metrics)}"
    )


def _beside_measured(metrics: dict) -> str:
    """What was predicted, beside what came; nothing where no plan was made."""
    predicted = metrics.get("predicted")
    if predicted is None:
        return ""
    phases = ", ".join(
        f"{phase} {metrics[phase]['seconds']:.1f} s for "
        f"{predicted[f'{phase}_s']:.1f} s predicted"
        for phase in ("prefill", "decode")
    )
    return f"\n{phases}"


if __name__ == "__main__":
    sys.exit(run_command(main, build_parser()))
