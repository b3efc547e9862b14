"""A kernel is compiled once, kept, and done without where it cannot be had."""

import concurrent.futures
import re
import shutil
import threading
import uuid

import pytest

from flexjax.kernels import compiled
from flexjax.kernels.compiled import AVX2, AVX512
from flexjax.kernels.decode_attention import DECODE_ATTENTION
from flexjax.kernels.products import PRODUCTS

SOURCE = """
#include "xla/ffi/api/ffi.h"
static xla::ffi::Error Nothing() { return xla::ffi::Error::Success(); }
XLA_FFI_DEFINE_HANDLER_SYMBOL(NAME, Nothing, xla::ffi::Ffi::Bind());
"""

WIDTH = f"""
#include "{DECODE_ATTENTION.source.with_name("floats.h")}"
int Bytes(auto x) {{
  if constexpr (requires {{ x.low; }}) return sizeof x.low;
  return sizeof x;
}}
extern "C" int register_bytes() {{ return Bytes(flexjax::Same(0)); }}
"""
LACKING = "this processor has no "
BETTER = "XLA does as well by itself on this processor, by amx_bf16"


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """One that does nothing, and has not been asked for yet."""
    if not DECODE_ATTENTION.is_there():
        pytest.skip("no kernel for this processor, or no compiler")
    monkeypatch.setattr(compiled, "default_cache", lambda: tmp_path)
    target = f"nothing_{uuid.uuid4().hex}"  # a handler stays registered
    source = tmp_path / "nothing.cc"
    source.write_text(SOURCE.replace("NAME", target))
    compiled_for = DECODE_ATTENTION.compiled_for
    return compiled.Kernel(
        source, (target,), compiled_for, without="nothing is done slowly"
    )


def made(kernel):
    return list((kernel.source.parent / "kernels").glob("*"))


@pytest.mark.parametrize(
    ("cxx", "reason"),
    [
        ("", "there is no C++ compiler, none of no-such-compiler, and CXX is not set"),
        ("no-such -O2", "CXX is 'no-such -O2', and there is no such program; set it"),
        ("g++ 'x", "CXX is .*: No closing quotation"),
        ("/bin/true", "/bin/true ended well, but made nothing"),
        ("/bin/false", "the kernel nothing is not to be had: Command .*/bin/false"),
        ("/bin/sh -c 'echo error: out of cheese >&2; exit 1'", "error: out of cheese$"),
    ],
)
def test_without_a_working_compiler_it_is_said_once_what_that_means(
    kernel, monkeypatch, caplog, cxx, reason
):
    monkeypatch.setattr(compiled, "COMPILERS", ("no-such-compiler",))
    monkeypatch.setenv("CXX", cxx)
    assert re.search(reason.replace("+", r"\+"), kernel.why_missing() or "")
    assert not caplog.text  # it is for who asks to say so
    for _ in range(2):
        assert not kernel.is_there()
    assert "nothing is done slowly: " in caplog.text
    assert caplog.text.count(kernel.why_missing() or "") == 1
    assert not made(kernel)


def test_a_cache_that_cannot_be_written_to_is_named(kernel, monkeypatch):
    file = kernel.source
    monkeypatch.setattr(compiled, "default_cache", lambda: file)
    assert str(file) in (kernel.why_missing() or "")


def test_what_does_not_load_is_not_kept(kernel, monkeypatch):
    def compile_badly(command, source, out):
        out.write_text("no library")

    monkeypatch.setattr(compiled, "_compile", compile_badly)
    assert "the kernel nothing is not to be had: " in (kernel.why_missing() or "")
    assert not made(kernel)


def test_what_is_compiled_is_kept(kernel, monkeypatch):
    # A compiler may have arguments.
    monkeypatch.setenv("CXX", f"{shutil.which('env')} {compiled._compiler()[0]}")
    assert compiled.library(kernel.source, kernel.instructions()) is not None
    (library,) = made(kernel)
    compiled.library.cache_clear()
    monkeypatch.setattr(compiled, "_compile", None)  # not called again
    assert kernel.is_there()
    assert made(kernel) == [library]


def test_threads_that_want_a_kernel_at_once_all_get_it(kernel):
    together = threading.Barrier(4)

    def ask():
        together.wait()
        return kernel.is_there()

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(ask) for _ in range(4)]
        assert all(one.result() for one in asked)


@pytest.mark.parametrize("more", ["", " -march=native"])
@pytest.mark.parametrize(
    ("instructions", "width"), [(AVX2, 32), (AVX512, 64)], ids=["avx2", "avx512"]
)
def test_a_kernel_is_compiled_for_each_set_of_instructions(
    kernel, monkeypatch, more, instructions, width
):
    if lacking := instructions.lacking():
        pytest.skip(f"this processor has no {', '.join(lacking)}")
    # Whatever else the compiler was told of.
    monkeypatch.setenv("CXX", compiled._compiler()[0] + more)
    kernel.source.write_text(WIDTH)
    library = compiled.library(kernel.source, instructions)
    assert library.register_bytes() == width


@pytest.mark.parametrize(
    ("flags", "multiplies", "attends"),
    [
        ((), LACKING + "avx2, fma, f16c", LACKING + "avx2, fma, f16c"),
        (("avx2", "fma"), LACKING + "f16c", LACKING + "f16c"),
        ((*AVX2.names, *AVX512.names[:-2]), AVX2, AVX2),
        ((*AVX2.names, *AVX512.names), AVX512, AVX512),
        ((*AVX2.names, *AVX512.names, "amx_bf16"), BETTER, AVX512),
    ],
)
def test_the_kernels_are_for_processors_that_have_nothing_better(
    flags, multiplies, attends, monkeypatch
):
    monkeypatch.setattr(compiled, "cpu_flags", lambda: frozenset(flags))
    monkeypatch.setattr(compiled.platform, "machine", lambda: "x86_64")
    for kernel, expected in ((PRODUCTS, multiplies), (DECODE_ATTENTION, attends)):
        assert (kernel.why_unwanted() or kernel.instructions()) == expected
    monkeypatch.setattr(compiled.platform, "machine", lambda: "aarch64")
    for kernel in (PRODUCTS, DECODE_ATTENTION):
        assert kernel.why_unwanted() == "this processor is aarch64, not x86_64"
