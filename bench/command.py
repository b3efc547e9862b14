"""The command line that made a result, to be typed again."""

import argparse
import pathlib
import shlex
from collections.abc import Collection
from typing import Any

_NAMES_A_FOLDER = ("model", "models", "policy")


def typed(
    module: str,
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    *,
    leave_out: Collection[str],
) -> str:
    """What to type for the same result; without paths of this machine.

    Args:
        module: that is run.
        parser: of its arguments.
        args: what was parsed.
        leave_out: arguments that change nothing of the result.
    """
    words = ["python", "-m", module]
    for action in parser._actions:
        name, value = action.dest, getattr(args, action.dest, None)
        plain = action.default
        is_list = isinstance(value, list)
        if name in leave_out or value is None:
            continue
        if value == (list(plain) if is_list and plain is not None else plain):
            continue
        words += action.option_strings[:1]
        if action.nargs != 0:  # a switch has no value
            words += _words(name, value)
    return shlex.join(words)


def _words(name: str, value: Any) -> list[str]:
    """The value of an argument, as it is typed."""
    if isinstance(value, bool):
        return ["true" if value else "false"]
    if isinstance(value, list | tuple):
        return [word for part in value for word in _words(name, part)]
    if name in _NAMES_A_FOLDER:
        return [pathlib.PurePath(value).name]
    return [f"{value:g}" if isinstance(value, float) else str(value)]
