"""The shape of one run: which layers, how many batches, how long.

A schedulable layer is a decoder layer or a block of the vocabulary. The embedding
belongs to the first decoder layer and the final norm to the last one, so that every
layer of a run is worth a transfer of its own. Vocabulary blocks come last: each adds
its part of the logits, and the last one ends a step.
"""

import bisect
import dataclasses
from collections.abc import Sequence

# Tokens that a prefill works on at a time; matrix products are at full speed from a few
# hundred rows on, so this costs nothing but bounds the workspace.
PREFILL_TOKENS = 1024
# Rows of a quantized cache that are made wide at a time, so that they stay in the
# processor's own memory: attending to 64 rows of OPT-1.3B took 15, 12, 10 and 12 ms
# with 1, 2, 4 and 8, and 70 ms with all at once (2 cores).
WIDE_ROWS = 4
# Rows whose new tokens attend to a shared prefix at a time, which bounds their scores:
# 256 rows and 1216 slots of OPT-1.3B took 45 ms at once, 64 of them 7.5 ms (2 cores).
PREFIX_ROWS = 64
MOST_LAYERS_AHEAD = 2  # whose weights are on their way, where memory allows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """One block of batches, generated together.

    Attributes:
        num_decoder_layers: decoder layers of the model.
        num_head_blocks: blocks of rows into which the table of logits is split.
        num_parts: parts in which a layer's weights travel.
        layers_ahead: layers whose weights are on their way while one computes; fewer
            than there are layers.
        blocks_per_layer: blocks of logits that may be on their way in place of one
            decoder layer, being smaller.
        num_batches: batches that share one load of a layer's weights.
        batch_size: rows of a batch.
        prompt_len: slots of a padded prompt; behind the prefix, if there is one.
        prompt_lens: the same of each batch, where not all have as many as `prompt_len`,
            which is the most then.
        prefix_len: slots of a padded prefix that rows share; 0 if they share none.
        prefix_ends: for each prefix, the batch behind the last one that begins with it;
            each batch begins with one, or none does.
        scores_prefixes: whether prefixes are scored, as rows are; else nobody reads
            their logits.
        gen_len: tokens that are generated for every row; 1 also scores a prompt.
        reserves: whether a cache has room for the whole run from the start, where
            attention reads what is in use alone. Else it grows, so as not to be read
            far beyond that: by a copy, and with another shape to compile for.
    """

    num_decoder_layers: int
    num_head_blocks: int = 1
    num_parts: int = 1
    layers_ahead: int = 1
    blocks_per_layer: int = 1
    num_batches: int = 1
    batch_size: int = 1
    prompt_len: int = 1
    prompt_lens: tuple[int, ...] = ()
    prefix_len: int = 0
    prefix_ends: tuple[int, ...] = ()
    scores_prefixes: bool = False
    gen_len: int = 1
    reserves: bool = False

    @property
    def num_layers(self) -> int:
        return self.num_decoder_layers + self.num_head_blocks

    @property
    def prefixes(self) -> range:
        """The numbers of all prefixes, see `flexjax.schedule.ops.is_prefix`."""
        return range(-1, -1 - len(self.prefix_ends), -1)

    def prefix_of(self, batch: int) -> int | None:
        """The number of what a batch begins with; None if it shares nothing."""
        if batch < 0 or not self.prefix_ends:
            return None
        return ~bisect.bisect_right(self.prefix_ends, batch)

    def behind(self, num_prefixes: int) -> "Workload":
        """The same with so many prefixes, or one for each batch if these are fewer."""
        first = range(1, min(num_prefixes, self.num_batches))
        return dataclasses.replace(self, prefix_ends=(*first, self.num_batches))

    @property
    def of_prefix(self) -> "Workload":
        """The part of this one that works on a prefix, as on a batch of one row."""
        return dataclasses.replace(
            self,
            num_batches=1,
            batch_size=1,
            prompt_len=self.prefix_len,
            prompt_lens=(),
            prefix_len=0,
            prefix_ends=(),
            scores_prefixes=False,
            gen_len=1,
        )

    @property
    def num_prefix_layers(self) -> int:
        """Layers that work on prefixes."""
        if not self.prefix_ends:
            return 0
        return self.num_layers if self.scores_prefixes else self.num_decoder_layers

    def is_decoder(self, layer: int) -> bool:
        return layer < self.num_decoder_layers

    def last_ahead(self, visit: int) -> int:
        """The last visit whose weights may be on their way during `visit`, or there.

        Layers are visited one after the other and round again; visit 0 is the first
        layer's, and visit -1 what comes before it. A layer's own weights are gone
        before they come again. Sizes are counted in blocks of the head.
        """
        num_layers, size = self.num_layers, self.blocks_per_layer
        round_size = self._size_before(num_layers)

        def begin(visit: int) -> int:
            rounds, layer = divmod(visit, num_layers)
            return rounds * round_size + self._size_before(layer)

        most = begin(visit + 1) + self.layers_ahead * size
        rounds, left = divmod(min(most, begin(visit) + round_size), round_size)
        decoders = min(left // size, self.num_decoder_layers)
        blocks = left - decoders * size if decoders == self.num_decoder_layers else 0
        return rounds * num_layers + decoders + blocks - 1

    def _size_before(self, layer: int) -> int:
        """Of the weights of all layers before `layer`, in blocks."""
        decoders = min(layer, self.num_decoder_layers)
        return decoders * self.blocks_per_layer + layer - decoders

    def keeps_cache(self, step: int) -> bool:
        """Whether a later step reads the cache that `step` writes."""
        return step + 1 < self.gen_len

    def prompt_slots(self, batch: int | None = None) -> int:
        """Slots of a batch's padded prompts; where none is named, of the longest."""
        if batch is None or not self.prompt_lens:
            return self.prompt_len
        return self.prompt_lens[batch]

    def seq_len(self, step: int, batch: int | None = None) -> int:
        """Slots that `step` computes: the whole prompt first, then one token."""
        return self.prompt_slots(batch) if step == 0 else 1

    def past_len(self, step: int, batch: int | None = None) -> int:
        """Slots in the cache before `step`."""
        return 0 if step == 0 else self.prompt_slots(batch) + step - 1

    def cache_slots(self, step: int, batch: int | None = None) -> int:
        """Slots that the cache has room for after `step` has stored its own."""
        first = self.prompt_slots(batch)
        whole = bucket(first + self.gen_len - 1)
        if self.reserves:
            return whole
        return min(whole, bucket(first + step + 1))


def looking_ahead(work: Workload, layers: int = MOST_LAYERS_AHEAD) -> Workload:
    """`work` with the weights of so many layers on their way, if there are as many."""
    return dataclasses.replace(work, layers_ahead=min(layers, work.num_layers - 1))


def longest_first(lengths: Sequence[int]) -> list[int]:
    """Places of prompts in the order in which blocks take them."""
    return sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)


def bucket(length: int, *, an_octave: int = 8) -> int:
    """`length` rounded up so that few shapes occur: multiples of 32 at the least.

    Between two powers of two there are at most `an_octave` values, so the number of
    shapes, and with it of compilations, grows with the logarithm of the longest
    sequence; with eight, at most an eighth of a bucket beyond 256 slots is padding, and
    with two a third.
    """
    if length < 1:
        raise ValueError(f"a length of {length} has no bucket; expected at least 1")
    quantum = max(32, (1 << (length - 1).bit_length()) // (2 * an_octave))
    return -(-length // quantum) * quantum


def padded_alike(lengths: Sequence[int]) -> tuple[int, ...]:
    """Slots of the padded prompts of each batch, given the longest prompt of each.

    A batch is padded as the longest one is, or else to one of few lengths, so that
    there is not a shape for each.
    """
    most = bucket(max(lengths))
    return tuple(min(most, bucket(length, an_octave=2)) for length in lengths)


def prefill_rows(batch_size: int, seq_len: int) -> int:
    """Rows that a prefill works on at a time: a divisor of the batch's.

    As many as stay within `PREFILL_TOKENS`, but at least one.
    """
    return _divisor(batch_size, PREFILL_TOKENS // seq_len)


def wide_rows(num_rows: int) -> int:
    """Rows of a quantized cache that are wide at a time: a divisor of all."""
    return _divisor(num_rows, WIDE_ROWS)


def _divisor(count: int, most: int) -> int:
    """The largest divisor of `count` up to `most`, but at least 1."""
    most = max(1, min(count, most))
    return max(n for n in range(1, most + 1) if not count % n)
