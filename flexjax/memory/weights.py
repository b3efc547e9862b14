"""The weights on their tiers: resident tensors stay, the others come layer by layer."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flexjax.checkpoint import WeightStore
from flexjax.memory.buffers import BufferPool, page_aligned, typed
from flexjax.memory.lanes import Lane, Lanes
from flexjax.memory.ledger import Ledger
from flexjax.memory.link import DeviceLink, Loan
from flexjax.memory.placement import partition
from flexjax.models.config import OPTConfig, layer_tensors
from flexjax.policy import Kind, Tier


class HeadBlocks(NamedTuple):
    """How the table of logits is cut into blocks of rows."""

    num_blocks: int
    rows: int  # of every block but the last

    def span(self, block: int, vocab_size: int) -> slice:
        return slice(block * self.rows, min((block + 1) * self.rows, vocab_size))


Loans = dict[str, Loan]  # by the tensor's name


class PlacedWeights:
    """A weight store whose tensors have been given tiers.

    Tensors of the device and host tiers are read and verified when this is made; a
    tensor on disk is verified the first time it is read.
    """

    def __init__(
        self,
        store: WeightStore,
        tiers: Mapping[str, Tier],
        *,
        link: DeviceLink,
        ledger: Ledger,
        lanes: Lanes,
        head: HeadBlocks,
        num_parts: int,
        progress: Callable[[int], None] = lambda nbytes: None,
    ) -> None:
        self._store, self._tiers, self._link = store, tiers, link
        self._ledger, self._lanes = ledger, lanes
        self._head, self._num_parts = head, num_parts
        self._stage = BufferPool(ledger, link.stage_tier, Kind.WEIGHTS)
        self._rows_stage = BufferPool(ledger, link.stage_tier, Kind.ACTIVATIONS)
        self._verified: set[str] = set()
        self._on_device: dict[str, jax.Array] = {}
        self._on_host: dict[str, np.ndarray] = {}
        for name, tier in tiers.items():
            if tier is not Tier.DISK:
                self._read_resident(name, tier)
                progress(store.tensors[name].nbytes)

    @property
    def config(self) -> OPTConfig:
        return self._store.config

    def load(self, layer: int, part: int) -> Future[Loans]:
        """Starts to bring a part of a layer's tensors to the device."""
        num_decoder = self.config.num_hidden_layers
        if layer >= num_decoder:
            rows = self._head.span(layer - num_decoder, self.config.vocab_size)
            task = self._load_head if part == 0 else _load_nothing
            return self._lanes.submit(Lane.WEIGHTS, task, rows)
        names = parts_of_layer(self._store, layer, self._num_parts)[part]
        return self._lanes.submit(Lane.WEIGHTS, self._load, names)

    def token_rows(self, ids: np.ndarray) -> Loan:
        """Rows of the token table, `[*ids.shape, embed]`, wherever the table is."""
        name = "embed_tokens.weight"
        if self._tiers[name] is Tier.DEVICE:
            return Loan(jnp.take(self._on_device[name], jnp.asarray(ids), axis=0))
        entry = self._store.tensors[name]
        buffer = self._rows_stage.take(ids.size * entry.row_bytes)
        out = typed(buffer, (ids.size, entry.shape[1]), entry.dtype)
        if self._tiers[name] is Tier.HOST:
            np.take(self._on_host[name], ids.reshape(-1), axis=0, out=out, mode="clip")
        else:
            self._store.gather_rows(name, ids, out)
            distinct = len(np.unique(ids)) * entry.row_bytes
            self._ledger.move(Tier.DISK, self._link.stage_tier, distinct)
        rows = out.reshape(*ids.shape, -1)
        return self._link.lend(
            rows, Kind.ACTIVATIONS, lambda: self._rows_stage.give(buffer)
        )

    def close(self) -> None:
        """Lets go of every tensor."""
        for tier, tensors in (
            (Tier.DEVICE, self._on_device),
            (Tier.HOST, self._on_host),
        ):
            for array in tensors.values():
                self._ledger.hold(tier, Kind.WEIGHTS, -array.nbytes)
            tensors.clear()
        self._stage.clear()

    def _read_resident(self, name: str, tier: Tier) -> None:
        entry = self._store.tensors[name]
        array = typed(page_aligned(entry.nbytes), entry.shape, entry.dtype)
        self._store.read(name, array).result()
        self._store.verify(name, array)
        if tier is Tier.HOST:
            self._on_host[name] = array
        else:
            self._on_device[name] = jax.device_put(array, self._link.device)
        self._ledger.hold(tier, Kind.WEIGHTS, entry.nbytes)

    def _load(self, names: list[str]) -> Loans:
        """All reads of a part are under way at once; the disk orders them."""
        reads = {
            name: self._start_reading(name)
            for name in names
            if self._tiers[name] is Tier.DISK
        }
        try:
            for name, (_, array, reading) in reads.items():
                reading.result()
                self._count(array)
                if name not in self._verified:
                    self._store.verify(name, array)
                    self._verified.add(name)
        except BaseException:
            for buffer, _, reading in reads.values():
                reading.exception()  # nothing may write into a buffer that was given
                self._stage.give(buffer)
            raise
        return {
            name: self._lend(reads[name]) if name in reads else self._resident(name)
            for name in names
        }

    def _load_head(self, rows: slice) -> Loans:
        name = self.config.head_table
        if self._tiers[name] is not Tier.DISK:
            return {name: self._resident(name, rows)}
        read = self._start_reading(name, rows)
        buffer, array, reading = read
        try:
            reading.result()
        except BaseException:
            self._stage.give(buffer)
            raise
        self._count(array)
        return {name: self._lend(read)}

    def _start_reading(self, name: str, rows: slice | None = None) -> "_Read":
        entry = self._store.tensors[name]
        first, last = (0, entry.shape[0]) if rows is None else (rows.start, rows.stop)
        buffer = self._stage.take((last - first) * entry.row_bytes)
        array = typed(buffer, (last - first, *entry.shape[1:]), entry.dtype)
        return _Read(buffer, array, self._store.read_rows(name, first, last, array))

    def _lend(self, read: "_Read") -> Loan:
        return self._link.lend(
            read.array, Kind.WEIGHTS, lambda: self._stage.give(read.buffer)
        )

    def _resident(self, name: str, rows: slice = slice(None)) -> Loan:
        if self._tiers[name] is Tier.HOST:
            return self._link.lend(self._on_host[name][rows], Kind.WEIGHTS)
        array = self._on_device[name]
        whole = rows.start in (None, 0) and rows.stop in (None, array.shape[0])
        return Loan(array if whole else array[rows])

    def _count(self, array: np.ndarray) -> None:
        self._ledger.move(Tier.DISK, self._link.stage_tier, array.nbytes)


class _Read(NamedTuple):
    """A read under way: the stage buffer, the same as a tensor, and its future."""

    buffer: np.ndarray
    array: np.ndarray
    done: Future[None]


def parts_of_layer(store: WeightStore, layer: int, num_parts: int) -> list[list[str]]:
    """Names of the tensors of a decoder layer, cut into parts of about equal size."""
    names = layer_tensors(store.config, layer)
    return partition({name: store.tensors[name].nbytes for name in names}, num_parts)


def _load_nothing(rows: slice) -> Loans:
    """A part of a vocabulary block beyond the first, which holds it all."""
    del rows
    return {}

