"""What a plan counts for XLA's workspaces is what XLA says of them."""

import numpy as np
import pytest

from bench.step_shapes import workspace_bytes
from flexjax.arrangement import shape_of
from flexjax.memory.footprint import RunFootprint
from flexjax.memory.processor import Processor
from flexjax.models.config import OPTConfig
from flexjax.plan.planner import Found
from flexjax.policy import Placement, Policy
from flexjax.schedule.ops import Cell

CONFIG = OPTConfig(
    vocab_size=512,
    hidden_size=256,
    num_attention_heads=4,
    ffn_dim=1024,
    num_hidden_layers=2,
)


@pytest.mark.parametrize("kv_cache_bits", [None, 4])
@pytest.mark.parametrize(("batch_size", "prompt_len"), [(16, 32), (32, 128), (3, 64)])
def test_workspaces_are_counted(batch_size, prompt_len, kv_cache_bits):
    policy = Policy(
        kv_cache=Placement(), batch_size=batch_size, kv_cache_bits=kv_cache_bits
    )
    model = Found(CONFIG, np.dtype("bfloat16")).model(policy)
    layout = model.layout(policy, Processor(is_host=True))
    work = layout.workload(
        policy,
        shape_of(policy, batch_size),
        prompt_len=prompt_len,
        gen_len=8,
    )
    sizes = RunFootprint(work=work, policy=policy, weights=layout, scores=False)
    counted = [sum(sizes.workspace(Cell(step, 0, 0)).values()) for step in (0, 7)]
    found = workspace_bytes(policy, work, layout)
    assert 0.99 * found <= max(counted) <= 1.3 * found
