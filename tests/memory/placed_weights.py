"""Stores of two small models, and their weights in place."""

import dataclasses

import ml_dtypes
import numpy as np

from flexjax.checkpoint import open_store
from flexjax.memory.head_blocks import HeadBlocks
from flexjax.memory.layout import WeightLayout
from flexjax.memory.link import DeviceLink
from flexjax.memory.processor import Processor
from flexjax.memory.weights import PlacedWeights
from flexjax.policy import Kind, Tier
from tests.common import assert_nothing_held, in_time, make_transport
from tests.small_store import CONFIG

TIED = dataclasses.replace(CONFIG, word_embed_proj_dim=8, do_layer_norm_before=False)
UNTIED = dataclasses.replace(CONFIG, tie_word_embeddings=False)
CONFIGS = {"tied": TIED, "untied": UNTIED}
TABLE, HEAD = "embed_tokens.weight", "lm_head.weight"
DTYPE = np.dtype(ml_dtypes.bfloat16)


class Placed:
    """Weights under some tiers, and everything around them."""

    def __init__(self, folder, tiers, *, link_type=DeviceLink, parts=1, blocks=1):
        self.transport = make_transport(link_type)
        self.ledger = self.transport.ledger
        store = open_store(folder)
        self.config = store.config
        rows = -(-self.config.vocab_size // blocks)
        try:
            self.weights = PlacedWeights(
                store,
                WeightLayout(
                    config=store.config,
                    dtype=store.dtype,
                    tensors=store.tensors,
                    tiers=tiers
                    if isinstance(tiers, dict)
                    else dict.fromkeys(store.tensors, tiers),
                    head=HeadBlocks(blocks, rows),
                    num_parts=parts,
                    processor=Processor(is_host=self.transport.link.is_shared),
                ),
                transport=self.transport,
            )
        except BaseException:
            in_time(self.transport.close)
            raise
        self.home = self.held()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        in_time(self.transport.lanes.drain)
        self.weights.close()
        in_time(self.transport.close)
        assert_nothing_held(self.ledger)

    def held(self) -> dict[Tier, int]:
        return {tier: self.ledger.held(tier, Kind.WEIGHTS) for tier in Tier}

    def load(self, layer: int, part: int = 0):
        return in_time(self.weights.load(layer, part).result)
