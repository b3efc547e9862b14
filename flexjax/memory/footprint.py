"""The bytes of an engine's run: what `peak_bytes` asks about a schedule's buffers."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator, Mapping

from flexjax.attention import MIN_ROWS, query_chunk
from flexjax.memory.disk import (
    MAX_TAIL_SLOTS,
    MOST_PASSING,
    passing_bytes,
    tail_slots,
)
from flexjax.memory.layout import WeightLayout
from flexjax.memory.placement import Rows, place_rows
from flexjax.memory.routes import DIRECT, Route, cache_routes
from flexjax.models.config import OPTConfig
from flexjax.policy import Kind, Policy, Tier
from flexjax.quant import Quantization, cache_quantization, cache_slot_bytes
from flexjax.schedule.emit import EMITTERS, always
from flexjax.schedule.footprint import Bytes, peak_bytes
from flexjax.schedule.ops import Buffer, Cache, Cell, Hidden, Weights, is_prefix
from flexjax.sparse import kept_slots
from flexjax.workload import PREFIX_ROWS, WIDE_ROWS, Workload, prefill_rows


def weights_at_home(weights: WeightLayout) -> dict[tuple[Tier, Kind], int]:
    """Bytes of all weights where they live, which are there whatever runs."""
    return {(tier, Kind.WEIGHTS): size for tier, size in weights.home_bytes.items()}


def cache_rows(policy: Policy, work: Workload, buffer: Cache) -> Rows:
    """Which rows of a batch have their keys and values on which tier.

    All prefixes of a layer are on the same, so that each takes as much as another.
    """
    if is_prefix(buffer.batch):
        return place_rows(policy.kv_cache, 1, buffer.layer)
    index = buffer.layer * work.num_batches + buffer.batch
    return place_rows(policy.kv_cache, work.batch_size, index)


def hidden_rows(policy: Policy, work: Workload, buffer: Hidden) -> Rows:
    """Which rows of a batch have their hidden states on which tier."""
    return place_rows(policy.activations, work.batch_size, buffer.batch)


def condensed(work: Workload) -> tuple[Workload, int]:
    """`work` with its first two and last three steps alone, and how many it leaves out.

    But for the prefill, which the step after it still overlaps, a step needs no more
    memory than the next one that stores its cache, and while that one stores, the cache
    of the step before it is there too. So the peak is the same, and a long generation
    is as quickly sized as a short one.
    """
    skipped = max(0, work.gen_len - 5)
    return dataclasses.replace(work, gen_len=work.gen_len - skipped), skipped


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFootprint:
    """Sizes of a run's buffers.

    Attributes:
        work: the run.
        policy: that places it.
        weights: that it uses.
        scores: whether it scores whole prompts, instead of generating.
        skipped: steps that are left out after the first two, see `condensed`.
    """

    work: Workload
    policy: Policy
    weights: WeightLayout
    scores: bool
    skipped: int = 0

    @functools.cached_property
    def of_prefix(self) -> "RunFootprint":
        """Of the work on a prefix, whose keys and values are kept wide."""
        policy = dataclasses.replace(self.policy, kv_cache_bits=None)
        work = self.work.of_prefix
        return dataclasses.replace(self, work=work, policy=policy, skipped=0)

    @property
    def config(self) -> OPTConfig:
        return self.weights.config

    @property
    def device_is_host(self) -> bool:
        return self.weights.device_is_host

    @property
    def _itemsize(self) -> int:
        return self.weights.dtype.itemsize

    def resident(self) -> Bytes:
        size = Counter(weights_at_home(self.weights))
        if not self.scores:
            # Where the head comes in blocks, all batches' logits wait for the last one.
            waiting = self.work.num_batches if self.weights.head.num_blocks > 1 else 1
            logits = 4 * self.work.batch_size * self.config.vocab_size
            size[Tier.DEVICE, Kind.ACTIVATIONS] += waiting * logits
        if self.policy.attention_sparsity < 1:
            size[Tier.DEVICE, Kind.KV_CACHE] += self._value_sums_bytes()
        for kind, nbytes in self._passing():
            size[Tier.HOST, kind] += nbytes
        return size

    def _value_sums_bytes(self) -> int:
        """Of the running sums of all caches' values, in float32; see `value_sums`."""
        work = self.work
        caches = work.num_decoder_layers * work.num_batches
        return 4 * caches * work.batch_size * self.config.hidden_size

    def _passing(self) -> Iterator[tuple[Kind, int]]:
        """Bytes of the buffers through which arrays pass on their way to disk."""
        work, policy, rows = self.work, self.policy, self.work.batch_size
        if policy.kv_cache.disk > 0:
            slot_bytes = self.cache_slot_bytes // 2  # keys and values are two arrays
            row_bytes = max(work.prompt_len, MAX_TAIL_SLOTS) * slot_bytes
            # As many stripes as can be under way: their number grows with the tokens.
            nbytes = passing_bytes(rows, row_bytes, stripes=MOST_PASSING)
            # All of a prefix is one stripe, and stores pass one after the other.
            prefix_bytes = work.prefix_len * self.of_prefix.cache_slot_bytes // 2
            nbytes = max(nbytes, prefix_bytes)
            # What is loaded passes too once a tail was written behind the prompt.
            is_short = work.gen_len <= tail_slots(rows * slot_bytes)
            yield Kind.KV_CACHE, nbytes if is_short else 2 * nbytes
        if policy.activations.disk > 0:
            row_bytes = work.prompt_len * self.hidden_bytes
            yield Kind.ACTIVATIONS, passing_bytes(rows, row_bytes, stripes=1)

    def loaded(self, buffer: Buffer, step: int) -> Bytes:
        work = self.work
        match buffer:
            case Weights(layer, part):
                return self.weights.staged_bytes(layer, part)
            case Cache(layer, batch) if is_prefix(batch):
                return self.of_prefix.loaded(Cache(layer, 0), 1)
            case Hidden(batch) if is_prefix(batch):
                return self.of_prefix.loaded(Hidden(0), 0)
            case Cache(_, batch):
                rows = cache_rows(self.policy, work, buffer)
                slots = work.cache_slots(self._true(step) - 1, batch)
                return self._cache_staged(rows, slots)
            case Hidden(batch):
                # Before the first layer, and where tiers join, all rows are staged.
                return self._staged(
                    Kind.ACTIVATIONS,
                    Rows(0, 0, work.batch_size),
                    work.seq_len(step, batch)
                    * max(self.hidden_bytes, self.weights.token_row_bytes),
                )

    def computed(self, cell: Cell) -> Mapping[Buffer, Bytes]:
        work = self.work
        if not work.is_decoder(cell.layer):
            return {}
        if is_prefix(cell.batch):
            found = self.of_prefix.computed(cell._replace(batch=0))
            hidden, cache = found[Hidden(0)], found[Cache(cell.layer, 0)]
            return {Hidden(cell.batch): hidden, Cache(cell.layer, cell.batch): cache}
        slots = work.batch_size * work.seq_len(cell.step, cell.batch)
        hidden = {(Tier.DEVICE, Kind.ACTIVATIONS): slots * self.hidden_bytes}
        cache = {(Tier.DEVICE, Kind.KV_CACHE): slots * self.cache_slot_bytes}
        return {Hidden(cell.batch): hidden, Cache(cell.layer, cell.batch): cache}

    def workspace(self, cell: Cell) -> Bytes:
        """What XLA's CPU backend allocates for a decoder layer (its memory analysis).

        Between the layer's matrices lie 5 bytes and one element for every element of
        the MLP's inner width; results of a prefill in groups are there twice.
        """
        work, config = self.work, self.config
        if not work.is_decoder(cell.layer):
            return {}
        if is_prefix(cell.batch):
            return self.of_prefix.workspace(cell._replace(batch=0))
        seq = work.seq_len(cell.step, cell.batch)
        rows = prefill_rows(work.batch_size, seq) if seq > 1 else work.batch_size
        factor = 1 if rows == work.batch_size else 2
        nbytes = rows * seq * config.ffn_dim * (5 + factor * self._itemsize)
        nbytes += self._prefix_attention_bytes(seq, is_prefill=cell.step == 0)
        size = {(Tier.DEVICE, Kind.ACTIVATIONS): nbytes}
        if cell.step > 0:
            slots = work.cache_slots(self._true(cell.step) - 1, cell.batch)
            self._add_attention(size, slots)
        return size

    def _prefix_attention_bytes(self, seq: int, *, is_prefill: bool) -> int:
        """What attention to a prefix needs beside it, of rows of `seq` new tokens.

        Scores in float32, and keys or values in it too, into which XLA's CPU backend
        makes those of 16 bits (its memory analysis, or a little more).
        """
        slots, config = self.work.prefix_len, self.config
        if not slots:
            return 0
        at_once = min(PREFIX_ROWS, self.work.batch_size)
        queries = query_chunk(seq, slots) if is_prefill else at_once
        wide = slots * config.hidden_size * 4 if self._itemsize < 4 else 0
        return config.num_attention_heads * queries * slots * 4 + wide

    def _add_attention(self, size: dict[tuple[Tier, Kind], int], slots: int) -> None:
        """Adds what attention to a cache of `slots` slots needs beside it.

        That is scores of padded queries, keys and values made wide, and values gathered
        (XLA's memory analysis, within 15 % but for sparse attention, where it is less).
        A kernel on the host's processor needs next to nothing of it.
        """
        batch, config = self.work.batch_size, self.config
        row_bytes = config.hidden_size * self._itemsize
        kept = kept_slots(self.policy.attention_sparsity, slots)
        is_wide = self.cache_as is not None
        at_once = min(WIDE_ROWS, batch) if is_wide else batch
        nbytes = at_once * config.num_attention_heads * slots * 4 * (MIN_ROWS + 1)
        if is_wide:
            nbytes += at_once * slots * row_bytes
        if is_wide or kept < slots:
            nbytes += at_once * kept * row_bytes
        size[Tier.DEVICE, Kind.ACTIVATIONS] += nbytes
        routes = self.routes.values()
        if any(route != DIRECT for route in routes):
            # Query, key, value and what attention finds, there and back, of two calls
            # on the device and of one on the host.
            size[Tier.DEVICE, Kind.ACTIVATIONS] += 2 * 5 * batch * row_bytes
            on_host = nbytes if any(route.on_host for route in routes) else 0
            size[Tier.HOST, Kind.ACTIVATIONS] = 4 * batch * row_bytes + on_host

    def stored(self, buffer: Cache | Hidden, step: int) -> Bytes:
        work = self.work
        if isinstance(buffer, Cache) and is_prefix(buffer.batch):
            return self.of_prefix.stored(Cache(buffer.layer, 0), 0)
        if isinstance(buffer, Hidden):
            rows = hidden_rows(self.policy, work, buffer)
            slot_bytes = work.seq_len(step, buffer.batch) * self.hidden_bytes
            return {
                (tier, Kind.ACTIVATIONS): count * slot_bytes
                for tier, count in zip(Tier, rows, strict=True)
            }
        rows = cache_rows(self.policy, work, buffer)
        slot_bytes = self.cache_slot_bytes
        row_bytes = slot_bytes * work.cache_slots(self._true(step), buffer.batch)
        size = Counter(
            {
                (Tier.DEVICE, Kind.KV_CACHE): rows.device * row_bytes,
                (Tier.HOST, Kind.KV_CACHE): rows.host * row_bytes,
            }
        )
        if rows.disk:
            # Keys and values are two arrays; each has a tail, written when full.
            tail = tail_slots(rows.disk * slot_bytes // 2)
            first = work.prompt_slots(buffer.batch)
            written = first + self._true(step) // tail * tail
            size[Tier.DISK, Kind.KV_CACHE] = rows.disk * slot_bytes * written
            if step > 0:
                size[Tier.HOST, Kind.KV_CACHE] += rows.disk * slot_bytes * tail
        return size

    def _true(self, step: int) -> int:
        return step + self.skipped if step > 1 else step

    @functools.cached_property
    def cache_slot_bytes(self) -> int:
        """Key and value of one token of one row in one layer, as they are kept."""
        return cache_slot_bytes(self.config, self.weights.dtype, self.cache_as)

    @functools.cached_property
    def cache_as(self) -> Quantization | None:
        """How the cache is quantized."""
        return cache_quantization(self.policy, self.config, self.weights.dtype)

    @property
    def hidden_bytes(self) -> int:
        """The widest that a token's hidden state gets."""
        return max(self.config.hidden_size, self.config.embed_dim) * self._itemsize

    @functools.cached_property
    def routes(self) -> dict[Tier, Route]:
        """How the cached rows of each tier are attended to."""
        return cache_routes(self.policy, device_is_host=self.device_is_host)

    def _cache_staged(self, rows: Rows, slots: int) -> Bytes:
        """Bytes of a cache's load, and of what is gathered after it."""
        size: Counter[tuple[Tier, Kind]] = Counter()
        routes, slot_bytes = self.routes, self.cache_slot_bytes
        for tier, count in zip(Tier, rows, strict=True):
            if not count:
                continue
            if routes[tier].on_host:
                from_disk = count if tier is Tier.DISK else 0
                size[Tier.HOST, Kind.KV_CACHE] += from_disk * slots * slot_bytes
            elif routes[tier].gathers:
                kept = kept_slots(self.policy.attention_sparsity, slots)
                size[Tier.DEVICE, Kind.KV_CACHE] += count * slots * slot_bytes // 2
                for used in (Tier.DEVICE, Tier.HOST):
                    size[used, Kind.KV_CACHE] += count * kept * slot_bytes // 2
            else:
                alone = Rows(**{tier.value: count})
                size.update(self._staged(Kind.KV_CACHE, alone, slots * slot_bytes))
        return size

    def _staged(self, kind: Kind, rows: Rows, row_bytes: int) -> Bytes:
        """Bytes of a load: rows that are not on the device need room there."""
        if self.device_is_host:
            return {(Tier.DEVICE, kind): rows.disk * row_bytes}
        return {
            (Tier.DEVICE, kind): (rows.host + rows.disk) * row_bytes,
            (Tier.HOST, kind): rows.disk * row_bytes,
        }


def run_peak_bytes(
    work: Workload, policy: Policy, weights: WeightLayout, *, scores: bool = False
) -> dict[tuple[Tier, Kind], int]:
    """Peak bytes of a run, by tier and kind, workspaces included."""
    short, skipped = condensed(work)
    footprint = RunFootprint(
        work=work, policy=policy, weights=weights, scores=scores, skipped=skipped
    )
    return peak_bytes(EMITTERS[policy.schedule](short, always), footprint)
