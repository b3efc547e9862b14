"""Seconds of every op of a run on a machine: what `simulate` asks about a schedule."""

import dataclasses
import functools

from flexjax.attention import prefill_attention_flops, prefix_attention_flops
from flexjax.memory.footprint import RunFootprint, cache_rows, hidden_rows
from flexjax.memory.layout import MATRIX, Moved, WeightLayout
from flexjax.memory.placement import Rows
from flexjax.models.config import layer_tensors
from flexjax.plan.hardware import WHOLE_BITS, Hardware
from flexjax.policy import Policy, Tier
from flexjax.quant import cache_slot_bytes
from flexjax.schedule.emit import hidden_stays
from flexjax.schedule.ops import Buffer, Cache, Cell, Hidden, Weights, is_prefix
from flexjax.schedule.resources import Resource, Seconds, add_seconds
from flexjax.sparse import kept_slots
from flexjax.workload import Workload, prefill_rows

# As long as so many reads it takes XLA on a CPU to multiply with keys and values of 16
# bits beside the products themselves, since it makes them wide first: of 10 MB 1.9 ms
# for 2 rows to 64, where attention reads 22 GB/s (2 cores with AVX-512).
WIDE_READS = 4


@dataclasses.dataclass(frozen=True, eq=False)
class RunCosts:
    """Seconds of a run's ops, which move the bytes of `run`, on `hardware`."""

    run: RunFootprint
    hardware: Hardware

    @property
    def work(self) -> Workload:
        return self.run.work

    @property
    def policy(self) -> Policy:
        return self.run.policy

    @property
    def weights(self) -> WeightLayout:
        return self.run.weights

    @functools.cached_property
    def _of_prefix(self) -> "RunCosts":
        return dataclasses.replace(self, run=self.run.of_prefix)

    def load(self, buffer: Buffer, step: int) -> Seconds:
        match buffer:
            case Weights(layer, part):
                return self._load_weights(self.weights.moved(layer, part))
            case Cache(layer, batch) if is_prefix(batch):
                return self._of_prefix.load(Cache(layer, 0), 1)
            case Hidden(batch) if is_prefix(batch):
                rows = Rows(0, 1, 0)  # none but token rows come
                return self._load_rows(
                    rows, self.work.prefix_len * self.run.hidden_bytes
                )
            case Cache():
                return self._load_cache(buffer, step)
            case Hidden(batch):
                rows = hidden_rows(self.policy, self.work, Hidden(batch))
                if hidden_stays(self.policy.schedule, self.work):
                    rows = Rows(0, self.work.batch_size, 0)  # none but token rows come
                return self._load_rows(
                    rows, self.work.seq_len(step, batch) * self.run.hidden_bytes
                )

    def compute(self, cell: Cell) -> Seconds:
        if is_prefix(cell.batch):
            return self._of_prefix.compute(cell._replace(batch=0))
        work, hardware = self.work, self.hardware
        seconds = {Resource.COMPUTE: 0.0}
        if not work.is_decoder(cell.layer):
            block = cell.layer - work.num_decoder_layers
            span = self.weights.head.span(block, self.weights.config.vocab_size)
            size = (span.stop - span.start) * self.weights.config.embed_dim
            table = self.weights.config.head_table
            seconds[Resource.COMPUTE] += self._products_s(work.batch_size, size, table)
            logits = work.batch_size * (span.stop - span.start)
            seconds[Resource.COMPUTE] += logits / hardware.sampled_logits_per_s
        elif cell.step == 0:
            seconds[Resource.COMPUTE] += self._prefills_s[work.prompt_slots(cell.batch)]
        else:
            seconds[Resource.COMPUTE] += self._layer_s(work.batch_size)
            seconds[Resource.COMPUTE] += self._prefix_s(work.batch_size)
            seconds[Resource.COMPUTE] += self._read_prefix_s
            add_seconds(seconds, self._attention(cell))
        return seconds

    def store(self, buffer: Cache | Hidden, step: int) -> Seconds:
        work = self.work
        if isinstance(buffer, Cache) and is_prefix(buffer.batch):
            return self._of_prefix.store(Cache(buffer.layer, 0), 0)
        slots = work.seq_len(step, buffer.batch)
        if isinstance(buffer, Hidden):
            rows = hidden_rows(self.policy, work, buffer)
            return self._store_rows(rows, slots * self.run.hidden_bytes)
        rows = cache_rows(self.policy, work, buffer)
        return self._store_rows(rows, slots * self.run.cache_slot_bytes)

    def load_all_weights(self) -> Seconds:
        """Of all loads of weights in a step."""
        return self._load_weights(self.weights.all_moved)

    def _load_weights(self, moved: Moved) -> Seconds:
        seconds: dict[Resource, float] = {}
        by_tier, wide = moved
        self._add_read(seconds, by_tier[Tier.DISK])
        self._add_to_device(seconds, by_tier[Tier.HOST] + by_tier[Tier.DISK])
        if wide:
            bits = self.policy.weight_bits
            assert bits is not None
            rate = self.hardware.dequantized_bytes_per_s[bits]
            add_seconds(seconds, {Resource.COMPUTE: wide / rate})
        return seconds

    def _load_cache(self, buffer: Cache, step: int) -> Seconds:
        seconds: dict[Resource, float] = {}
        rows = cache_rows(self.policy, self.work, buffer)
        slot_bytes = self.run.cache_slot_bytes
        # What is on disk is read as far as it is in use, a host's array is lent whole.
        used = self.work.past_len(step, buffer.batch)
        self._add_read(seconds, rows.disk * used * slot_bytes)
        if rows.disk and self.run.device_is_host:
            # To load and to store what is spilled takes the processor about as long as
            # a call with next to nothing to do: 1.0 to 1.3 ms for OPT-1.3B, 16 rows.
            calls = self.hardware.call_s
            add_seconds(seconds, {Resource.COMPUTE: calls[min(calls)]})
        for tier, count in zip(Tier, rows, strict=True):
            route = self.run.routes[tier]
            if tier is Tier.DEVICE or route.on_host:
                continue
            slots: float = self.work.cache_slots(step - 1, buffer.batch)
            if route.gathers:
                kept = kept_slots(self.policy.attention_sparsity, int(slots))
                slots = (slots + kept) / 2  # keys whole, and of values what they choose
            self._add_to_device(seconds, count * slots * slot_bytes)
        return seconds

    def _load_rows(self, rows: Rows, row_bytes: int) -> Seconds:
        seconds: dict[Resource, float] = {}
        self._add_read(seconds, rows.disk * row_bytes)
        self._add_to_device(seconds, (rows.host + rows.disk) * row_bytes)
        return seconds

    def _store_rows(self, rows: Rows, row_bytes: int) -> Seconds:
        seconds: dict[Resource, float] = {}
        rate = self.hardware.from_device_bytes_per_s
        if rate is not None:
            moved = (rows.host + rows.disk) * row_bytes
            seconds[Resource.FROM_DEVICE] = moved / rate
        written = rows.disk * row_bytes
        seconds[Resource.DISK_WRITE] = written / self.hardware.disk_write_bytes_per_s
        return seconds

    def _add_read(self, seconds: dict[Resource, float], nbytes: float) -> None:
        spent_s = nbytes / self.hardware.disk_read_bytes_per_s
        add_seconds(seconds, {Resource.DISK_READ: spent_s})

    def _add_to_device(self, seconds: dict[Resource, float], nbytes: float) -> None:
        rate = self.hardware.to_device_bytes_per_s
        if rate is not None:
            add_seconds(seconds, {Resource.TO_DEVICE: nbytes / rate})

    def _attention(self, cell: Cell) -> Seconds:
        """Of new tokens to what is cached, by where that happens."""
        hardware = self.hardware
        seconds = {Resource.COMPUTE: 0.0, Resource.HOST_ATTENTION: 0.0}
        rows = cache_rows(self.policy, self.work, Cache(cell.layer, cell.batch))
        slots = self.work.cache_slots(cell.step - 1, cell.batch)
        if self._attends_by_kernel:
            slots = self.work.past_len(cell.step, cell.batch)
        slot_bytes = cache_slot_bytes(self.weights.config, self.weights.dtype, None)
        how = self.run.cache_as
        bits = WHOLE_BITS if how is None else how.bits
        for tier, count in zip(Tier, rows, strict=True):
            wide_bytes = count * slots * slot_bytes
            on_host = self.run.routes[tier].on_host
            resource = Resource.HOST_ATTENTION if on_host else Resource.COMPUTE
            rates = (
                hardware.host_attention_bytes_per_s
                if on_host
                else hardware.attention_bytes_per_s
            )
            seconds[resource] += wide_bytes / rates[bits]
            # However few the rows; the closed form counts a share of it for a share.
            if on_host and count:
                seconds[resource] += hardware.round_trip_s
        return seconds

    @functools.cached_property
    def _attends_by_kernel(self) -> bool:
        return self.weights.attends_by_kernel(self.policy)

    @functools.cached_property
    def _prefills_s(self) -> dict[int, float]:
        """Of a layer on a batch of whole prompts, by their slots."""
        slots = {self.work.prompt_len, *self.work.prompt_lens}
        return {count: self._prefill_s(count) for count in slots}

    def _prefill_s(self, seq: int) -> float:
        hardware, batch = self.hardware, self.work.batch_size
        rows = prefill_rows(batch, seq)
        groups = batch // rows
        products_s = groups * self._layer_s(rows * seq)
        flops = prefill_attention_flops(batch, seq, self.weights.config.hidden_size)
        attention_s = flops / hardware.prefill_attention_flops_per_s
        return products_s + attention_s + self._prefix_s(batch * seq)

    def _prefix_s(self, num_tokens: int) -> float:
        """Of the attention of so many tokens to the prefix before them."""
        hidden_size, slots = self.weights.config.hidden_size, self.work.prefix_len
        flops = prefix_attention_flops(num_tokens, slots, hidden_size)
        return flops / self.hardware.prefill_attention_flops_per_s

    @functools.cached_property
    def _read_prefix_s(self) -> float:
        """To read a prefix in a decode call, once for all rows."""
        slot_bytes = self.run.of_prefix.cache_slot_bytes
        is_widened = self.run.device_is_host and self.weights.dtype.itemsize < 4
        reads = WIDE_READS if is_widened else 1
        nbytes = reads * self.work.prefix_len * slot_bytes
        return nbytes / self.hardware.attention_bytes_per_s[WHOLE_BITS]

    def _layer_s(self, rows: int) -> float:
        """Of all but attention in a call of a decoder layer."""
        return self._products_s(rows, self._layer_weights, MATRIX)

    def _products_s(self, rows: int, num_weights: int, name: str) -> float:
        """The same of so many weights, which are kept as those of a tensor are."""
        how = self.weights.tensors[name].quantization
        is_narrow = not self.weights.is_widened(name)
        return self.hardware.layer_s(
            rows,
            num_weights,
            how.bits if how is not None and is_narrow else None,
            is_rounded=self.weights.activation_bits is not None,
        )

    @functools.cached_property
    def _layer_weights(self) -> int:
        """Elements of a decoder layer's matrices."""
        config, tensors = self.weights.config, self.weights.tensors
        shapes = (
            tensors[name].used_shape
            for name in layer_tensors(config, 0)
            if name.startswith("layers.0.")
        )
        return sum(shape[0] * shape[1] for shape in shapes if len(shape) == 2)
