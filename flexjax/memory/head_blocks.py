"""How the table of logits is cut, where it has to travel."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from flexjax.memory.processor import Processor, Tensors, is_multiplied_narrow
from flexjax.models.config import OPTConfig
from flexjax.policy import Tier


class HeadBlocks(NamedTuple):
    """How the table of logits is cut into blocks of rows."""

    num_blocks: int
    rows: int  # of every block but the last

    def span(self, block: int, vocab_size: int) -> slice:
        return slice(block * self.rows, min((block + 1) * self.rows, vocab_size))


def head_blocks(
    config: OPTConfig,
    tensors: Tensors,
    tiers: Mapping[str, Tier],
    *,
    processor: Processor,
) -> HeadBlocks:
    """Cuts a table of logits that has to travel into blocks.

    None is larger than a decoder layer's largest tensor, but for a single chunk, so
    that it goes through a buffer of that tensor's: other buffers would have to be made
    in every step, in place of those. A table that is used where it lies, as it lies,
    stays whole.
    """
    table = tensors[config.head_table]
    tier = tiers[config.head_table]
    stays = tier is Tier.DEVICE or (tier is Tier.HOST and processor.is_host)
    is_narrow = is_multiplied_narrow(table, processor)
    if stays and (table.quantization is None or is_narrow):
        return HeadBlocks(1, config.vocab_size)
    largest_bytes = max(
        entry.nbytes for name, entry in tensors.items() if name.startswith("layers.0.")
    )
    # Whole chunks, so that no chunk is read twice; and blocks of about one size.
    most_chunks = max(1, largest_bytes // table.row_bytes // table.chunk_rows)
    num_chunks = math.ceil(config.vocab_size / table.chunk_rows)
    num_blocks = math.ceil(num_chunks / most_chunks)
    rows = math.ceil(num_chunks / num_blocks) * table.chunk_rows
    return HeadBlocks(math.ceil(config.vocab_size / rows), rows)
