"""The executor obeys: what a stage is told, and what it is told when an op fails."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexjax.executor import execute
from flexjax.schedule.emit import EMITTERS, zigzag
from flexjax.schedule.ops import (
    Cache,
    Cell,
    Compute,
    Free,
    Hidden,
    Load,
    Store,
    Weights,
)
from flexjax.workload import Workload
from tests.drawn import until, works_with_endings


class Recorder:
    """A stage that writes down what it is told, as ops, and may fail at one of them."""

    def __init__(self, *, fails_at=-1, error=None):
        self.told, self.abandoned = [], 0
        self._fails_at, self._error = fails_at, error

    def _tell(self, op):
        assert not self.abandoned
        if self._error is not None and len(self.told) == self._fails_at:
            raise self._error
        self.told.append(op)

    def load(self, buffer, step):
        self._tell(Load(buffer, step))

    def compute(self, cell):
        assert isinstance(cell, Cell)
        self._tell(Compute(*cell))

    def store(self, buffer, step):
        self._tell(Store(buffer, step))

    def free(self, buffer):
        self._tell(Free(buffer))

    def abandon(self):
        self.abandoned += 1


def test_every_op_is_one_call():
    ops = [
        Load(Weights(1, 2), 3),
        Compute(3, 1, 0),
        Store(Cache(1, 0), 3),
        Free(Hidden(0)),
    ]
    stage = Recorder()
    execute(ops, stage)
    assert stage.told == ops


@pytest.mark.parametrize("emit", EMITTERS.values(), ids=list(EMITTERS))
@given(drawn=works_with_endings())
def test_a_stage_is_told_the_whole_stream_in_order(emit, drawn):
    work, ends = drawn
    stage = Recorder()
    execute(emit(work, until(ends)), stage)
    assert stage.told == list(emit(work, until(ends)))
    assert not stage.abandoned


@given(
    drawn=works_with_endings(),
    error=st.sampled_from([OSError("disk full"), KeyboardInterrupt(), MemoryError()]),
    data=st.data(),
)
def test_whatever_fails_the_stage_is_abandoned_and_the_error_is_the_caller_s(
    drawn, error, data
):
    work, ends = drawn
    ops = list(zigzag(work, until(ends)))
    place = data.draw(st.integers(0, len(ops) - 1))
    stage = Recorder(fails_at=place, error=error)
    with pytest.raises(type(error)) as caught:
        execute(ops, stage)
    assert caught.value is error
    assert stage.told == ops[:place]
    assert stage.abandoned == 1


def test_an_error_of_the_stream_itself_abandons_the_stage_too():
    """A schedule asks who is alive, and so waits for tokens that may never come."""
    work, stage = Workload(num_decoder_layers=1, gen_len=2), Recorder()

    def alive(step, batch):
        if step == 1:
            raise OSError("lost")
        return True

    with pytest.raises(OSError, match="lost"):
        execute(zigzag(work, alive), stage)
    assert stage.abandoned == 1
    assert Compute(0, 1, 0) in stage.told


def test_ops_are_issued_as_they_come():
    """Nothing is collected first: a stream may depend on what it has started."""
    stage = Recorder()

    def stream():
        for step in range(3):
            yield Load(Hidden(0), step)
            assert stage.told[-1] == Load(Hidden(0), step)

    execute(stream(), stage)
    assert len(stage.told) == 3
