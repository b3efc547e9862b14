"""The arguments of command lines that say how tokens are chosen."""

import argparse
import dataclasses

from flexjax.sampling_params import SamplingParams


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that `params_from_args` reads."""
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


def params_from_args(args: argparse.Namespace) -> SamplingParams:
    """What `add_sampling_arguments` took; the engine has the seed.

    Raises:
        ValueError: a value cannot be used.
    """
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    return SamplingParams(
        **{
            name: value
            for name, value in vars(args).items()
            if name in names - {"seed"}
        }
    )
