"""A kernel is compiled once, kept, and done without where it cannot be had."""

import re
import shutil

import pytest

from flexjax.kernels import compiled
from flexjax.kernels.decode_attention import DECODE_ATTENTION
from flexjax.kernels.products import PRODUCTS

pytestmark = pytest.mark.skipif(
    not PRODUCTS.is_there(), reason="no kernel for this processor, or no compiler"
)


def forget():
    for function in (
        compiled.library,
        compiled._why_missing,
        compiled._is_there,
    ):
        function.cache_clear()


@pytest.fixture
def anew(tmp_path):
    """As if nothing had been compiled in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "default_cache", lambda: tmp_path)
        forget()
        yield tmp_path
    forget()
    # Now, and not in a test with a cache folder of its own: the handler of a library
    # that is compiled once more cannot be registered in place of the first.
    assert PRODUCTS.is_there()
    assert DECODE_ATTENTION.is_there()


@pytest.mark.parametrize(
    ("cxx", "reason"),
    [
        ("", "there is no C++ compiler, none of no-such-compiler, and CXX is not set"),
        ("no-such -O2", "CXX is 'no-such -O2', and there is no such program; set it"),
        ("g++ 'x", "CXX is .*: No closing quotation"),
        ("/bin/true", "/bin/true ended well, but made nothing"),
        (
            "/bin/false",
            "the kernel products is not to be had: Command .*/bin/false",
        ),
        ("/bin/sh -c 'echo error: out of cheese >&2; exit 1'", "error: out of cheese$"),
    ],
)
def test_without_a_working_compiler_weights_are_made_wide(
    anew, monkeypatch, caplog, cxx, reason
):
    monkeypatch.setattr(compiled, "COMPILERS", ("no-such-compiler",))
    monkeypatch.setenv("CXX", cxx)
    assert re.search(reason.replace("+", r"\+"), PRODUCTS.why_missing() or "")
    assert not caplog.text  # it is for who asks to say so
    assert not PRODUCTS.is_there()
    assert "weights are made wide before they are multiplied with" in caplog.text
    assert caplog.text.count(PRODUCTS.why_missing() or "") == 1
    assert not list((anew / "kernels").glob("*"))


def test_a_cache_that_cannot_be_written_to_is_named(anew, monkeypatch):
    (anew / "file").touch()
    monkeypatch.setattr(compiled, "default_cache", lambda: anew / "file")
    assert str(anew / "file") in (PRODUCTS.why_missing() or "")


def test_what_does_not_load_is_not_kept(anew, monkeypatch):
    def compile_badly(compiler, source, out):
        out.write_text("no library")

    with monkeypatch.context() as patch:
        patch.setattr(compiled, "_compile", compile_badly)
        assert "the kernel products is not to be had: " in (
            PRODUCTS.why_missing() or ""
        )
    assert not list((anew / "kernels").glob("*"))
    assert compiled.library(PRODUCTS.source) is not None


def test_the_chosen_compiler_may_have_arguments(anew, monkeypatch):
    monkeypatch.setenv("CXX", f"{shutil.which('env')} {compiled._compiler()[0]}")
    assert compiled.library(PRODUCTS.source) is not None


def test_what_is_compiled_is_kept(anew, monkeypatch):
    assert compiled.library(PRODUCTS.source) is not None
    (made,) = (anew / "kernels").iterdir()
    compiled.library.cache_clear()
    monkeypatch.setattr(compiled, "_compile", None)  # not called again
    assert compiled.library(PRODUCTS.source) is not None
    assert list((anew / "kernels").iterdir()) == [made]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (compiled.NEEDED[:-2], "this processor has no avx512_bf16, avx512_vnni"),
        (compiled.NEEDED, None),
        (
            [*compiled.NEEDED, "amx_bf16"],
            "XLA does as well by itself on this processor, by",
        ),
    ],
)
def test_the_kernel_is_for_processors_that_have_nothing_better(
    flags, reason, monkeypatch
):
    monkeypatch.setattr(compiled, "_processor_flags", lambda: frozenset(flags))
    monkeypatch.setattr(compiled.platform, "machine", lambda: "x86_64")
    found = PRODUCTS.why_unwanted()
    assert found is None if reason is None else found.startswith(reason)
    monkeypatch.setattr(compiled.platform, "machine", lambda: "aarch64")
    assert PRODUCTS.why_unwanted() == "this processor is aarch64, not x86_64"
