"""`python -m flexjax.evaluate`: lm-evaluation-harness's command line, on flexjax."""

# pyright: reportMissingImports=false
# The harness is an extra, and large.

import argparse
import sys
from collections.abc import Sequence

from flexjax.cli import run_command

_SUBCOMMANDS = ("ls", "validate")  # which take no model


def main(args: argparse.Namespace) -> None:
    """Runs the harness with what was given."""
    try:
        from lm_eval.__main__ import cli_evaluate

        import flexjax.harness  # noqa: F401 - registers the model
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        raise ValueError(
            "this needs lm-evaluation-harness: pip install 'flexjax[eval]'"
        ) from error
    given = list(args.arguments)
    if given[:1] == ["run"]:
        del given[0]
    has_config = any(argument.startswith(("--config", "-C")) for argument in given)
    if given and given[0] not in _SUBCOMMANDS and not has_config:
        # Before what was given, so that a model that is named there is taken.
        given = ["run", "--model", "flexjax", *given]
    sys.argv = ["python -m flexjax.evaluate", *given]
    cli_evaluate()


def run(argv: Sequence[str]) -> int:
    """The exit status; all arguments but `--debug` are the harness's."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("arguments", nargs="*")
    ours = [argument for argument in argv if argument == "--debug"]
    theirs = [argument for argument in argv if argument != "--debug"]
    return run_command(main, parser, [*ours, "--", *theirs])


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
