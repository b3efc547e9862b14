"""The check that tests/conftest.py puts around the functions of the array modules."""

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

_strict = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Checks the arguments and result of `function` at every call.

    Not of an `__init__`: JAX rebuilds pytrees with any leaf, None and shapes too. Nor
    of a function within another, for which a check would be made at every call of that:
    measured, a quarter of some tests' time.
    """
    is_local = "<locals>" in function.__qualname__
    return (
        function if is_local or function.__name__ == "__init__" else _strict(function)
    )
