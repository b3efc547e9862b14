"""What `Free` promises: memory that it lets go of is gone, not only counted as gone."""

import contextlib
import itertools
import pathlib
import time
import weakref

import jax
import pytest

from flexjax.blocks import Row
from flexjax.checkpoint import open_store
from flexjax.engine import Engine
from flexjax.layer_calls import LayerCalls, Made
from flexjax.policy import Placement, Policy, Schedule
from flexjax.sampling_params import SamplingParams
from flexjax.schedule.ops import Buffer, Cache, Weights
from flexjax.stage import LayerStage
from flexjax.stopping import StopChecker
from tests.common import in_time

HOST = Placement(host=1.0)
GREEDY = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)


def arrays_of(stage: LayerStage, buffer: Buffer) -> list[weakref.ref]:
    """The arrays that freeing `buffer` should let go of."""
    if isinstance(buffer, Weights):
        loans = stage._parts[buffer].result().values()
        return [weakref.ref(loan.array) for loan in loans]
    slot, found = stage._slots[buffer], []
    if slot.loaded is not None:
        for pieces in itertools.chain(*slot.loaded.result().segments):
            found += map(weakref.ref, pieces)
    if slot.made is not None:
        made = slot.made.result()
        arrays = made.cache if isinstance(buffer, Cache) else [made.hidden]
        found += map(weakref.ref, arrays)
    return found


def are_gone(refs: list[weakref.ref], within_s: float = 10) -> bool:
    """Lanes may hold on to what they have just finished for a moment."""
    end = time.monotonic() + within_s
    while any(ref() is not None for ref in refs) and time.monotonic() < end:
        time.sleep(0.001)
    return all(ref() is None for ref in refs)


def make_engine(checkpoint, policy: Policy, folder: pathlib.Path) -> Engine:
    store, device = open_store(checkpoint.store), jax.devices()[0]
    return Engine(store, policy, offload_dir=folder, device=device)


def rows_of(checkpoint, count: int) -> list[Row]:
    return [
        Row(index, prompt, GREEDY, StopChecker(GREEDY, eos_token_id=2))
        for index, prompt in enumerate(checkpoint.prompts[:count])
    ]


@pytest.mark.parametrize("schedule", Schedule)
@pytest.mark.parametrize("activations", [HOST, Placement()], ids=["host", "disk"])
def test_what_a_free_lets_go_of_is_gone(
    golden, tmp_path, monkeypatch, schedule, activations
):
    checkpoint = golden("opt-pre-ln")
    free, lingering, freed = LayerStage.free, [], []

    def watch(self: LayerStage, buffer: Buffer) -> None:
        refs = arrays_of(self, buffer)
        free(self, buffer)
        freed.append(buffer)
        if not lingering and not are_gone(refs):
            lingering.append(buffer)

    monkeypatch.setattr(LayerStage, "free", watch)
    policy = Policy(
        weights=Placement(),
        kv_cache=HOST,
        activations=activations,
        batch_size=1,
        num_batches=3,
        schedule=schedule,
    )
    engine = make_engine(checkpoint, policy, tmp_path)
    in_time(engine.generate, rows_of(checkpoint, 3))
    engine.close()
    assert lingering == []
    assert {type(buffer).__name__ for buffer in freed} == {"Weights", "Cache", "Hidden"}


def test_a_state_that_was_loaded_has_arrived_before_a_call_overwrites_it(
    golden, tmp_path, monkeypatch
):
    """While a copy is on its way, what it comes from must not be given to others."""
    checkpoint = golden("opt-pre-ln")
    waited: list[jax.Array] = []  # kept, so that no other array gets their place
    wait, layer, loaded = jax.block_until_ready, LayerCalls.layer, []

    def watch_waiting(arrays):
        waited.extend(jax.tree.leaves(arrays))
        return wait(arrays)

    def watch_layer(self: LayerCalls, cell, tensors, state, *rest) -> Made:
        loaded.append(any(state is array for array in waited))
        return layer(self, cell, tensors, state, *rest)

    monkeypatch.setattr(jax, "block_until_ready", watch_waiting)
    monkeypatch.setattr(LayerCalls, "layer", watch_layer)
    policy = Policy(activations=HOST, batch_size=1, num_batches=2)
    with contextlib.closing(make_engine(checkpoint, policy, tmp_path)) as engine:
        in_time(engine.generate, rows_of(checkpoint, 2))
    assert loaded
    assert all(loaded)


def test_half_of_what_a_call_made_may_go_before_the_other():
    hidden, cache = jax.numpy.zeros(1), (jax.numpy.ones(1), jax.numpy.ones(1))
    made = Made(0.0, cache, hidden, cache)
    made.let_go(Cache(0, 0))
    assert (made.done, made.cache) == ((), ())
    assert made.hidden is hidden
