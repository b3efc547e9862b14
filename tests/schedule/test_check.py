"""`check` accepts what runs, and names the op and the rule of what does not."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexjax.schedule.check import check
from flexjax.schedule.emit import EMITTERS, serial, zigzag
from flexjax.schedule.ops import Cache, Compute, Free, Hidden, Load, Store, Weights
from flexjax.workload import Workload
from tests.drawn import until, works_with_endings

WORK = Workload(num_decoder_layers=2, num_parts=2, num_batches=2, gen_len=3)
OPS = list(serial(WORK))

emitters = pytest.mark.parametrize("emit", EMITTERS.values(), ids=list(EMITTERS))


def where(op, nth=0):
    return [i for i, other in enumerate(OPS) if other == op][nth]


def without(*places):
    return [op for i, op in enumerate(OPS) if i not in places]


def moved(place, to):
    ops = without(place)
    return [*ops[:to], OPS[place], *ops[to:]]


@emitters
@given(drawn=works_with_endings(), data=st.data())
def test_no_op_can_be_left_out(emit, drawn, data):
    work, ends = drawn
    ops = list(emit(work, until(ends)))
    del ops[data.draw(st.integers(0, len(ops) - 1))]
    with pytest.raises(ValueError, match=r"."):
        check(ops, work)


@emitters
@given(drawn=works_with_endings(), data=st.data())
def test_no_op_can_be_done_twice_and_the_second_is_named(emit, drawn, data):
    work, ends = drawn
    ops = list(emit(work, until(ends)))
    place = data.draw(st.integers(0, len(ops) - 1))
    ops.insert(place, ops[place])
    with pytest.raises(ValueError, match="^" + re.escape(f"{ops[place]}: ")):
        check(ops, work)


@emitters
@given(drawn=works_with_endings(), data=st.data())
def test_a_cell_cannot_change_places_with_what_it_needs_or_makes(emit, drawn, data):
    work, ends = drawn
    ops = list(emit(work, until(ends)))
    places = [i for i, op in enumerate(ops) if isinstance(op, Compute)]
    place = data.draw(st.sampled_from(places))
    cell = ops[place]
    needs = [Weights(cell.layer, part) for part in range(work.num_parts)]
    needs += [Hidden(cell.batch), Cache(cell.layer, cell.batch)]
    others = [i for i, op in enumerate(ops) if getattr(op, "buffer", None) in needs]
    before = [i for i in others if i < place and isinstance(ops[i], Load)]
    after = [i for i in others if i > place and not isinstance(ops[i], Load)]
    other = data.draw(st.sampled_from([before[-1], after[0]]))
    ops[place], ops[other] = ops[other], ops[place]
    with pytest.raises(ValueError, match=r"."):
        check(ops, work)


def test_a_stream_that_stops_between_two_steps_is_a_batch_that_ended():
    check(serial(WORK, until([1, 2])), WORK)
    check([], WORK)


HIDDEN, CACHE = Hidden(1), Cache(0, 1)
BROKEN = {
    "weights are missing": (
        without(where(Load(Weights(1, 1), 2)), where(Free(Weights(1, 1)), 2)),
        Compute(2, 1, 0),
        "Weights(layer=1, part=1) is not on the device",
    ),
    "weights go before the last batch": (
        moved(where(Free(Weights(0, 0))), to=where(Compute(0, 0, 1))),
        Compute(0, 0, 1),
        "Weights(layer=0, part=0) is not on the device",
    ),
    "the hidden state is missing": (
        without(where(Load(HIDDEN, 1))),
        Compute(1, 0, 1),
        "Hidden(batch=1) is not on the device",
    ),
    "the cache is missing": (
        without(where(Load(CACHE, 1))),
        Compute(1, 0, 1),
        "Cache(layer=0, batch=1) is not on the device",
    ),
    "the cache is that of the step before": (
        without(where(Free(CACHE), 0), where(Load(CACHE, 1))),
        Compute(1, 0, 1),
        "Cache(layer=0, batch=1) came for step None",
    ),
    "a load overtakes the store of the cache": (
        moved(where(Load(CACHE, 1)), to=where(Load(Weights(0, 0), 0))),
        Load(CACHE, 1),
        "Cache(layer=0, batch=1) was stored at step None",
    ),
    "a prefill loads a cache": (
        [Load(CACHE, 0), *OPS],
        Load(CACHE, 0),
        "a prefill has no cache to load",
    ),
    "a hidden state is loaded while it is still there": (
        without(where(Store(HIDDEN, 1), 0), where(Free(HIDDEN), 3)),
        Load(HIDDEN, 1),
        "Hidden(batch=1) is there already",
    ),
    "a hidden state is dropped unsaved": (
        without(where(Store(HIDDEN, 1))),
        Free(HIDDEN),
        "Hidden(batch=1) was not stored",
    ),
    "a cache is dropped unsaved": (
        without(where(Store(CACHE, 1))),
        Free(CACHE),
        "Cache(layer=0, batch=1) was not stored",
    ),
    "the first layer reads what the last one left": (
        without(where(Free(HIDDEN), 2), where(Load(HIDDEN, 1))),
        Compute(1, 0, 1),
        "Hidden(batch=1) holds what Cell(step=0, layer=1, batch=1) made",
    ),
    "the token rows are those of another step": (
        [Load(HIDDEN, 2) if op == Load(HIDDEN, 0) else op for op in OPS],
        Compute(0, 0, 1),
        "Hidden(batch=1) holds what Cell(step=2, layer=-1, batch=1) made",
    ),
    "something is stored that nobody made": (
        [*OPS[: where(Load(Weights(2, 0), 1))], Load(CACHE, 2), Store(CACHE, 2)],
        Store(CACHE, 2),
        "step 2 has made nothing of Cache(layer=0, batch=1)",
    ),
    "the last cache is stored for nobody": (
        [
            op
            for o in OPS
            for op in ([o, Store(CACHE, 2)] if o == Compute(2, 0, 1) else [o])
        ],
        Store(CACHE, 2),
        "step 2 has made nothing of Cache(layer=0, batch=1)",
    ),
    "a layer is left out": (
        [op for op in OPS if op != Compute(0, 1, 1)],
        Store(Cache(1, 1), 0),
        "Cache(layer=1, batch=1) is not on the device",
    ),
    "a step is left out": (
        list(serial(WORK, lambda step, batch: step != 1)),
        Load(Cache(0, 0), 2),
        "Cache(layer=0, batch=0) was stored at step 0",
    ),
    "a free comes twice": (
        [*OPS, Free(HIDDEN)],
        Free(HIDDEN),
        "Hidden(batch=1) is not on the device",
    ),
}


@pytest.mark.parametrize(("ops", "op", "rule"), BROKEN.values(), ids=list(BROKEN))
def test_a_broken_rule_is_named_with_its_op(ops, op, rule):
    with pytest.raises(ValueError, match=re.escape(f"{op}: {rule}") + "$"):
        check(ops, WORK)


def test_what_is_never_freed_is_named():
    with pytest.raises(
        ValueError, match=r"never freed: \['Weights\(layer=2, part=1\)'\]"
    ):
        check(OPS[:-1], WORK)


def test_a_batch_that_stops_inside_a_step_is_named():
    stop = where(Load(Weights(2, 0), 2))
    with pytest.raises(
        ValueError, match=r"batch 0 stops inside a step, after Cell\(step=2, layer=1"
    ):
        check(OPS[:stop], WORK)


def test_batches_of_one_layer_run_in_any_order():
    """Order among batches is the emitter's own affair."""
    work = Workload(num_decoder_layers=1, num_batches=2)
    flipped = {Hidden(0): Hidden(1), Hidden(1): Hidden(0)}
    flipped |= {Cache(0, 0): Cache(0, 1), Cache(0, 1): Cache(0, 0)}

    def flip(op):
        match op:
            case Compute(step, layer, batch):
                return Compute(step, layer, 1 - batch)
            case Free(buffer):
                return Free(flipped.get(buffer, buffer))
        return type(op)(flipped.get(op.buffer, op.buffer), op.step)

    check(map(flip, zigzag(work)), work)
