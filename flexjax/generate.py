"""`python -m flexjax.generate`: continues prompts under a policy."""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from flexjax.cli import run_command
from flexjax.outputs import RequestOutput
from flexjax.policy import Policy, to_json
from flexjax.policy_args import (
    add_policy_arguments,
    is_planned,
    policy_from_args,
)
from flexjax.safe_files import ensure_distinct, ensure_writable, write_atomically
from flexjax.sampling_params import SamplingParams
from flexjax.sizes import format_bytes

if TYPE_CHECKING:
    from flexjax.llm import LLM

_DUMMY = "_DUMMY_"  # FlexGen's word for random weights
_EXAMPLE = """examples:
  python -m flexjax.generate --prompt "It is a truth"
  python -m flexjax.generate --model facebook/opt-6.7b --weights disk=1 \\
      --kv-cache host=1 --batch-size 16 --prompts prompts.txt --json outputs.json
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
    parser.add_argument("--prompt", nargs="+", metavar="TEXT", help="texts to continue")
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="a text file with one prompt a line; blank lines are left out",
    )
    parser.add_argument("--json", metavar="FILE", help="write outputs and metrics here")
    parser.add_argument(
        "--trace",
        metavar="FILE",
        help="write what every lane did when, for ui.perfetto.dev",
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        metavar="TYPE",
        help="bfloat16, float16, float32 or auto, the checkpoint's own (default)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default 0)")
    _add_sampling_arguments(parser)
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


def _add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-tokens",
        "--gen-len",
        type=int,
        default=32,
        metavar="N",
        help="tokens to generate for each prompt (default 32)",
    )
    for name, default, help_text in (
        ("temperature", 0.0, "divides the logits; 0 takes the most likely token"),
        ("top-k", 0, "draw from the K most likely tokens; 0: from all"),
        ("top-p", 1.0, "draw from the likeliest tokens that sum to this probability"),
        ("min-p", 0.0, "draw from tokens this likely, relative to the likeliest"),
        ("repetition-penalty", 1.0, "above 1: tokens seen before become less likely"),
    ):
        group.add_argument(
            f"--{name}",
            type=type(default),
            default=default,
            metavar="X",
            help=f"{help_text} (default {default})",
        )
    group.add_argument(
        "--stop", nargs="+", default=(), metavar="TEXT", help="texts that end a row"
    )
    group.add_argument(
        "--stop-token-ids",
        nargs="+",
        type=int,
        default=(),
        metavar="ID",
        help="token ids that end a row",
    )
    group.add_argument(
        "--ignore-eos", action="store_true", help="go on past the end of a text"
    )
    group.add_argument(
        "--logprobs",
        type=int,
        metavar="N",
        help="report log-probabilities, of the N best tokens too",
    )


def main(args: argparse.Namespace) -> None:
    """Runs the parsed command line."""
    params, prompts = _params(args), _read_prompts(args)
    policy = None if is_planned(args) else policy_from_args(args)
    _ensure_files(args)
    model = _model(args)

    # Slow to load: after all that can be refused early.
    from flexjax.llm import LLM
    from flexjax.trace import write_trace

    with LLM(
        model,
        policy=policy,
        dtype=args.dtype,
        offload_dir=args.offload_dir,
        seed=args.seed,
        trace=args.trace is not None,
    ) as llm:
        if prompts is None:
            count = (policy or Policy()).block_size
            prompts = _random_prompts(llm, count, args.prompt_len)
        outputs = llm.generate(prompts, params)
        metrics, placement, spans = llm.metrics, llm.placement, llm.trace
        policy, choice = llm.policy, llm.plan
    assert policy is not None  # it has run
    try:  # the file first, since a terminal may be closed; but a disk may be full
        if args.json is not None:
            report = {
                "outputs": [dataclasses.asdict(output) for output in outputs],
                "metrics": metrics,
                "placement": placement,
                "policy": to_json(policy),
            }
            data = json.dumps(report, indent=1, ensure_ascii=False).encode()
            write_atomically(pathlib.Path(args.json), data)
    finally:
        _print(outputs)
    if choice is not None and choice.plan is None:  # else it was said before the run
        print(choice.reason, file=sys.stderr)
    print(_summary(metrics), file=sys.stderr)
    if args.trace is not None:
        write_trace(pathlib.Path(args.trace), spans)


def _ensure_files(args: argparse.Namespace) -> None:
    """Refuses files that would be lost, or could not be written after a long run."""
    flags = ("json", "trace", "prompts", "policy")
    ensure_distinct({f"--{flag}": getattr(args, flag) for flag in flags})
    for flag in ("json", "trace"):
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


def _params(args: argparse.Namespace) -> SamplingParams:
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    return SamplingParams(
        **{
            name: value
            for name, value in vars(args).items()
            if name in names - {"seed"}
        }
    )


def _read_prompts(args: argparse.Namespace) -> list[str] | None:
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
        return None
    if args.prompt is not None:
        return args.prompt
    try:
        text = pathlib.Path(args.prompts).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts {args.prompts} cannot be read: {error}") from error
    # Not `splitlines`, which also ends a line at characters that texts contain.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts {args.prompts} is empty; write one prompt a line")
    return prompts


def _random_prompts(llm: "LLM", count: int, length: int) -> list[list[int]]:
    from flexjax.prompts import random_prompts

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
