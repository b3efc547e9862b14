"""Law 6: whatever fails in the middle of a run, the caller hears of it and may go on.

Every fault strikes at some call of a function that moves or computes something; most
are real ones, done to the files. Then the same engine must run again as if nothing had
happened, and `close` must leave nothing.
"""

import contextlib
import errno
import functools
import pathlib
import subprocess

import jax
import pytest

from flexjax import blocks, extents, layer_calls
from flexjax.checkpoint import WeightStore, open_store
from flexjax.engine import Engine
from flexjax.memory import disk, spill, weights
from flexjax.memory.buffers import BufferPool
from flexjax.memory.link import DeviceLink
from flexjax.policy import Schedule, Tier
from flexjax.store_format import chunk_path
from tests.cells import every_other
from tests.common import WatchedOs, flexjax_threads, in_time
from tests.faults import (
    Run,
    failing,
    hurt_file,
    hurt_rows,
    hurt_spill,
    policy,
    raises,
    striking,
    truncate,
    unreadable_rows,
)


@pytest.fixture
def start(golden, tmp_path):
    """Makes a `Run` of a schedule, which is closed in the end."""
    with contextlib.ExitStack() as stack:

        def make(schedule: Schedule = Schedule.ZIGZAG) -> Run:
            run = Run(golden, tmp_path, schedule)
            stack.callback(run.close)
            return run

        yield make


@pytest.fixture
def run(start):
    return start()


TENSOR = r"cannot read tensor '[\w.]+' of .*store: "
ARRAY = r"\((Hidden|Cache)\(.*\), [01]\) could not be "
READ, WRITTEN = ARRAY + r"read in .*/spill/", ARRAY + r"written in .*/spill/"
NO_READ = r".*Input/output error: '.*/store/tensors/"

# What strikes at the n-th call, and what the caller hears of it.
FAULTS = {
    "weights open": (
        functools.partial(failing, "open", "store", errno.EACCES),
        (OSError, TENSOR + r".*Permission denied: '.*/store/tensors/"),
    ),
    "weights read": (
        functools.partial(failing, "preadv", "store", errno.EIO),
        (OSError, TENSOR + NO_READ),
    ),
    "weights close": (
        functools.partial(failing, "close", "store", errno.EIO),
        (OSError, TENSOR + NO_READ),
    ),
    "weights missing": (
        functools.partial(
            striking, weights, "read_extent", hurt_file(pathlib.Path.unlink)
        ),
        (OSError, TENSOR + r".*No such file or directory: '.*/store/tensors/"),
    ),
    "weights short": (
        functools.partial(striking, weights, "read_extent", hurt_file(truncate)),
        (OSError, TENSOR + r"/.*/store/tensors/.* ended early"),
    ),
    "token rows missing": (
        functools.partial(
            striking, WeightStore, "gather_rows", hurt_rows(pathlib.Path.unlink)
        ),
        (OSError, r"store/tensors/embed_tokens\.weight/.*: No such file"),
    ),
    "token rows short": (
        functools.partial(striking, WeightStore, "gather_rows", hurt_rows(truncate)),
        (OSError, r"store/tensors/embed_tokens\.weight/.* ended early"),
    ),
    "token rows unreadable": (
        unreadable_rows,
        (OSError, r"cannot read .*store/tensors/embed_tokens.* Input/output error"),
    ),
    "spill open": (
        functools.partial(failing, "open", "spill", errno.EMFILE),
        (OSError, ARRAY + r"(read|written) in .*/spill/.*: .*Too many open files"),
    ),
    "spill read": (
        functools.partial(failing, "preadv", "spill", errno.EIO),
        (OSError, READ + r".*: .*Input/output error: '.*/spill/.*check the disk"),
    ),
    "spill missing": (
        functools.partial(
            striking, disk, "read_extent", hurt_spill(pathlib.Path.unlink)
        ),
        (OSError, READ + r".*: .*No such file or directory: '.*/spill/"),
    ),
    "spill short": (
        functools.partial(striking, disk, "read_extent", hurt_spill(truncate)),
        (OSError, READ + r".*/spill/.* ended early"),
    ),
    "spill write": (
        functools.partial(failing, "pwritev", "spill", errno.EIO),
        (OSError, WRITTEN + r".*: .*Input/output error: '.*/spill/.*check the disk"),
    ),
    "spill full": (
        functools.partial(failing, "pwritev", "spill", errno.ENOSPC),
        (OSError, WRITTEN + r".*: .*No space left on device: .*its free space"),
    ),
    "spill close": (  # the first one is always that of a write
        functools.partial(failing, "close", "spill", errno.EIO),
        (OSError, ARRAY + r"(read|written) in .*/spill/.*: .*error: '.*/spill/"),
    ),
    "no memory": (
        functools.partial(
            striking,
            BufferPool,
            "take",
            raises(MemoryError("the host has no memory left")),
        ),
        (MemoryError, "no memory left"),
    ),
    "upload": (
        functools.partial(
            striking,
            jax,
            "device_put",
            raises(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")),
        ),
        (jax.errors.JaxRuntimeError, "RESOURCE_EXHAUSTED"),
    ),
    "download": (
        functools.partial(
            striking,
            DeviceLink,
            "download",
            raises(jax.errors.JaxRuntimeError("INTERNAL")),
        ),
        (jax.errors.JaxRuntimeError, "INTERNAL"),
    ),
    "sample": (
        functools.partial(
            striking, blocks._BatchSampler, "sample", raises(RuntimeError("sample"))
        ),
        (RuntimeError, "sample"),
    ),
    "embed": (
        functools.partial(
            striking, layer_calls, "embed_step", raises(RuntimeError("embed"))
        ),
        (RuntimeError, "embed"),
    ),
    "prefill": (
        functools.partial(
            striking, layer_calls, "prefill_step", raises(RuntimeError("prefill"))
        ),
        (RuntimeError, "prefill"),
    ),
    "decode": (
        functools.partial(
            striking, layer_calls, "decode_step", raises(RuntimeError("decode"))
        ),
        (RuntimeError, "decode"),
    ),
    "head": (
        functools.partial(striking, blocks, "head_step", raises(RuntimeError("head"))),
        (RuntimeError, "head"),
    ),
    "sampled tokens": (
        functools.partial(
            striking, blocks._BatchSampler, "take", raises(KeyboardInterrupt())
        ),
        (KeyboardInterrupt, None),
    ),
}
MOMENTS = [
    (Schedule.ZIGZAG, 1),
    (Schedule.ZIGZAG, 2),
    (Schedule.ZIGZAG, 6),
    (Schedule.SERIAL, 3),
]


# Each fault at half of the moments, each moment with half of the faults.
CELLS = [
    (name, *moment)
    for first, name in enumerate(FAULTS)
    for moment in every_other(MOMENTS[first % 2 :] + MOMENTS[: first % 2])
]


@pytest.mark.parametrize(("name", "schedule", "at"), CELLS)
def test_a_fault_reaches_the_caller_and_leaves_the_engine_whole(
    start, name, schedule, at
):
    run = start(schedule)
    strike, (error, message) = FAULTS[name]
    with strike(at=at), pytest.raises(error, match=message):
        run.generate()
    run.check()


@pytest.mark.parametrize("at", [1, 4])
def test_a_fault_while_scoring_reaches_the_caller(run, golden, at):
    sequences = golden("opt-pre-ln").score_ids
    before = in_time(run.engine.score, sequences)
    with (
        striking(weights, "read_extent", hurt_file(truncate), 6 * at),
        pytest.raises(OSError, match="cannot read tensor"),
    ):
        in_time(run.engine.score, sequences)
    run.check_nothing_staged()
    after = in_time(run.engine.score, sequences)
    assert all((a == b).all() for a, b in zip(before, after, strict=True))


def test_a_file_system_without_direct_io_gives_the_same_tokens(run, monkeypatch):
    refused = []

    def refuse(call, path, is_direct, nbytes):
        if is_direct:
            refused.append(path)
            raise OSError(errno.EINVAL, "Invalid argument", str(path))

    monkeypatch.setattr(extents, "os", WatchedOs(refuse))
    run.check()
    assert refused


def test_transfers_that_stop_in_the_middle_give_the_same_tokens(run, monkeypatch):
    stopped = []

    def stop(call, path, is_direct, nbytes):
        if call in ("preadv", "pwritev") and not is_direct and nbytes > 100:
            stopped.append(call)
            return nbytes // 2
        return None

    monkeypatch.setattr(extents, "os", WatchedOs(stop))
    run.check()
    assert {*stopped} == {"preadv", "pwritev"}


def test_an_altered_chunk_is_never_computed_with(run):
    """The first time that a tensor is read; later reads trust the disk."""
    name = "layers.2.fc2.weight"
    path = chunk_path(run.store, name, open_store(run.store).tensors[name], 0)
    whole = path.read_bytes()
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(ValueError, match=rf"'{name}' of .* was altered"):
        run.generate()
    path.write_bytes(whole)
    run.check()


def test_a_spill_folder_that_cannot_be_made_is_one_sentence(golden, tmp_path):
    with (
        striking(spill.tempfile, "mkdtemp", raises(PermissionError(13, "Denied")), 1),
        pytest.raises(ValueError, match="cannot write into .*spill: Denied; choose"),
    ):
        Run(golden, tmp_path, Schedule.ZIGZAG)
    assert flexjax_threads() == []


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 128 KiB, and what makes it larger."""
    folder = tmp_path / "small"
    folder.mkdir()

    def mount(options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        subprocess.run(command, check=True, capture_output=True)

    try:
        mount("size=128k")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot mount a small file system here: {error}")
    yield folder, lambda: mount("remount,size=64m")
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_one_sentence_and_room_helps(
    small_disk, golden, tmp_path, monkeypatch
):
    folder, enlarge = small_disk
    run = Run(golden, tmp_path, Schedule.ZIGZAG)
    run.engine.close()
    run.spill = folder
    run.engine = Engine(
        open_store(run.store),
        policy(Schedule.ZIGZAG),
        offload_dir=folder,
        device=jax.devices()[0],
    )
    with pytest.raises(ValueError, match="more on disk, .* choose an offload_dir"):
        run.generate()
    # Somebody else may fill the disk once a run has begun.
    with monkeypatch.context() as patch:
        patch.setattr(
            "flexjax.memory.room.free_bytes", lambda *_: dict.fromkeys(Tier, 1 << 40)
        )
        with pytest.raises(OSError, match=f"could not be written in {folder}.* space"):
            run.generate()
    enlarge()
    run.check()
    run.close()
