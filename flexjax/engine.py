"""Token ids in, token ids out: splits prompts into blocks and runs each as a schedule."""

import math
import pathlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import numpy as np

from flexjax.blocks import GenerateRows, Row, ScoreRows
from flexjax.checkpoint import WeightStore
from flexjax.executor import execute
from flexjax.memory.device import DeviceStore
from flexjax.memory.disk import DiskStore
from flexjax.memory.host import HostStore
from flexjax.memory.lanes import Lane, Lanes
from flexjax.memory.ledger import Ledger
from flexjax.memory.link import DeviceLink
from flexjax.memory.placed import PlacedArrays
from flexjax.memory.placement import Rows, place_rows, place_tensors
from flexjax.memory.spill import SpillFolder
from flexjax.memory.tier import TierStore
from flexjax.memory.weights import HeadBlocks, PlacedWeights
from flexjax.policy import Kind, Policy, Tier
from flexjax.schedule.emit import EMITTERS
from flexjax.schedule.ops import Cache, Hidden
from flexjax.stage import LayerStage
from flexjax.workload import Workload, bucket

MOST_PARTS = 4  # in which a layer's weights travel


class Engine:
    """A model whose tensors are placed as a policy says.

    Args of the constructor:
        store: the model's weights.
        policy: validated.
        offload_dir: where to make the spill folder.
        device: that computes.
        seed: of rows that have none of their own.
        on_weights: called with the bytes of every weight that is read at the start.
    """

    def __init__(
        self,
        store: WeightStore,
        policy: Policy,
        *,
        offload_dir: pathlib.Path,
        device: jax.Device,
        seed: int = 0,
        on_weights: Callable[[int], None] = lambda nbytes: None,
    ) -> None:
        self.config, self.policy, self._seed = store.config, policy, seed
        self.ledger = Ledger()
        self._link = DeviceLink(device, self.ledger)
        self._lanes = Lanes()
        nbytes = {name: entry.nbytes for name, entry in store.tensors.items()}
        self.tiers = place_tensors(policy.weights, nbytes)
        self._head = head_blocks(store, self.tiers, self._link.is_shared)
        self._num_parts = min(policy.num_batches, MOST_PARTS)
        self._spill: SpillFolder | None = None
        self._offload_dir = offload_dir
        self._stores: dict[Kind, dict[Tier, TierStore]] = {}
        try:
            self._weights = PlacedWeights(
                store,
                self.tiers,
                link=self._link,
                ledger=self.ledger,
                lanes=self._lanes,
                head=self._head,
                num_parts=self._num_parts,
                progress=on_weights,
            )
        except BaseException:
            self._lanes.close()
            raise

    def generate(
        self, rows: Sequence[Row], on_tokens: Callable[[int], None] = lambda count: None
    ) -> None:
        """Runs every row to its end; the rows keep their tokens.

        Rows are sorted by length, so that those of about the same length share a block.
        """
        order = sorted(rows, key=lambda row: len(row.prompt), reverse=True)
        for block in _blocks(order, self.policy):
            work = self._workload(
                max(len(row.prompt) for row in block),
                max(row.params.max_tokens for row in block),
                len(block),
            )
            self._run(
                work,
                GenerateRows(
                    block,
                    work,
                    self.config,
                    head=self._head,
                    seed=self._seed,
                    ledger=self.ledger,
                    on_tokens=on_tokens,
                ),
            )

    def score(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """For each sequence, log p(token t+1 | tokens up to t), float32 `[length - 1]`."""
        lengths = [len(sequence) for sequence in sequences]
        order = sorted(range(len(sequences)), key=lambda i: lengths[i], reverse=True)
        results: dict[int, np.ndarray] = {}
        for block in _blocks(order, self.policy):
            work = self._workload(max(lengths[i] for i in block), 1, len(block))
            rows = ScoreRows(
                [sequences[i] for i in block],
                work,
                self.config,
                head=self._head,
                ledger=self.ledger,
            )
            self._run(work, rows)
            results.update(zip(block, rows.results(), strict=True))
        return [results[i] for i in range(len(sequences))]

    def close(self) -> None:
        """Ends the threads, lets go of all memory and removes what was spilled."""
        self._lanes.close()
        self._weights.close()
        if self._spill is not None:
            self._spill.close()
            self._spill = None

    def _workload(self, prompt_len: int, gen_len: int, num_rows: int) -> Workload:
        batch_size = min(self.policy.batch_size, num_rows)
        return Workload(
            num_decoder_layers=self.config.num_hidden_layers,
            num_head_blocks=self._head.num_blocks,
            num_parts=self._num_parts,
            num_batches=math.ceil(num_rows / batch_size),
            batch_size=batch_size,
            prompt_len=bucket(prompt_len),
            gen_len=gen_len,
        )

    def _run(self, work: Workload, rows: GenerateRows | ScoreRows) -> None:
        policy = self.policy
        cache = self._placed(
            Kind.KV_CACHE, Lane.CACHE_IN, Lane.CACHE_OUT, _cache_rows(policy, work)
        )
        hidden = self._placed(
            Kind.ACTIVATIONS, Lane.HIDDEN, Lane.HIDDEN, _hidden_rows(policy, work)
        )
        stage = LayerStage(
            work,
            rows,
            weights=self._weights,
            cache=cache,
            hidden=hidden,
            lanes=self._lanes,
            ledger=self.ledger,
        )
        taken = dict.fromkeys(range(work.num_batches), 0)

        def alive(step: int, batch: int) -> bool:
            if step > taken[batch]:
                rows.take(batch, stage.outcome(batch))
                taken[batch] = step
            return step == 0 or rows.is_alive(batch)

        try:
            execute(EMITTERS[policy.schedule](work, alive), stage)
            for batch in range(work.num_batches):
                alive(work.gen_len, batch)
        finally:
            self._lanes.drain()
            cache.clear()
            hidden.clear()

    def _placed(
        self,
        kind: Kind,
        load_lane: Lane,
        store_lane: Lane,
        rows_of: Callable[[Any], Rows],
    ) -> PlacedArrays:
        if kind not in self._stores:
            self._stores[kind] = self._tier_stores(kind)
        return PlacedArrays(
            self._stores[kind],
            self._lanes,
            load_lane=load_lane,
            store_lane=store_lane,
            rows_of=rows_of,
        )

    def _tier_stores(self, kind: Kind) -> dict[Tier, TierStore]:
        stores: dict[Tier, TierStore] = {
            Tier.DEVICE: DeviceStore(self.ledger, kind),
            Tier.HOST: HostStore(self.ledger, kind, self._link),
        }
        if self.policy.placement(kind).disk > 0:
            if self._spill is None:
                self._spill = SpillFolder(self._offload_dir)
            path = self._spill.path
            stores[Tier.DISK] = DiskStore(self.ledger, kind, self._link, path)
        return stores


def _blocks[T](rows: Sequence[T], policy: Policy) -> list[Sequence[T]]:
    size = policy.block_size
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def _cache_rows(policy: Policy, work: Workload) -> Callable[[Hashable], Rows]:
    def rows_of(key: Hashable) -> Rows:
        assert isinstance(key, Cache)
        index = key.layer * work.num_batches + key.batch
        return place_rows(policy.kv_cache, work.batch_size, index)

    return rows_of


def _hidden_rows(policy: Policy, work: Workload) -> Callable[[Hashable], Rows]:
    def rows_of(key: Hashable) -> Rows:
        assert isinstance(key, Hidden)
        return place_rows(policy.activations, work.batch_size, key.batch)

    return rows_of


def head_blocks(
    store: WeightStore, tiers: dict[str, Tier], device_is_host: bool
) -> HeadBlocks:
    """Cuts a table of logits that has to travel into blocks of about a layer's bytes.

    So the head needs no larger stage buffers than a decoder layer does. A table that is
    used where it lies stays whole.
    """
    config = store.config
    table = store.tensors[config.head_table]
    tier = tiers[config.head_table]
    if tier is Tier.DEVICE or (tier is Tier.HOST and device_is_host):
        return HeadBlocks(1, config.vocab_size)
    layer_bytes = sum(
        entry.nbytes
        for name, entry in store.tensors.items()
        if name.startswith("layers.0.")
    )
    num_blocks = max(1, round(table.nbytes / layer_bytes))
    # Whole chunks, so that no chunk is read twice.
    rows = math.ceil(config.vocab_size / num_blocks / table.chunk_rows)
    rows *= table.chunk_rows
    return HeadBlocks(math.ceil(config.vocab_size / rows), rows)
