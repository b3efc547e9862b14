"""Where a model's tensors lie, and in which pieces they travel: sizes alone.

A layout is made of a store's manifest, or of a configuration before there is any store;
so what a run will need can be told before a weight is read.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from flexjax.arrangement import BlockShape
from flexjax.memory.head_blocks import HeadBlocks, head_blocks
from flexjax.memory.placement import effective, partition, place_tensors
from flexjax.memory.processor import (
    Processor,
    Tensors,
    check_rounding,
    is_attended_by_kernel,
    is_multiplied_narrow,
)
from flexjax.memory.routes import shares_prefixes
from flexjax.models.config import OPTConfig, layer_tensors
from flexjax.policy import Kind, Placement, Policy, Tier
from flexjax.quant import QuantizedArray
from flexjax.workload import Workload, bucket, padded_alike

TOKEN_TABLE = "embed_tokens.weight"
MATRIX = "layers.0.fc1.weight"  # quantized as all of the decoder layers' are
# A layer's norms and biases are ten tensors of a thousandth of its bytes. Each takes a
# request of its own, which waits in the disk's queue as long as megabytes do; and to a
# GPU each is a copy of its own, which took 0.3 ms (8 KB; H200), for 2.4 ms of a layer.
SMALL_BYTES = 64 << 10
MOST_SMALL_SHARE = 0.002  # of a model's bytes: a placement is true to 1 %
MOST_ROOM = 2  # of a buffer that a block of the head goes through, in blocks
MOST_PARTS = 4  # in which a layer's weights travel


class Moved(NamedTuple):
    """What loads of weights bring to the device.

    Attributes:
        by_tier: bytes, by the tier that they come from.
        widened: bytes of what is made wide of them, as layers use it.
    """

    by_tier: Mapping[Tier, int]
    widened: int


class _Load(NamedTuple):
    """One load of weights."""

    spans: dict[str, slice]
    moved: Moved
    staged_bytes: int  # of the buffers that it is read into from disk, at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightLayout:
    """A model's tensors, each with its tier.

    Attributes:
        config: of the model.
        dtype: of every tensor, as layers use it.
        tensors: as they are stored.
        tiers: of each tensor.
        head: how the table of logits is cut.
        num_parts: in which a layer's weights travel.
        processor: that computes with them.
        activation_bits: see `Policy`.
    """

    config: OPTConfig
    dtype: np.dtype
    tensors: Tensors
    tiers: Mapping[str, Tier]
    head: HeadBlocks
    num_parts: int
    processor: Processor
    activation_bits: int | None = None

    @property
    def device_is_host(self) -> bool:
        return self.processor.is_host

    def is_widened(self, name: str) -> bool:
        """Whether a tensor is quantized, and made wide before a layer uses it."""
        entry = self.tensors[name]
        is_narrow = is_multiplied_narrow(entry, self.processor)
        return entry.quantization is not None and not is_narrow

    def as_used(self, name: str, array: Any) -> Any:
        """A tensor of the device's that is not widened, as layers use it."""
        how = self.tensors[name].quantization
        if how is None:
            return array
        return QuantizedArray(array, how, self.activation_bits)

    @property
    def bits(self) -> int:
        """Of an element of the decoder layers' matrices, as they are stored."""
        how = self.tensors[MATRIX].quantization
        return 8 * self.dtype.itemsize if how is None else how.bits

    def spans(self, layer: int, part: int) -> dict[str, slice]:
        """The tensors of a part, and the rows that it needs of each.

        A vocabulary block is one tensor, which travels in the first part.
        """
        return self._loads[layer, part].spans

    def moved(self, layer: int, part: int) -> Moved:
        """What a load brings."""
        return self._loads[layer, part].moved

    @functools.cached_property
    def all_moved(self) -> Moved:
        """What all loads of a step bring."""
        loads = [load.moved for load in self._loads.values()]
        return Moved(
            {tier: sum(moved.by_tier[tier] for moved in loads) for tier in Tier},
            sum(moved.widened for moved in loads),
        )

    @functools.cached_property
    def _loads(self) -> dict[tuple[int, int], _Load]:
        """What every load of weights brings; planning asks for it time and again."""
        num_layers = self.config.num_hidden_layers + self.head.num_blocks
        return {
            (layer, part): self._load(self._spans(layer, part))
            for layer in range(num_layers)
            for part in range(self.num_parts)
        }

    def _spans(self, layer: int, part: int) -> dict[str, slice]:
        if layer < self.config.num_hidden_layers:
            names = layer_tensors(self.config, layer)
            nbytes = {name: self.tensors[name].nbytes for name in names}
            names = partition(nbytes, self.num_parts)[part]
            return {name: slice(0, self.tensors[name].shape[0]) for name in names}
        if part > 0:
            return {}
        block = layer - self.config.num_hidden_layers
        return {self.config.head_table: self.head.span(block, self.config.vocab_size)}

    def _load(self, spans: dict[str, slice]) -> _Load:
        moved, wide, staged = dict.fromkeys(Tier, 0), 0, 0
        for name, rows in spans.items():
            entry, count = self.tensors[name], rows.stop - rows.start
            nbytes = count * entry.row_bytes
            moved[self.tiers[name]] += nbytes
            if self.tiers[name] is Tier.DISK:
                staged += self.buffer_bytes(name, nbytes)
            if self.is_widened(name):
                wide += count * entry.used_row_bytes
        return _Load(spans, Moved(moved, wide), staged)

    def buffer_bytes(self, name: str, nbytes: int) -> int:
        """Bytes of the buffer that rows of a tensor from disk are read into, at most.

        The head's blocks take those of decoder layers, if they are not too large.
        """
        if name != self.config.head_table:
            return nbytes
        larger = (n for n in self._sizes_on_disk if _takes_block(n, nbytes))
        return max(larger, default=nbytes)

    @functools.cached_property
    def _blocks_per_layer(self) -> int:
        """Blocks of the head that go through the stage buffers of any decoder layer."""
        head = self.config.head_table
        if self.tiers[head] is not Tier.DISK or self.is_widened(head):
            return 1
        block_bytes = self.head.rows * self.tensors[head].row_bytes
        counts = [
            sum(
                self.tiers[name] is Tier.DISK
                and _takes_block(self.tensors[name].nbytes, block_bytes)
                for name in layer_tensors(self.config, layer)
            )
            for layer in range(self.config.num_hidden_layers)
        ]
        return max(1, min(counts))

    @functools.cached_property
    def _sizes_on_disk(self) -> set[int]:
        """Bytes of the decoder layers' tensors that are on disk."""
        return {
            entry.nbytes
            for name, entry in self.tensors.items()
            if name.startswith("layers.") and self.tiers[name] is Tier.DISK
        }

    @functools.cached_property
    def home_bytes(self) -> Mapping[Tier, int]:
        """Bytes on each tier, where the tensors live."""
        nbytes = {name: entry.nbytes for name, entry in self.tensors.items()}
        return effective(nbytes, self.tiers)

    def staged_bytes(self, layer: int, part: int) -> dict[tuple[Tier, Kind], int]:
        """Bytes that a load needs: for what is not on the device, or not wide there."""
        moved, wide = self.moved(layer, part)
        from_disk = self._loads[layer, part].staged_bytes
        on_device = wide + from_disk
        if self.device_is_host:
            return {(Tier.DEVICE, Kind.WEIGHTS): on_device}
        return {
            (Tier.DEVICE, Kind.WEIGHTS): on_device + moved[Tier.HOST],
            (Tier.HOST, Kind.WEIGHTS): from_disk,
        }

    @property
    def token_row_bytes(self) -> int:
        """Bytes that a row of the token table needs on the device."""
        entry = self.tensors[TOKEN_TABLE]
        wide = entry.used_row_bytes if entry.quantization is not None else 0
        return entry.row_bytes + wide

    def workload(
        self,
        policy: Policy,
        shape: BlockShape,
        *,
        prompt_len: int,
        gen_len: int,
        num_shared: int = 0,
        prompt_lens: Sequence[int] = (),
    ) -> Workload:
        """A block of rows.

        Args:
            policy: that it runs under.
            shape: its batches.
            prompt_len: tokens of the longest prompt, but for those that it shares.
            gen_len: tokens that are generated for every row.
            num_shared: tokens with which those begin that begin alike, at most; where
                the policy's attention cannot share them, they are a part of every
                prompt.
            prompt_lens: tokens of the longest prompt of each batch, where they are
                known, but for what it shares.
        """
        if not shares_prefixes(policy, device_is_host=self.device_is_host):
            prompt_len, num_shared = prompt_len + num_shared, 0
        padded = padded_alike(prompt_lens) if prompt_lens else ()
        return Workload(
            num_decoder_layers=self.config.num_hidden_layers,
            num_head_blocks=self.head.num_blocks,
            num_parts=self.num_parts,
            blocks_per_layer=self._blocks_per_layer,
            num_batches=shape.num_batches,
            batch_size=shape.batch_size,
            prompt_len=bucket(prompt_len),
            prompt_lens=padded if len(set(padded)) > 1 else (),
            prefix_len=bucket(num_shared) if num_shared else 0,
            prefix_ends=shape.prefix_ends if num_shared else (),
            gen_len=gen_len,
            # What is on disk is loaded whole.
            reserves=self.attends_by_kernel(policy) and policy.kv_cache.disk == 0,
        )

    def attends_by_kernel(self, policy: Policy) -> bool:
        """Whether attention reads no more of a cache than what is in use."""
        return is_attended_by_kernel(policy, self.config, self.dtype, self.processor)


def _takes_block(buffer_bytes: int, block_bytes: int) -> bool:
    """Whether a block of the head goes through a buffer of a decoder layer's."""
    return block_bytes <= buffer_bytes <= MOST_ROOM * block_bytes


def lay_out(
    config: OPTConfig,
    dtype: np.dtype,
    tensors: Tensors,
    policy: Policy,
    *,
    processor: Processor,
) -> WeightLayout:
    """The layout of a model under a policy.

    Raises:
        ValueError: it has `activation_bits`, which are not for such weights, or not for
            this processor.
    """
    check_rounding(policy, multiplied(config, tensors), processor)
    tiers = place_weights(tensors, policy.weights, processor)
    return WeightLayout(
        config=config,
        dtype=dtype,
        tensors=tensors,
        tiers=tiers,
        head=head_blocks(config, tensors, tiers, processor=processor),
        num_parts=min(policy.num_batches, MOST_PARTS),
        processor=processor,
        activation_bits=policy.activation_bits,
    )


def multiplied(config: OPTConfig, tensors: Tensors) -> Tensors:
    """What a decoder layer and the head multiply with."""
    names = [name for name in layer_tensors(config, 0) if name.startswith("layers.")]
    names = [*names, config.head_table]
    return {name: tensors[name] for name in names if len(tensors[name].used_shape) == 2}


def place_weights(
    tensors: Tensors, placement: Placement, processor: Processor
) -> dict[str, Tier]:
    """The tier of every tensor.

    What is less than `SMALL_BYTES` stays in the memory of the processor that computes;
    not in a model that is small itself, where that would be more than a little.
    """
    nbytes = {name: entry.nbytes for name, entry in tensors.items()}
    small = sum(size for size in nbytes.values() if size < SMALL_BYTES)
    is_little = small <= MOST_SMALL_SHARE * sum(nbytes.values())
    return place_tensors(
        placement,
        nbytes,
        small_bytes=SMALL_BYTES if is_little else 0,
        small_tier=Tier.HOST if processor.is_host else Tier.DEVICE,
    )
