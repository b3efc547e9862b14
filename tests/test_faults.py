"""Law 6: whatever fails in the middle of a run, the caller hears of it and may go on.

Every fault strikes at some call of a function that moves or computes something; most
are real ones, done to the files. Then the same engine must run again as if nothing had
happened, and `close` must leave nothing.
"""

import contextlib
import errno
import itertools
import os
import pathlib
import shutil
import subprocess
from collections.abc import Callable

import jax
import pytest

from flexjax import blocks, checkpoint, stage
from flexjax.blocks import Row
from flexjax.checkpoint import WeightStore, open_store
from flexjax.engine import Engine
from flexjax.memory import spill
from flexjax.memory.buffers import BufferPool
from flexjax.memory.disk import DiskStore
from flexjax.memory.link import DeviceLink
from flexjax.policy import Kind, Placement, Policy, Schedule, Tier
from flexjax.sampling_params import SamplingParams
from flexjax.stopping import StopChecker
from flexjax.store_format import chunk_path
from tests.common import files, flexjax_threads, in_time

DISK = Placement()
GREEDY = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)


def policy(schedule: Schedule) -> Policy:
    """Everything on disk, in two batches whose weights travel in two parts."""
    return Policy(
        weights=DISK,
        kv_cache=DISK,
        activations=DISK,
        batch_size=2,
        num_batches=2,
        schedule=schedule,
    )


class Run:
    """An engine on a store that may be harmed, and what it should answer."""

    def __init__(self, golden, folder: pathlib.Path, schedule: Schedule) -> None:
        checkpoint = golden("opt-pre-ln")
        self.prompts = checkpoint.prompts[:4]
        self.expected = [ids[: GREEDY.max_tokens] for ids in checkpoint.greedy_ids[:4]]
        self.store = shutil.copytree(checkpoint.store, folder / "store")
        self.spill = folder / "spill"
        self.spill.mkdir()
        self.engine = Engine(
            open_store(self.store),
            policy(schedule),
            offload_dir=self.spill,
            device=jax.devices()[0],
        )

    def generate(self) -> list[list[int]]:
        rows = [
            Row(index, prompt, GREEDY, StopChecker(GREEDY, eos_token_id=2))
            for index, prompt in enumerate(self.prompts)
        ]
        in_time(self.engine.generate, rows)
        return [row.checker.token_ids for row in rows]

    def check(self) -> None:
        """Nothing is staged, and the engine still works."""
        self.check_nothing_staged()
        assert self.generate() == self.expected
        self.check_nothing_staged()

    def check_nothing_staged(self) -> None:
        home = self.engine.weights.home_bytes()
        at_home = {(Tier.DISK, Kind.WEIGHTS): home[Tier.DISK]}
        for key in itertools.product(Tier, Kind):
            assert self.engine.ledger.held(*key) == at_home.get(key, 0), key
        left = [path for path in files(self.spill) if path.name != "lock"]
        assert left == []

    def close(self) -> None:
        in_time(self.engine.close)
        assert list(self.spill.iterdir()) == []
        assert flexjax_threads() == []


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


class Fault:
    """Replaces a function, whose `at`-th call `harm`s something or raises.

    What `harm` returns, if anything, is called to `mend` it.
    """

    def __init__(self, original, harm: Callable, at: int) -> None:
        self.original, self.harm, self.at = original, harm, at
        self.count = itertools.count(1)
        self.mend: Callable[[], object] = lambda: None
        self.has_struck = False

    def __get__(self, instance, owner=None):
        def method(*args, **kwargs):
            return self(instance, *args, **kwargs)

        return method

    def __call__(self, *args, **kwargs):
        if next(self.count) == self.at:
            self.has_struck = True
            self.mend = self.harm(*args, **kwargs) or self.mend
        return self.original(*args, **kwargs)


@contextlib.contextmanager
def striking(place, name: str, harm: Callable, at: int):
    with pytest.MonkeyPatch.context() as patch:
        fault = Fault(getattr(place, name), harm, at)
        patch.setattr(place, name, fault)
        yield fault
    fault.mend()
    assert fault.has_struck, "the run ended before the fault"


def raises(error: BaseException) -> Callable:
    def harm(*_, **__):
        raise error

    return harm


def hurt_chunk(hurt: Callable[[pathlib.Path], object]) -> Callable:
    """Does something to the chunk in which the rows lie that are about to be read."""

    def harm(store: WeightStore, name: str, first, *_):
        entry = store.tensors[name]
        row = first if isinstance(first, int) else int(first.reshape(-1)[0])
        path = chunk_path(store.folder, name, entry, row // entry.chunk_rows)
        whole = path.read_bytes()
        hurt(path)
        return lambda: path.write_bytes(whole)

    return harm


def lose_spilled_chunks(store: DiskStore, key, entry, array) -> None:
    del store, key, array
    for path in files(entry.folder):
        if path.name != "zarr.json":
            path.unlink()


def block_spilled_chunks(store: DiskStore, key, entry, part) -> None:
    """A file where the folder of chunks should be."""
    del store, key, part
    shutil.rmtree(entry.folder / "c", ignore_errors=True)
    (entry.folder / "c").write_text("in the way")


def block_new_array(store: DiskStore, key, part, chunk, folder: pathlib.Path):
    del store, key, part, chunk
    folder.write_text("in the way")
    return folder.unlink


def truncate(path: pathlib.Path) -> None:
    os.truncate(path, 10)


FAULTS = {
    "weights open": (
        (WeightStore, "_handle", raises(ValueError("the disk is gone"))),
        (OSError, r"cannot read tensor '[\w.]+' of .*store: the disk is gone"),
    ),
    "weights missing": (
        (WeightStore, "read_rows", hurt_chunk(pathlib.Path.unlink)),
        (OSError, r"cannot read tensor '[\w.]+' of .*store: "),
    ),
    "weights short": (
        (WeightStore, "read_rows", hurt_chunk(truncate)),
        (OSError, r"cannot read tensor '[\w.]+' of .*store: "),
    ),
    "token rows missing": (
        (WeightStore, "gather_rows", hurt_chunk(pathlib.Path.unlink)),
        (OSError, r"store/tensors/embed_tokens\.weight/.*: No such file"),
    ),
    "token rows short": (
        (WeightStore, "gather_rows", hurt_chunk(truncate)),
        (OSError, r"store/tensors/embed_tokens\.weight/.* ended early"),
    ),
    "token rows unreadable": (
        (checkpoint.os, "preadv", raises(OSError(errno.EIO, "Input/output error"))),
        (OSError, r"cannot read .*store/tensors/embed_tokens.* Input/output error"),
    ),
    "spill read": (
        (DiskStore, "_read", lose_spilled_chunks),
        (OSError, r"(Hidden|Cache)\(.*\).* could not be read in .*/spill/"),
    ),
    "spill write": (
        (DiskStore, "_write", block_spilled_chunks),
        (OSError, r"(Hidden|Cache)\(.*\).* could not be written in .*/spill/"),
    ),
    "spill create": (
        (DiskStore, "_create", block_new_array),
        (OSError, r"(Hidden|Cache)\(.*\).* could not be written in .*/spill/"),
    ),
    "no memory": (
        (BufferPool, "take", raises(MemoryError("the host has no memory left"))),
        (MemoryError, "no memory left"),
    ),
    "upload": (
        (jax, "device_put", raises(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED"))),
        (jax.errors.JaxRuntimeError, "RESOURCE_EXHAUSTED"),
    ),
    "download": (
        (DeviceLink, "download", raises(jax.errors.JaxRuntimeError("INTERNAL"))),
        (jax.errors.JaxRuntimeError, "INTERNAL"),
    ),
    "sample": (
        (blocks._BatchSampler, "sample", raises(RuntimeError("sample"))),
        (RuntimeError, "sample"),
    ),
    "embed": (
        (stage, "embed_step", raises(RuntimeError("embed"))),
        (RuntimeError, "embed"),
    ),
    "prefill": (
        (stage, "prefill_step", raises(RuntimeError("prefill"))),
        (RuntimeError, "prefill"),
    ),
    "decode": (
        (stage, "decode_step", raises(RuntimeError("decode"))),
        (RuntimeError, "decode"),
    ),
    "head": (
        (blocks, "head_step", raises(RuntimeError("head"))),
        (RuntimeError, "head"),
    ),
    "sampled tokens": (
        (blocks._BatchSampler, "take", raises(KeyboardInterrupt())),
        (KeyboardInterrupt, None),
    ),
}
MOMENTS = [
    (Schedule.ZIGZAG, 1),
    (Schedule.ZIGZAG, 2),
    (Schedule.ZIGZAG, 6),
    (Schedule.SERIAL, 3),
]


@pytest.mark.parametrize(("schedule", "at"), MOMENTS)
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_reaches_the_caller_and_leaves_the_engine_whole(
    start, name, schedule, at
):
    run = start(schedule)
    (place, function, harm), (error, message) = FAULTS[name]
    with (
        striking(place, function, harm, at),
        pytest.raises(error, match=message),
    ):
        run.generate()
    run.check()


@pytest.mark.parametrize("at", [1, 4])
def test_a_fault_while_scoring_reaches_the_caller(run, golden, at):
    sequences = golden("opt-pre-ln").score_ids
    before = in_time(run.engine.score, sequences)
    with (
        striking(WeightStore, "read_rows", hurt_chunk(truncate), 6 * at),
        pytest.raises(OSError, match="cannot read tensor"),
    ):
        in_time(run.engine.score, sequences)
    run.check_nothing_staged()
    after = in_time(run.engine.score, sequences)
    assert all((a == b).all() for a, b in zip(before, after, strict=True))


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
            "flexjax.engine.free_bytes", lambda *_: dict.fromkeys(Tier, 1 << 40)
        )
        with pytest.raises(OSError, match=f"could not be written in {folder}.* space"):
            run.generate()
    enlarge()
    run.check()
    run.close()
