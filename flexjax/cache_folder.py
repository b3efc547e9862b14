"""Where what is made once is kept: converted weights, figures, compiled kernels."""

import os
import pathlib

CACHE_VARIABLE = "FLEXJAX_CACHE"


def default_cache() -> pathlib.Path:
    """`$FLEXJAX_CACHE`, or else `~/.cache/flexjax`."""
    chosen = os.environ.get(CACHE_VARIABLE) or "~/.cache/flexjax"
    return pathlib.Path(chosen).expanduser()
