"""A run whose files and functions can be harmed, and what harms them."""

import contextlib
import errno
import itertools
import os
import pathlib
import shutil
from collections.abc import Callable
from types import SimpleNamespace

import jax
import pytest

from flexjax import checkpoint, extents
from flexjax.blocks import Row
from flexjax.checkpoint import WeightStore, open_store
from flexjax.engine import Engine
from flexjax.extents import Extent
from flexjax.policy import Kind, Placement, Policy, Schedule, Tier
from flexjax.sampling_params import SamplingParams
from flexjax.stopping import StopChecker
from flexjax.store_format import chunk_path
from tests.common import WatchedOs, files, flexjax_threads, in_time

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
        home = self.engine.weights.layout.home_bytes
        at_home = {(Tier.DISK, Kind.WEIGHTS): home[Tier.DISK]}
        for key in itertools.product(Tier, Kind):
            assert self.engine.ledger.held(*key) == at_home.get(key, 0), key
        left = [path for path in files(self.spill) if path.name != "lock"]
        assert left == []

    def close(self) -> None:
        in_time(self.engine.close)
        assert list(self.spill.iterdir()) == []
        assert flexjax_threads() == []


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


@contextlib.contextmanager
def failing(call: str, folder: str, number: int, at: int):
    """The `at`-th such call on a file below `folder` fails, as a disk does."""
    count, failed = itertools.count(1), []

    def watch(name: str, path: pathlib.Path, *_) -> None:
        if name == call and folder in path.parts and next(count) == at:
            failed.append(path)
            named = [str(path)] if name == "open" else []
            raise OSError(number, os.strerror(number), *named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extents, "os", WatchedOs(watch))
        yield
    assert failed, "the run ended before the fault"


@contextlib.contextmanager
def unreadable_rows(at: int):
    """Token rows go another way than everything else."""
    own = SimpleNamespace(**vars(os))
    error = OSError(errno.EIO, "Input/output error")
    with (
        pytest.MonkeyPatch.context() as patch,
        striking(own, "preadv", raises(error), at),
    ):
        patch.setattr(checkpoint, "os", own)
        yield


def raises(error: BaseException) -> Callable:
    def harm(*_, **__):
        raise error

    return harm


def hurt_rows(hurt: Callable[[pathlib.Path], object]) -> Callable:
    """Does something to the chunk of the first row that is about to be gathered."""

    def harm(store: WeightStore, name: str, ids, *_):
        entry = store.tensors[name]
        row = int(ids.reshape(-1)[0])
        path = chunk_path(store.folder, name, entry, row // entry.chunk_rows)
        return hurt_file(hurt)(Extent(path, 0, ids))

    return harm


def hurt_file(hurt: Callable[[pathlib.Path], object]) -> Callable:
    """Does something to the file that is about to be read."""

    def harm(extent: Extent):
        whole = extent.path.read_bytes()
        hurt(extent.path)
        return lambda: extent.path.write_bytes(whole)

    return harm


def hurt_spill(hurt: Callable[[pathlib.Path], object]) -> Callable:
    """The same to a file that a failed run removes."""

    def harm(extent: Extent) -> None:
        hurt(extent.path)

    return harm


def truncate(path: pathlib.Path) -> None:
    os.truncate(path, 10)
