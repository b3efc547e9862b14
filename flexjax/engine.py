"""Token ids in, token ids out: runs blocks of prompts, each as a schedule."""

import contextlib
import functools
import math
import pathlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from flexjax.blocks import GenerateRows, Row, ScoreRows
from flexjax.checkpoint import WeightStore
from flexjax.executor import execute
from flexjax.memory.capacity import ensure_fits, free_bytes
from flexjax.memory.device import DeviceStore
from flexjax.memory.disk import DiskStore
from flexjax.memory.footprint import RunFootprint, cache_rows, condensed, hidden_rows
from flexjax.memory.host import HostStore
from flexjax.memory.lanes import Lane, Lanes
from flexjax.memory.ledger import Ledger
from flexjax.memory.link import Device, DeviceLink
from flexjax.memory.placed import PlacedArrays
from flexjax.memory.placement import Rows, effective, place_tensors
from flexjax.memory.spill import SpillFolder
from flexjax.memory.tier import TierStore
from flexjax.memory.weights import HeadBlocks, PlacedWeights
from flexjax.metrics import RunTimes
from flexjax.policy import Kind, Policy, Tier
from flexjax.schedule.emit import EMITTERS, always
from flexjax.schedule.footprint import peak_bytes
from flexjax.stage import LayerStage
from flexjax.workload import Workload, bucket

MOST_PARTS = 4  # in which a layer's weights travel


class Engine:
    """A model whose tensors are placed as a policy says.

    One call runs at a time; calls from other threads wait for it.

    Args of the constructor:
        store: the model's weights.
        policy: validated.
        offload_dir: where to make the spill folder.
        device: that computes.
        seed: of rows that have none of their own.
        on_weights: called with the bytes of every weight that is read at the start.

    Raises:
        ValueError: the weights do not fit, or `offload_dir` cannot be written to.
    """

    def __init__(
        self,
        store: WeightStore,
        policy: Policy,
        *,
        offload_dir: pathlib.Path,
        device: Device,
        seed: int = 0,
        on_weights: Callable[[int], object] = lambda nbytes: None,
    ) -> None:
        self.config, self.policy, self._seed = store.config, policy, seed
        self.ledger, self.times = Ledger(), RunTimes()
        self._running, self._closed = threading.Lock(), False
        self._link = DeviceLink(device, self.ledger)
        self._offload_dir = offload_dir
        nbytes = {name: entry.nbytes for name, entry in store.tensors.items()}
        tiers = place_tensors(policy.weights, nbytes)
        self._ensure_fits(
            {
                (tier, Kind.WEIGHTS): size
                for tier, size in effective(nbytes, tiers).items()
                if tier is not Tier.DISK  # where the store is already
            }
        )
        self._num_parts = min(policy.num_batches, MOST_PARTS)
        spills = max(policy.kv_cache.disk, policy.activations.disk) > 0
        self._spill = SpillFolder(offload_dir) if spills else None
        self._stores: dict[Kind, dict[Tier, TierStore]] = {}
        self._lanes = Lanes()
        try:
            self.weights = PlacedWeights(
                store,
                tiers,
                link=self._link,
                ledger=self.ledger,
                lanes=self._lanes,
                head=head_blocks(store, tiers, self._link.is_shared),
                num_parts=self._num_parts,
                progress=on_weights,
            )
        except BaseException:
            self._lanes.close()
            self._remove_spill()
            raise

    def generate(
        self, rows: Sequence[Row], on_tokens: Callable[[int], None] = lambda count: None
    ) -> None:
        """Runs every row to its end; the rows keep their tokens.

        Rows are sorted by length, so that those of about the same length share a block.

        Raises:
            ValueError: the policy does not fit.
            OSError: a transfer failed; the message names what and where.
        """
        order = sorted(rows, key=lambda row: len(row.prompt), reverse=True)
        blocks = _blocks(order, self.policy)
        works = [
            self._workload(
                max(len(row.prompt) for row in block),
                max(row.params.max_tokens for row in block),
                len(block),
            )
            for block in blocks
        ]

        def count(num_tokens: int) -> None:
            self.times.num_tokens += num_tokens
            on_tokens(num_tokens)

        with self._call(works, scores=False):
            for block, work in zip(blocks, works, strict=True):
                sampler = GenerateRows(
                    block,
                    work,
                    self.config,
                    head=self.weights.head,
                    seed=self._seed,
                    ledger=self.ledger,
                    on_tokens=count,
                )
                self._run(work, sampler)

    def score(
        self,
        sequences: Sequence[Sequence[int]],
        on_tokens: Callable[[int], None] = lambda count: None,
    ) -> list[np.ndarray]:
        """For each sequence, log p(token t+1 | tokens up to t), `[length - 1]`.

        Raises:
            ValueError, OSError: as `generate`.
        """
        lengths = [len(sequence) for sequence in sequences]
        order = sorted(range(len(sequences)), key=lambda i: lengths[i], reverse=True)
        blocks = _blocks(order, self.policy)
        works = [
            self._workload(max(lengths[i] for i in block), 1, len(block))
            for block in blocks
        ]
        results: dict[int, np.ndarray] = {}
        with self._call(works, scores=True):
            for block, work in zip(blocks, works, strict=True):
                rows = ScoreRows(
                    [sequences[i] for i in block],
                    work,
                    self.config,
                    head=self.weights.head,
                )
                self._run(work, rows)
                results.update(zip(block, rows.results(), strict=True))
                on_tokens(sum(lengths[i] for i in block))
        return [results[i] for i in range(len(sequences))]

    def predict(self, work: Workload, *, scores: bool) -> dict[tuple[Tier, Kind], int]:
        """Peak bytes of a run, by tier and kind, workspaces included."""
        short, skipped = condensed(work)
        footprint = RunFootprint(
            work=work,
            policy=self.policy,
            weights=self.weights,
            scores=scores,
            device_is_host=self._link.is_shared,
            skipped=skipped,
        )
        return peak_bytes(EMITTERS[self.policy.schedule](short, always), footprint)

    def close(self) -> None:
        """Ends the threads, lets go of all memory and removes what was spilled."""
        with self._running:
            self._closed = True
            self._lanes.close()
            self.weights.close()
            self._remove_spill()

    def _remove_spill(self) -> None:
        if self._spill is not None:
            self._spill.close()
            self._spill = None

    def _workload(self, prompt_len: int, gen_len: int, num_rows: int) -> Workload:
        batch_size = min(self.policy.batch_size, num_rows)
        return Workload(
            num_decoder_layers=self.config.num_hidden_layers,
            num_head_blocks=self.weights.head.num_blocks,
            num_parts=self._num_parts,
            num_batches=math.ceil(num_rows / batch_size),
            batch_size=batch_size,
            prompt_len=bucket(prompt_len),
            gen_len=gen_len,
        )

    def _start(self, works: Sequence[Workload], *, scores: bool) -> None:
        """Refuses a call that does not fit before anything of it runs."""
        peak: Counter[tuple[Tier, Kind]] = Counter()
        for work in dict.fromkeys(works):
            peak |= Counter(self.predict(work, scores=scores))
        self._lanes.busy_s = dict.fromkeys(Lane, 0.0)
        self.times = RunTimes(predicted_peak=dict(peak), busy_s=self._lanes.busy_s)
        self.ledger.start()
        self._ensure_fits({key: peak[key] - self.ledger.held(*key) for key in peak})

    def _ensure_fits(self, needed: Mapping[tuple[Tier, Kind], int]) -> None:
        free = free_bytes(self._link.device, self._offload_dir)
        ensure_fits(needed, free, device_is_host=self._link.is_shared)

    @contextlib.contextmanager
    def _call(self, works: Sequence[Workload], *, scores: bool) -> Iterator[None]:
        """Keeps buffers from block to block of a call, and gives them back in the end.

        Raises:
            ValueError: the engine is closed, or one of the blocks does not fit.
        """
        with self._running:
            if self._closed:
                raise ValueError("this model is closed; make a new one to run it again")
            self._start(works, scores=scores)
            try:
                yield
            finally:
                self.weights.clear()
                for stores in self._stores.values():
                    for store in stores.values():
                        store.clear()

    def _run(self, work: Workload, rows: GenerateRows | ScoreRows) -> None:
        policy = self.policy
        cache = self._placed(
            Kind.KV_CACHE,
            (Lane.CACHE_IN, Lane.CACHE_OUT),
            functools.partial(cache_rows, policy, work),
        )
        hidden = self._placed(
            Kind.ACTIVATIONS,
            (Lane.HIDDEN, Lane.HIDDEN),
            functools.partial(hidden_rows, policy, work),
        )
        stage = LayerStage(
            work,
            rows,
            weights=self.weights,
            cache=cache,
            hidden=hidden,
            lanes=self._lanes,
            ledger=self.ledger,
        )
        taken = dict.fromkeys(range(work.num_batches), 0)
        started = time.perf_counter()
        prefilled = started

        def alive(step: int, batch: int) -> bool:
            nonlocal prefilled
            if step > taken[batch]:
                rows.take(batch, stage.outcome(batch))
                taken[batch] = step
                if step == 1:
                    prefilled = time.perf_counter()
            return step == 0 or rows.is_alive(batch)

        try:
            execute(EMITTERS[policy.schedule](work, alive), stage)
            for batch in range(work.num_batches):
                alive(taken[batch] + 1, batch)
        finally:
            self._lanes.drain()
            rows.clear()
            cache.clear()
            hidden.clear()
        self.times.prefill_s += prefilled - started
        self.times.decode_s += time.perf_counter() - prefilled

    def _placed(
        self,
        kind: Kind,
        lanes: tuple[Lane, Lane],
        rows_of: Callable[[Any], Rows],
    ) -> PlacedArrays:
        if kind not in self._stores:
            self._stores[kind] = self._tier_stores(kind)
        load_lane, store_lane = lanes
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
        if self._spill is not None:
            path = self._spill.path
            stores[Tier.DISK] = DiskStore(self.ledger, kind, self._link, path)
        return stores


def _blocks[T](rows: Sequence[T], policy: Policy) -> list[Sequence[T]]:
    size = policy.block_size
    return [rows[first : first + size] for first in range(0, len(rows), size)]


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
