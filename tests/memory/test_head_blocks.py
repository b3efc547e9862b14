"""A table of logits goes through the buffers that the layers have made already."""

import numpy as np
import pytest

from flexjax import Placement, Policy
from flexjax.arrangement import shape_of
from flexjax.memory.layout import lay_out
from flexjax.memory.processor import Processor
from flexjax.models.config import named_config
from flexjax.quant import Quantization
from flexjax.store_format import planned_entries

NARROW = Quantization(bits=4, group_size=64, dtype="bfloat16")


@pytest.mark.parametrize("how", [None, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("name", ["opt-1.3b", "opt-6.7b", "opt-175b"])
def test_a_block_goes_through_a_buffer_of_a_layer(name, how):
    config, dtype = named_config(name), np.dtype("bfloat16")
    tensors = planned_entries(config, dtype, how)
    processor = Processor(is_host=True, multiplies_quantized=how is not None)
    policy = Policy(weights=Placement())
    layout = lay_out(config, dtype, tensors, policy, processor=processor)
    largest = max(
        entry.nbytes for name, entry in tensors.items() if name.startswith("layers.0.")
    )
    head, table = layout.head, tensors[config.head_table]
    sizes = [
        len(range(*head.span(block, config.vocab_size).indices(config.vocab_size)))
        * table.row_bytes
        for block in range(head.num_blocks)
    ]
    assert sum(sizes) == table.nbytes
    for nbytes in sizes[:-1]:  # the last one may be small
        assert layout.buffer_bytes(config.head_table, nbytes) == largest
    work = layout.workload(policy, shape_of(policy, 1), prompt_len=8, gen_len=2)
    assert work.blocks_per_layer == 2  # fc1's and fc2's


@pytest.mark.parametrize("placement", [Placement(host=1.0), Placement(device=1.0)])
def test_where_no_block_goes_through_a_buffer_one_counts_as_a_layer(placement):
    config, dtype = named_config("opt-1.3b"), np.dtype("bfloat16")
    policy = Policy(weights=placement)
    layout = lay_out(
        config,
        dtype,
        planned_entries(config, dtype, None),
        policy,
        processor=Processor(is_host=False),
    )
    work = layout.workload(policy, shape_of(policy, 1), prompt_len=8, gen_len=2)
    assert work.blocks_per_layer == 1
