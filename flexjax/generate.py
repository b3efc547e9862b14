"""`python -m flexjax.generate`: continues prompts under a policy."""

import argparse
import dataclasses
import json
import os
import pathlib
import sys

from flexjax.cli import run_command
from flexjax.policy import to_json
from flexjax.policy_args import add_policy_arguments, policy_from_args
from flexjax.safe_files import make_folder, write_atomically
from flexjax.sampling_params import SamplingParams

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
        "--prompts", metavar="FILE", help="a text file with one prompt a line"
    )
    parser.add_argument("--json", metavar="FILE", help="write outputs and metrics here")
    parser.add_argument(
        "--dtype",
        default="auto",
        metavar="TYPE",
        help="bfloat16, float16, float32 or auto, the checkpoint's own (default)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default 0)")
    _add_sampling_arguments(parser)
    add_policy_arguments(parser)
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
    group.add_argument("--temperature", type=float, default=0.0, metavar="T")
    group.add_argument("--top-k", type=int, default=0, metavar="K")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P")
    group.add_argument("--min-p", type=float, default=0.0, metavar="P")
    group.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R")
    group.add_argument("--stop", nargs="+", default=(), metavar="TEXT")
    group.add_argument(
        "--stop-token-ids", nargs="+", type=int, default=(), metavar="ID"
    )
    group.add_argument("--ignore-eos", action="store_true")
    group.add_argument(
        "--logprobs",
        type=int,
        metavar="N",
        help="report log-probabilities, of the N best tokens too",
    )


def main(args: argparse.Namespace) -> None:
    """Runs the parsed command line."""
    params, policy, prompts = _params(args), policy_from_args(args), _read_prompts(args)
    if args.json is not None:
        make_folder(pathlib.Path(args.json).absolute().parent)
    model = _model(args)

    from flexjax.llm import LLM  # JAX starts here: after all that can be refused early

    with LLM(
        model,
        policy=policy,
        dtype=args.dtype,
        offload_dir=args.offload_dir,
        seed=args.seed,
    ) as llm:
        if prompts is None:
            vocab_size, count = llm.config.vocab_size, policy.block_size
            prompts = _random_prompts(vocab_size, count, args.prompt_len)
        outputs = llm.generate(prompts, params)
        metrics, placement = llm.metrics, llm.placement
    for output in outputs:
        completion = output.outputs[0]
        print(output.prompt or output.prompt_token_ids, end="")
        print(f"{completion.text or completion.token_ids}\n")
    print(_summary(metrics), file=sys.stderr)
    if args.json is not None:
        report = {
            "outputs": [dataclasses.asdict(output) for output in outputs],
            "metrics": metrics,
            "placement": placement,
            "policy": to_json(policy),
        }
        data = json.dumps(report, indent=1, ensure_ascii=False).encode()
        write_atomically(pathlib.Path(args.json), data)


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
        lines = pathlib.Path(args.prompts).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts {args.prompts} cannot be read: {error}") from error
    if not lines:
        raise ValueError(f"--prompts {args.prompts} is empty; write one prompt a line")
    return lines


def _random_prompts(vocab_size: int, count: int, length: int) -> list[list[int]]:
    import numpy as np

    return np.random.default_rng(0).integers(4, vocab_size, (count, length)).tolist()


def _model(args: argparse.Namespace) -> str | os.PathLike[str] | None:
    if args.path is None:
        return args.model
    if args.path != _DUMMY:
        if not pathlib.Path(args.path).is_dir():
            raise ValueError(
                f"--path {args.path} is no folder; give the model's folder"
            )
        return args.path
    if args.model is None:
        raise ValueError(f"--path {_DUMMY} needs --model, such as facebook/opt-6.7b")
    from checkpoints_tools.resolve import default_cache
    from checkpoints_tools.synthesize import synthesize_store
    from flexjax.models.config import named_config
    from flexjax.store_format import DTYPES

    folder = default_cache() / f"random-{args.model.rpartition('/')[2]}"
    dtype = DTYPES["bfloat16"]
    synthesize_store(folder, named_config(args.model), dtype, seed=0)
    return folder


def _summary(metrics: dict) -> str:
    moved = ", ".join(
        f"{nbytes / 1e9:.2f} GB {link}"
        for link, nbytes in metrics["bytes_moved"].items()
    )
    peaks = ", ".join(
        f"{nbytes / 1e9:.2f} GB {tier}"
        for tier, nbytes in metrics["peak_bytes"].items()
    )
    rss = metrics["peak_rss_bytes"] / 1e9
    return (
        f"{metrics['num_tokens']} tokens in {metrics['seconds']:.2f} s "
        f"({metrics['tokens_per_s']:.1f} tokens/s; prefill "
        f"{metrics['prefill_s']:.2f} s), slowest: {metrics['slowest']}\n"
        f"moved: {moved or 'nothing'}\npeak: {peaks}; {rss:.2f} GB resident"
    )


if __name__ == "__main__":
    sys.exit(run_command(main, build_parser()))
