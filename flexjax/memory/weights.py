"""The weights on their tiers: resident tensors stay, the others come layer by layer."""

import concurrent.futures
import functools
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flexjax.checkpoint import WeightStore
from flexjax.extents import read_extent
from flexjax.memory.buffers import BufferPool, page_aligned, typed
from flexjax.memory.disk_queue import Urgency
from flexjax.memory.lanes import Lane
from flexjax.memory.layout import TOKEN_TABLE, WeightLayout
from flexjax.memory.link import Loan, Source
from flexjax.memory.transport import Transport
from flexjax.memory.widened import WidenedArrays
from flexjax.policy import Kind, Tier
from flexjax.quant import Quantization

Loans = dict[str, Loan]  # by the tensor's name


class PlacedWeights:
    """A weight store whose tensors have been given tiers.

    Tensors of the device and host tiers are read and verified when this is made; a
    tensor on disk is verified the first time it is read.
    """

    def __init__(
        self,
        store: WeightStore,
        layout: WeightLayout,
        *,
        transport: Transport,
        progress: Callable[[int], object] = lambda nbytes: None,
    ) -> None:
        self._store, self.layout = store, layout
        self._link, self._ledger = transport.link, transport.ledger
        self._lanes, self._disk = transport.lanes, transport.disk
        stage_tier = self._link.stage_tier
        make = self._link.host_memory
        self._stage = BufferPool(self._ledger, stage_tier, Kind.WEIGHTS, make)
        self._rows_stage = BufferPool(self._ledger, stage_tier, Kind.ACTIVATIONS, make)
        self._widened = WidenedArrays(self._link, self._ledger, Kind.WEIGHTS)
        self._widened_rows = WidenedArrays(self._link, self._ledger, Kind.ACTIVATIONS)
        self._verified: set[tuple[str, int]] = set()  # (tensor, first row of a piece)
        self._homes: list[str] = []  # tensors that are counted
        self._on_device: dict[str, jax.Array] = {}
        self._on_host: dict[str, np.ndarray] = {}
        for name, tier in layout.tiers.items():
            if tier is not Tier.DISK:
                self._read_resident(name, tier)
                progress(store.tensors[name].nbytes)
            self._homes.append(name)
            self._count_home(name, 1)

    def load(self, layer: int, part: int) -> Future[Loans]:
        """Starts to bring a part of a layer's tensors to the device.

        What lies on disk is asked for at once, so that the disk always knows what comes
        next, whatever the lane still waits for.
        """
        spans = self.layout.spans(layer, part)
        reads = self._start_reading(spans)
        name = f"layer {layer}" + (
            f", part {part}" if self.layout.num_parts > 1 else ""
        )
        brought = self._lanes.submit(Lane.WEIGHTS, self._load, name, spans, reads)
        if not any(map(self.layout.is_widened, spans)):
            return brought
        return self._lanes.submit(Lane.WIDEN, self._widen, name, brought)

    def token_rows(self, ids: np.ndarray) -> Loan:
        """Rows of the token table, `[*ids.shape, embed]`, wherever the table is."""
        loan = self._token_rows(ids)
        how = self._store.tensors[TOKEN_TABLE].quantization
        if how is None:
            return loan
        try:
            (wide,) = self._widened_rows.lend_all([(loan, how)])
        except BaseException:
            loan.release()
            raise
        return wide

    def _token_rows(self, ids: np.ndarray) -> Loan:
        """The same as they are stored."""
        name = TOKEN_TABLE
        if self.layout.tiers[name] is Tier.DEVICE:
            return Loan(jnp.take(self._on_device[name], jnp.asarray(ids), axis=0))
        entry = self._store.tensors[name]
        buffer = self._rows_stage.take(ids.size * entry.row_bytes)
        out = typed(buffer, (ids.size, entry.shape[1]), entry.dtype)
        try:
            self._gather(name, ids.reshape(-1), out)
        except BaseException:
            self._rows_stage.give(buffer)
            raise
        rows = out.reshape(*ids.shape, -1)
        return self._link.lend(
            rows, Kind.ACTIVATIONS, lambda: self._rows_stage.give(buffer)
        )

    def clear(self) -> None:
        """Gives back the stage buffers that are not lent."""
        self._stage.clear()
        self._rows_stage.clear()
        self._widened.clear()
        self._widened_rows.clear()

    def close(self) -> None:
        """Lets go of every tensor."""
        for name in self._homes:
            self._count_home(name, -1)
        self._homes.clear()
        self._on_device.clear()
        self._on_host.clear()
        self.clear()

    def _count_home(self, name: str, sign: int) -> None:
        nbytes = self._store.tensors[name].nbytes
        self._ledger.hold(self.layout.tiers[name], Kind.WEIGHTS, sign * nbytes)

    def _read_resident(self, name: str, tier: Tier) -> None:
        entry = self._store.tensors[name]
        make = self._link.host_memory if tier is Tier.HOST else page_aligned
        array = typed(make(entry.nbytes), entry.shape, entry.dtype)
        self._read(name, 0, array).result()
        self._store.verify(name, array)
        if tier is Tier.HOST:
            self._on_host[name] = array
        if tier is Tier.DEVICE or self._link.is_shared:  # the same memory, if it is
            self._on_device[name] = jax.device_put(array, self._link.device)

    def _gather(self, name: str, ids: np.ndarray, out: np.ndarray) -> None:
        """Fills `out[i]` with row `ids[i]` of a table that is not on the device."""
        if self.layout.tiers[name] is Tier.HOST:
            np.take(self._on_host[name], ids, axis=0, out=out, mode="clip")
            return
        entry = self._store.tensors[name]
        self._store.gather_rows(name, ids, out)
        rows, where = np.unique(ids, return_index=True)
        self._ledger.move(Tier.DISK, self._link.stage_tier, len(rows) * entry.row_bytes)
        if name == self.layout.config.head_table:
            return  # the head reads and verifies all of it before any token is known
        _, first = np.unique(rows // entry.chunk_rows, return_index=True)
        for row, at in zip(rows[first].tolist(), where[first].tolist(), strict=True):
            begin = row // entry.chunk_rows * entry.chunk_rows
            self._verify_once(name, begin, out[at : at + 1], row)

    def _load(
        self, name: str, spans: dict[str, slice], reads: "dict[str, _Read]"
    ) -> Loans:
        concurrent.futures.wait([read.done for read in reads.values()])
        with self._lanes.working(Lane.WEIGHTS, name):
            return self._bring(spans, reads)

    def _bring(self, spans: dict[str, slice], reads: "dict[str, _Read]") -> Loans:
        loans: Loans = {}
        try:
            for name in reads:
                self._finish_reading(name, spans[name], reads[name])
            sources = {
                name: self._source(name, rows, reads.get(name))
                for name, rows in spans.items()
                if self._is_lent(name, rows)
            }
            reads.clear()  # the link gives their buffers back from here on
            lent = self._link.lend_all([*sources.values()], Kind.WEIGHTS)
            loans |= zip(sources, lent, strict=True)
            # In the order of every layer, whatever lies where: one compilation for all.
            return {
                name: self._as_used(name, loans.get(name) or self._resident(name, rows))
                for name, rows in spans.items()
            }
        except BaseException:
            self._give_up(reads)
            for loan in loans.values():
                loan.release()
            raise

    def _as_used(self, name: str, loan: Loan) -> Loan:
        """A tensor as layers use it, if it is not to be made wide."""
        if self.layout.is_widened(name):
            return loan
        return Loan(self.layout.as_used(name, loan.array), loan.release)

    def _widen(self, name: str, brought: Future[Loans]) -> Loans:
        """Makes wide what is to be, once it has arrived.

        A device may run its calls in the order in which it gets them: one that waits
        for the link would hold up the layer before.
        """
        loans = brought.result()
        narrow: dict[str, tuple[Loan, Quantization]] = {}
        for tensor in filter(self.layout.is_widened, loans):
            how = self._store.tensors[tensor].quantization
            assert how is not None
            narrow[tensor] = loans[tensor], how
        try:
            jax.block_until_ready([loan.array for loan, _ in narrow.values()])
            with self._lanes.working(Lane.WIDEN, name):
                wide = self._widened.lend_all([*narrow.values()])
        except BaseException:
            for loan in loans.values():
                loan.release()
            raise
        return loans | dict(zip(narrow, wide, strict=True))

    def _start_reading(self, spans: dict[str, slice]) -> "dict[str, _Read]":
        reads: dict[str, _Read] = {}
        try:
            for name, rows in spans.items():
                if self.layout.tiers[name] is Tier.DISK:
                    entry, count = self._store.tensors[name], rows.stop - rows.start
                    nbytes = count * entry.row_bytes
                    most = self.layout.buffer_bytes(name, nbytes)
                    buffer = self._stage.take(nbytes, most_bytes=most)
                    array = typed(buffer, (count, *entry.shape[1:]), entry.dtype)
                    reads[name] = _Read(
                        buffer, array, self._read(name, rows.start, array)
                    )
        except BaseException:
            self._give_up(reads)
            raise
        return reads

    def _read(self, name: str, first: int, array: np.ndarray) -> Future[None]:
        return self._disk.submit(
            read_extent,
            self._store.extents(name, first, first + len(array), array),
            name=name,
            urgency=Urgency.AHEAD,
            describe=lambda error: self._store.failure(name, error),
        )

    def _give_up(self, reads: "dict[str, _Read]") -> None:
        for read in reads.values():
            read.done.exception()  # nothing may write into a buffer that is given
            self._stage.give(read.buffer)

    def _finish_reading(self, name: str, rows: slice, read: "_Read") -> None:
        read.done.result()
        self._ledger.move(Tier.DISK, self._link.stage_tier, read.array.nbytes)
        self._verify_once(name, rows.start, read.array, rows.start)

    def _verify_once(
        self, name: str, piece: int, array: np.ndarray, first_row: int
    ) -> None:
        """Verifies rows from `first_row` on, unless the piece at row `piece` was."""
        if (name, piece) not in self._verified:
            self._store.verify(name, array, first_row)
            self._verified.add((name, piece))

    def _is_lent(self, name: str, rows: slice) -> bool:
        """Whether rows of a tensor come from host memory, in which they may stay."""
        tier = self.layout.tiers[name]
        is_whole = rows == slice(0, self._store.tensors[name].shape[0])
        is_there = is_whole and name in self._on_device
        return tier is not Tier.DEVICE and not is_there

    def _source(self, name: str, rows: slice, read: "_Read | None") -> Source:
        """Rows of a tensor that is not on the device, in host memory."""
        if read is None:
            return Source(self._on_host[name][rows])
        return Source(read.array, functools.partial(self._stage.give, read.buffer))

    def _resident(self, name: str, rows: slice) -> Loan:
        array = self._on_device[name]
        is_whole = rows == slice(0, array.shape[0])
        return Loan(array if is_whole else array[rows])


class _Read(NamedTuple):
    """A read under way: the stage buffer, the same as a tensor, and its future."""

    buffer: np.ndarray
    array: np.ndarray
    done: Future[None]
