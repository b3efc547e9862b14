"""Runs one block of batches: a schedule's ops on a stage of placed arrays."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any, Protocol

from flexjax.attention_apart import AttentionApart
from flexjax.executor import execute
from flexjax.kernels.decode_attention import DECODE_ATTENTION
from flexjax.layer_calls import LayerCalls, Rows
from flexjax.memory.device import DeviceStore
from flexjax.memory.disk import DiskStore
from flexjax.memory.footprint import cache_rows, hidden_rows
from flexjax.memory.host import HostStore
from flexjax.memory.lanes import Lane
from flexjax.memory.link import HostLink, Lender
from flexjax.memory.placed import PlacedArrays
from flexjax.memory.placement import Rows as PlacedRows
from flexjax.memory.routes import DIRECT, cache_routes
from flexjax.memory.spill import SpillFolder, sweep
from flexjax.memory.tier import GatherStore, TierStore
from flexjax.memory.transport import Transport
from flexjax.memory.weights import PlacedWeights
from flexjax.metrics import RunTimes
from flexjax.policy import Kind, Policy, Tier
from flexjax.quant import cache_quantization
from flexjax.schedule.emit import EMITTERS
from flexjax.stage import LayerStage
from flexjax.value_sums import ValueSums
from flexjax.workload import Workload


class BlockRows(Rows, Protocol):
    """The rows of a block, as its runner sees them."""

    def take(self, batch: int, outcome: Any, /) -> None:
        """Receives what the last head call of a batch returned."""
        ...

    def is_alive(self, batch: int) -> bool:
        """Whether the batch wants another step; asked when its last was taken."""
        ...

    def clear(self) -> None:
        """Lets go of what a failed run left behind."""
        ...


class BlockRunner:
    """Holds the stores of what a run makes, and uses them again from block to block.

    Args of the constructor:
        policy: that places the cache and the hidden states.
        transport: what everything goes through.
        offload_dir: where to make the spill folder, if anything is on disk; what killed
            processes left there is removed.

    Raises:
        ValueError: attention on the host needs a processor that is not to be had.
    """

    def __init__(
        self,
        policy: Policy,
        transport: Transport,
        offload_dir: pathlib.Path,
    ) -> None:
        self._policy, self._transport = policy, transport
        self._routes = cache_routes(policy, device_is_host=transport.link.is_shared)
        on_host = any(route.on_host for route in self._routes.values())
        self._host = HostLink() if on_host else None
        if on_host or transport.link.is_shared:
            DECODE_ATTENTION.is_there()  # or it would be compiled in the first step
        spills = max(policy.kv_cache.disk, policy.activations.disk) > 0
        sweep(offload_dir)  # whether anything is spilled this time or not
        self._spill = SpillFolder(offload_dir) if spills else None
        self._stores: dict[Kind, dict[Tier, TierStore]] = {}
        self._gathered: dict[Tier, GatherStore] = {}

    def run(
        self, work: Workload, rows: BlockRows, weights: PlacedWeights, times: RunTimes
    ) -> None:
        """Runs a block to its end; `rows` keep what comes of it.

        Raises:
            Exception: whatever failed; nothing is staged then.
        """
        policy = self._policy
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
        cache_as = cache_quantization(
            policy, weights.layout.config, weights.layout.dtype
        )
        sums = ValueSums(self._transport.ledger, cache_as)
        calls = LayerCalls(
            work,
            rows,
            weights.layout.config,
            cache_as=cache_as,
            sparsity=policy.attention_sparsity,
            sums=sums if policy.attention_sparsity < 1 else None,
            apart=self._attention_apart(cache, weights),
        )
        stage = LayerStage(
            work,
            rows,
            calls,
            weights=weights,
            cache=cache,
            hidden=hidden,
            transport=self._transport,
        )
        steps = _Steps(rows, stage, times, work.num_batches)
        try:
            execute(EMITTERS[policy.schedule](work, steps.alive), stage)
            steps.end()
        finally:
            self._transport.lanes.drain()
            rows.clear()
            sums.clear()
            cache.clear()
            hidden.clear()

    def clear(self) -> None:
        """Gives back the buffers that were kept for the next block."""
        for stores in self._stores.values():
            for store in stores.values():
                store.clear()

    def close(self) -> None:
        """Removes what was spilled."""
        if self._spill is not None:
            self._spill.close()
            self._spill = None

    def _attention_apart(
        self, cache: PlacedArrays, weights: PlacedWeights
    ) -> AttentionApart | None:
        """What attends apart from the layers' steps, if anything does."""
        policy = self._policy
        if all(route == DIRECT for route in self._routes.values()):
            return None
        return AttentionApart(
            cache,
            self._transport.link,
            self._routes,
            host=self._host,
            config=weights.layout.config,
            cache_as=cache_quantization(
                policy, weights.layout.config, weights.layout.dtype
            ),
        )

    def _placed(
        self,
        kind: Kind,
        lanes: tuple[Lane, Lane],
        rows_of: Callable[[Any], PlacedRows],
    ) -> PlacedArrays:
        if kind not in self._stores:
            self._stores[kind] = self._tier_stores(kind)
        load_lane, store_lane = lanes
        return PlacedArrays(
            self._stores[kind],
            self._transport.lanes,
            load_lane=load_lane,
            store_lane=store_lane,
            rows_of=rows_of,
            gathered=self._gathered if kind is Kind.KV_CACHE else {},
        )

    def _tier_stores(self, kind: Kind) -> dict[Tier, TierStore]:
        ledger, link = self._transport.ledger, self._transport.link

        def lender(tier: Tier) -> Lender:
            is_attended = kind is Kind.KV_CACHE and self._routes[tier].on_host
            return self._host if is_attended and self._host is not None else link

        host = HostStore(ledger, kind, link, lender(Tier.HOST))
        if kind is Kind.KV_CACHE and self._routes[Tier.HOST].gathers:
            self._gathered = {Tier.HOST: host}
        stores: dict[Tier, TierStore] = {
            Tier.DEVICE: DeviceStore(ledger, kind),
            Tier.HOST: host,
        }
        if self._spill is not None:
            stores[Tier.DISK] = DiskStore(
                ledger,
                kind,
                link,
                self._transport.disk,
                self._spill.path,
                lender(Tier.DISK),
            )
        return stores


class _Steps:
    """Takes each batch's tokens when its next step is due, and times the steps."""

    def __init__(
        self, rows: BlockRows, stage: LayerStage, times: RunTimes, num_batches: int
    ) -> None:
        self._rows, self._stage, self._times = rows, stage, times
        self._taken = dict.fromkeys(range(num_batches), 0)  # steps, by batch
        self._ended: set[int] = set()  # batches
        times.begin_block()

    def alive(self, step: int, batch: int) -> bool:
        """Whether a batch lives to see a step; the schedule asks it once for each."""
        if step == 0:
            return True
        if batch not in self._ended:
            assert step == self._taken[batch] + 1, "a step was asked for twice"
            self._rows.take(batch, self._stage.outcome(batch))
            self._taken[batch] = step
            self._times.end_step(step)
            if not self._rows.is_alive(batch):
                self._ended.add(batch)
        return batch not in self._ended

    def end(self) -> None:
        """Takes the tokens of every batch's last step."""
        for batch, taken in self._taken.items():
            self.alive(taken + 1, batch)
        self._times.end_block()
