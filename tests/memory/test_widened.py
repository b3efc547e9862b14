"""Quantized arrays made wide in memory that is used again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax.memory import widened
from flexjax.memory.ledger import Ledger
from flexjax.memory.link import DeviceLink, Loan
from flexjax.memory.widened import WidenedArrays
from flexjax.policy import Kind, Tier
from flexjax.quant import Quantization, dequantize, quantize

HOW = Quantization(bits=4, group_size=16, dtype="float32")
DATA = quantize(jnp.arange(96, dtype=jnp.float32).reshape(3, 32), HOW)
WIDE_BYTES = 3 * 32 * 4


@pytest.fixture
def ledger():
    return Ledger()


@pytest.fixture
def arrays(ledger):
    return WidenedArrays(DeviceLink(jax.devices()[0], ledger), ledger, Kind.WEIGHTS)


def held(ledger: Ledger) -> int:
    return ledger.held(Tier.DEVICE, Kind.WEIGHTS)


def test_what_is_given_back_is_written_over(arrays, ledger):
    released = []
    for count in (1, 2):
        narrow = Loan(DATA, lambda: released.append("narrow"))
        (loan,) = arrays.lend_all([(narrow, HOW)])
        np.testing.assert_array_equal(loan.array, dequantize(DATA, HOW))
        loan.release()
        assert len(released) == count
        assert held(ledger) == WIDE_BYTES
    arrays.clear()
    assert held(ledger) == 0


def test_memory_that_is_not_to_be_had_leaves_nothing_counted(
    arrays, ledger, monkeypatch
):
    made, zeros = [], jnp.zeros

    def fail(*args):
        made.append(1)
        if len(made) == 2:
            raise MemoryError("no room")
        return zeros(*args)

    monkeypatch.setattr(widened.jnp, "zeros", fail)
    with pytest.raises(MemoryError, match="no room"):
        arrays.lend_all([(Loan(DATA), HOW)] * 2)
    assert held(ledger) == 0


def test_a_failure_leaves_nothing_counted(arrays, ledger, monkeypatch):
    def fail(*args, **kwargs):
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(widened, "dequantize_into", fail)
        with pytest.raises(MemoryError, match="no room"):
            arrays.lend_all([(Loan(DATA), HOW)] * 2)
    assert held(ledger) == 0
    for loan in arrays.lend_all([(Loan(DATA), HOW)] * 2):
        loan.release()
    arrays.clear()
    assert held(ledger) == 0
