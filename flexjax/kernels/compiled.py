"""Kernels of the package, compiled for a processor when they are first wanted.

They are extensions of XLA's CPU backend (`jax.ffi`), in C++ beside this module. What is
made of one stays in the cache folder, by a name that knows its source and how it was
compiled. Where there is no compiler, or not the processor, XLA alone does the work.
"""

import ctypes
import dataclasses
import functools
import hashlib
import logging
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence

import jax

from flexjax.cache_folder import default_cache
from flexjax.host_facts import cpu_flags
from flexjax.safe_files import make_folder, sync_tree

FLAGS = ("-O3", "-std=c++20", "-fPIC", "-shared", "-w")
COMPILERS = ("c++", "g++", "clang++")
COMPILES_WITHIN_S = 300.0

logger = logging.getLogger(__name__)
_compiling = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Instructions:
    """What a source may be compiled for.

    Attributes:
        names: what a processor has, as Linux calls it.
        flags: what tells a compiler to use it.
    """

    names: tuple[str, ...]
    flags: tuple[str, ...]

    def lacking(self) -> list[str]:
        """What of it this processor does not have."""
        return [name for name in self.names if name not in cpu_flags()]


AVX512 = Instructions(
    (
        *("avx512f", "avx512bw", "avx512vl", "avx512dq"),
        *("avx512_bf16", "avx512_vnni"),
    ),
    (
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"),
        *("-mavx512bf16", "-mavx512vnni"),
    ),
)
AVX2 = Instructions(
    ("avx2", "fma", "f16c"), ("-DFLEXJAX_AVX2", "-mavx2", "-mfma", "-mf16c")
)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Functions of one source that XLA can call by their names.

    Attributes:
        source: a .cc file.
        targets: names of its handlers.
        compiled_for: what it may be compiled for, the fastest first; the first that a
            processor has is the one.
        without: what the lack of it means, for a warning.
        better: what processors have that do as well by XLA alone, if any do.
    """

    source: pathlib.Path
    targets: tuple[str, ...]
    compiled_for: tuple[Instructions, ...]
    without: str
    better: str | None = None

    def instructions(self) -> Instructions | None:
        """What this processor has it compiled for; None if it has too little."""
        fitting = (one for one in self.compiled_for if not one.lacking())
        return next(fitting, None)

    def why_unwanted(self) -> str | None:
        """Why this processor does without the kernel; None if it does not."""
        if platform.machine() != "x86_64":
            return f"this processor is {platform.machine()}, not x86_64"
        if self.instructions() is None:
            least = self.compiled_for[-1]
            return f"this processor has no {', '.join(least.lacking())}"
        if self.better in cpu_flags():
            return f"XLA does as well by itself on this processor, by {self.better}"
        return None

    def why_missing(self) -> str | None:
        """Why the kernel is not there; None where it is.

        The first time it is compiled.
        """
        return _why_missing(self)

    def is_there(self) -> bool:
        """Whether the kernel is there; warns once if it is not, but should be."""
        return _is_there(self)


def _why_missing(kernel: Kernel) -> str | None:
    with _compiling:
        return _why_unregistered(kernel)


@functools.cache
def _why_unregistered(kernel: Kernel) -> str | None:
    """What registers the kernel, if it can; a second time JAX would refuse it."""
    if reason := kernel.why_unwanted():
        return reason
    instructions = kernel.instructions()
    assert instructions is not None  # or it would be unwanted
    try:
        loaded = library(kernel.source, instructions)
    except ValueError as error:
        return str(error)
    for name in kernel.targets:
        handler = jax.ffi.pycapsule(getattr(loaded, name))
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    return None


@functools.cache
def _is_there(kernel: Kernel) -> bool:
    reason = kernel.why_missing()
    if reason is not None and kernel.why_unwanted() is None:
        logger.warning("%s: %s", kernel.without, reason)
    return reason is None


@functools.cache
def library(source: pathlib.Path, instructions: Instructions) -> ctypes.CDLL:
    """The library of a .cc file.

    Raises:
        ValueError: it cannot be made.
    """
    try:
        return _loaded(source, [*FLAGS, *instructions.flags])
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise ValueError(
            f"the kernel {source.stem} is not to be had: {_reason(error)}"
        ) from error


def _loaded(source: pathlib.Path, flags: Sequence[str]) -> ctypes.CDLL:
    """The library, compiled if it is not there yet; it is kept only if it loads."""
    # With all that it may include.
    sources = [path.read_bytes() for path in sorted(source.parent.glob("*.[ch]*"))]
    facts = [*sources, *map(str.encode, (*flags, jax.__version__))]
    digest = hashlib.sha256(b"\0".join(facts)).hexdigest()[:16]
    folder = default_cache() / "kernels"
    path = folder / f"{source.stem}-{digest}.so"
    if path.exists():
        return ctypes.CDLL(str(path))
    compiler = _compiler()
    logger.info("compiling the kernel %s, once, into %s", source.stem, folder)
    make_folder(folder)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:  # of this process
        out = pathlib.Path(scratch, path.name)
        _compile([*compiler, *flags], source, out)
        if not out.exists():
            raise ValueError(f"{shlex.join(compiler)} ended well, but made nothing")
        made = ctypes.CDLL(str(out))
        sync_tree(pathlib.Path(scratch))
        out.replace(path)
    return made


def _compile(command: Sequence[str], source: pathlib.Path, out: pathlib.Path) -> None:
    include = f"-I{jax.ffi.include_dir()}"
    subprocess.run(
        [*command, include, str(source), "-o", str(out)],
        capture_output=True,
        check=True,
        timeout=COMPILES_WITHIN_S,
    )


def _compiler() -> list[str]:
    """The command of a C++ compiler: `$CXX`, or what the system calls so.

    Raises:
        ValueError: there is none.
    """
    if command := os.environ.get("CXX"):
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise ValueError(f"CXX is {command!r}: {error}") from error
        if words and shutil.which(words[0]) is not None:
            return words
        raise ValueError(
            f"CXX is {command!r}, and there is no such program; set it to a C++ "
            "compiler, or unset it"
        )
    for name in COMPILERS:
        if (path := shutil.which(name)) is not None:
            return [path]
    raise ValueError(
        f"there is no C++ compiler, none of {', '.join(COMPILERS)}, and CXX is not set"
    )


def _reason(error: Exception) -> str:
    """What went wrong, in one line."""
    if isinstance(error, subprocess.CalledProcessError):
        lines = error.stderr.decode(errors="replace").splitlines()
        return next((line for line in lines if "error" in line), str(error))
    return str(error)
