"""The ground of all tests: shapes checked, silent upcasts forbidden, quick compiles."""

import functools
import gc
import importlib
import importlib.util
import os
import pathlib
import tempfile

import hypothesis

# Before JAX is imported. Subprocesses of the tests inherit these.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # workers share a GPU
if not pathlib.Path("/dev/nvidia0").exists():
    # Most of the suite's time is compilation: measured, a quarter of it goes away.
    os.environ.setdefault(
        "XLA_FLAGS",
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    )

# Workers and subprocesses compile the same steps again and again: measured, 7 % of the
# suite's time. They inherit the variables from the first process, which outlives them
# and removes the folder; whoever sets one of their own keeps it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="flexjax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import jaxtyping
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")

# Modules whose functions say shapes of arrays, checked at every call. Doors are left
# out, so that they answer a wrong type as they do for a user; and so are modules that
# move arrays or plan, which say hardly any and are called millions of times.
CHECKED = [
    "flexjax.attention",
    "flexjax.cached_attention",
    "flexjax.kernels.decode_attention",
    "flexjax.kernels.products",
    "flexjax.logprobs",
    "flexjax.memory.device",
    "flexjax.models.opt",
    "flexjax.quant",
    "flexjax.sampling",
    "flexjax.sparse",
    "flexjax.steps",
]
if importlib.util.find_spec("beartype"):
    importlib.import_module("tests.typecheck")  # the hook itself imports only `tests`
    jaxtyping.install_import_hook(CHECKED, "tests.typecheck.check")

# `HYPOTHESIS_PROFILE=thorough make test` looks further, and elsewhere each time.
hypothesis.settings.register_profile(
    "default", deadline=None, derandomize=True, max_examples=12, database=None
)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=300)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# After the hook, which only sees what is imported later.
from tests.golden_checkpoints import load_golden  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def _settled():
    """What is there before a file's tests is not looked through for garbage any more.

    JAX keeps what it has traced and compiled: so many objects that each collection
    takes a second, and runs that are short of memory ask for one. What is let go of in
    another file, and is part of a cycle, stays until the end.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def golden(tmp_path_factory):
    """Loads a golden checkpoint by its name, once a session."""
    folder = tmp_path_factory.mktemp("golden")
    return functools.cache(lambda name: load_golden(name, folder / name))


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    monkeypatch.setenv("FLEXJAX_CACHE", str(tmp_path / "cache"))
