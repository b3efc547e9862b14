"""Token ids in, token ids out: runs blocks of prompts, each as a schedule."""

import contextlib
import dataclasses
import functools
import itertools
import pathlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from flexjax.blocks import GenerateRows, Row, RowSize, ScoreRows
from flexjax.checkpoint import WeightStore
from flexjax.memory.capacity import free_bytes, give_back_freed, shortage
from flexjax.memory.footprint import run_peak_bytes, weights_at_home
from flexjax.memory.layout import lay_out
from flexjax.memory.link import Device, processor_of
from flexjax.memory.transport import Transport
from flexjax.memory.weights import PlacedWeights
from flexjax.metrics import RunTimes
from flexjax.policy import Kind, Policy, Tier
from flexjax.preemption import Waiting
from flexjax.runner import BlockRunner
from flexjax.schedule.footprint import Bytes
from flexjax.workload import MOST_LAYERS_AHEAD, Workload, longest_first, looking_ahead

CLOSED = "this model is closed; make a new one to run it again"


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
        keeps_spans: whether `timeline` keeps everything that the last call did.

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
        keeps_spans: bool = False,
        layers_ahead: int = MOST_LAYERS_AHEAD,
    ) -> None:
        self.config, self.policy, self._seed = store.config, policy, seed
        self._running, self._closed = threading.Lock(), False
        self._layers_ahead = layers_ahead
        self._device, self._offload_dir = device, offload_dir
        processor = processor_of(device, is_quantized=store.quantization is not None)
        self._device_is_host = processor.is_host
        layout = lay_out(
            store.config, store.dtype, store.tensors, policy, processor=processor
        )
        homes = weights_at_home(layout)
        del homes[Tier.DISK, Kind.WEIGHTS]  # where the store is already
        if refusal := self._shortage(homes):
            raise ValueError(refusal)
        with contextlib.ExitStack() as undo:
            self._transport = Transport(device, keeps_spans=keeps_spans)
            undo.callback(self._transport.close)
            self.ledger, self.timeline = (
                self._transport.ledger,
                self._transport.timeline,
            )
            self.times = RunTimes(self.ledger, self.timeline)
            self._runner = BlockRunner(policy, self._transport, offload_dir)
            undo.callback(self._runner.close)
            self.weights = PlacedWeights(
                store,
                layout,
                transport=self._transport,
                progress=on_weights,
            )
            self._undo = undo.pop_all()

    def generate(
        self, rows: Sequence[Row], on_tokens: Callable[[int], None] = lambda count: None
    ) -> None:
        """Runs every row to its end; the rows keep their tokens.

        Raises: as `generate_blocks`.
        """
        self.generate_blocks(
            [row.size for row in rows],
            lambda places: [rows[place] for place in places],
            on_tokens=on_tokens,
        )

    def generate_blocks(
        self,
        sizes: Sequence[RowSize],
        make_rows: Callable[[Sequence[int]], Sequence[Row]],
        *,
        on_rows: Callable[[Sequence[Row]], object] = lambda rows: None,
        on_tokens: Callable[[int], None] = lambda count: None,
        may_preempt: bool = True,
        num_common: int = 0,
    ) -> None:
        """Runs rows that are there until they have ended.

        Rows are sorted by length, so that those of about the same length share a block.
        Those that outlive most of their block go on in another (see `Waiting`).

        Args:
            sizes: of all rows.
            make_rows: makes the rows of a block, given their places in `sizes`.
            on_rows: called when a block ends, with its rows that have ended.
            on_tokens: called whenever a batch has tokens, with their number.
            may_preempt: whether rows may go on in another block; else each block takes
                as long as its last row.
            num_common: tokens with which all prompts begin, fewer than any has; where
                attention can share them, they are computed once a block.

        Raises:
            ValueError: the policy does not fit.
            OSError: a transfer failed; the message names what and where.
        """
        places = longest_first([size.prompt_len for size in sizes])
        blocks = _blocks(places, self.policy)
        workload = functools.partial(self._workload, num_common=num_common)
        works = [workload([sizes[place] for place in block]) for block in blocks]
        num_shared = num_common if any(work.prefix_len for work in works) else 0

        def count(num_tokens: int) -> None:
            self.times.num_tokens += num_tokens
            on_tokens(num_tokens)

        with self._call(works, scores=False) as layers_ahead:
            self.times.num_shared = num_shared
            planned = {looking_ahead(work, layers_ahead) for work in works}
            waiting = Waiting(
                blocks,
                make_rows,
                policy=self.policy,
                num_shared=num_shared,
                fits=self._fits_room(
                    sizes, functools.partial(workload, layers_ahead=layers_ahead)
                ),
                may_preempt=may_preempt,
            )
            while rows := waiting.next_block():
                work = workload([row.size for row in rows], layers_ahead=layers_ahead)
                if work not in planned:
                    self._clear()  # what is kept of other sizes is not reckoned with
                    self.times.expect(self.predict(work, scores=False))
                sampler = GenerateRows(
                    rows,
                    work,
                    self.weights.layout,
                    num_shared=num_shared,
                    seed=self._seed,
                    ledger=self.ledger,
                    on_tokens=count,
                    is_worth_preempting=waiting.is_worth_preempting,
                )
                self._runner.run(work, sampler, self.weights, self.times)
                if work not in planned:
                    self._clear()
                self.times.num_preemptions += waiting.preempt(rows)
                on_rows([row for row in rows if row.has_ended])

    def score(
        self,
        sequences: Sequence[Sequence[int]],
        on_tokens: Callable[[int], None] = lambda count: None,
        *,
        num_common: int = 0,
    ) -> list[np.ndarray]:
        """For each sequence, log p(token t+1 | tokens up to t), `[length - 1]`.

        With `num_common`, one token more than these begins all sequences, and they are
        scored once a block, as `generate_blocks` computes them once.

        Raises:
            ValueError: as `generate`; or attention is sparse.
            OSError: as `generate`.
        """
        if self.policy.attention_sparsity < 1:
            raise ValueError(
                f"attention_sparsity={self.policy.attention_sparsity!r} acts on new "
                "tokens alone, so scores would not say what generating would: score "
                "with attention_sparsity=1.0"
            )
        lengths = [len(sequence) for sequence in sequences]
        blocks = _blocks(longest_first(lengths), self.policy)
        sizes = [[RowSize(lengths[place], 1) for place in block] for block in blocks]
        workload = functools.partial(
            self._workload, num_common=num_common, scores_prefix=True
        )
        works = [workload(each) for each in sizes]
        num_shared = num_common if any(work.prefix_len for work in works) else 0
        results: dict[int, np.ndarray] = {}
        with self._call(works, scores=True) as layers_ahead:
            self.times.num_shared = num_shared
            for block, each in zip(blocks, sizes, strict=True):
                work = workload(each, layers_ahead=layers_ahead)
                chosen = [sequences[i] for i in block]
                layout = self.weights.layout
                rows = ScoreRows(chosen, work, layout, num_shared=num_shared)
                self._runner.run(work, rows, self.weights, self.times)
                results.update(zip(block, rows.results(), strict=True))
                on_tokens(sum(lengths[i] for i in block))
        return [results[i] for i in range(len(sequences))]

    def predict(self, work: Workload, *, scores: bool) -> dict[tuple[Tier, Kind], int]:
        """Peak bytes of a run, by tier and kind, workspaces included."""
        return run_peak_bytes(work, self.policy, self.weights.layout, scores=scores)

    def close(self) -> None:
        """Ends the threads, lets go of all memory and removes what was spilled."""
        with self._running:
            self._closed = True
            self._undo.close()
            self.weights.close()

    def _workload(
        self,
        sizes: Sequence[RowSize],
        *,
        layers_ahead: int = MOST_LAYERS_AHEAD,
        num_common: int = 0,
        scores_prefix: bool = False,
    ) -> Workload:
        """A block of rows of such sizes, which begin with so many equal tokens."""
        work = self.weights.layout.workload(
            self.policy,
            prompt_len=max(size.prompt_len for size in sizes) - num_common,
            gen_len=max(size.max_tokens for size in sizes),
            num_rows=len(sizes),
            num_shared=num_common,
        )
        ahead = looking_ahead(work, layers_ahead)
        return dataclasses.replace(ahead, scores_prefix=scores_prefix)

    def _fits_room(
        self,
        sizes: Sequence[RowSize],
        workload: Callable[[Sequence[RowSize]], Workload],
    ) -> Callable[[Sequence[RowSize]], bool]:
        """Tells whether a block needs no more memory than a call may take.

        It may take what its blocks need, or if that was free when it began, also what
        one needs whose prompts have become as long as they can. So nothing else that
        goes on meanwhile changes what comes out.
        """
        free = Counter(free_bytes(self._device, self._offload_dir))
        for tier, kind in itertools.product(Tier, Kind):
            free[self._memory(tier)] += self.ledger.held(tier, kind)
        planned = Counter(self.times.predicted_peak)
        num_rows = min(len(sizes), self.policy.block_size)

        @functools.cache
        def room() -> Counter[Tier]:
            most = max(sum(size) for size in sizes)
            longest = workload([RowSize(most, 1)] * num_rows)
            hoped = planned | Counter(self.predict(longest, scores=False))
            is_free = shortage(hoped, free, device_is_host=self._device_is_host) is None
            found: Counter[Tier] = Counter()
            for (tier, _), nbytes in (hoped if is_free else planned).items():
                found[self._memory(tier)] += nbytes
            return found

        @functools.cache
        def fits(work: Workload) -> bool:
            peak = self.predict(work, scores=False)
            return shortage(peak, room(), device_is_host=self._device_is_host) is None

        return lambda sizes: fits(workload(sizes))

    def _memory(self, tier: Tier) -> Tier:
        """The tier that stands for the memory of one, which may be that of two."""
        return Tier.DEVICE if tier is Tier.HOST and self._device_is_host else tier

    def _start(self, works: Sequence[Workload], *, scores: bool) -> int:
        """Refuses a call that does not fit before it does.

        Returns:
            Layers to look ahead: as many as memory allows.
        """
        self._transport.start()
        refusal: str | None = None
        for layers_ahead in range(self._layers_ahead, 0, -1):
            ahead = [looking_ahead(work, layers_ahead) for work in works]
            peak = Counter(weights_at_home(self.weights.layout))
            for work in dict.fromkeys(ahead):
                peak |= Counter(self.predict(work, scores=scores))
            refusal = self._shortage(
                {key: peak[key] - self.ledger.held(*key) for key in peak}
            )
            if refusal is None:
                self.times = RunTimes(self.ledger, self.timeline, dict(peak))
                return layers_ahead
        raise ValueError(refusal)

    def _shortage(self, needed: Bytes) -> str | None:
        """What is not free of `needed`, even if all that was freed is given back."""
        if self._not_free(needed) is None:
            return None
        give_back_freed()
        return self._not_free(needed)

    def _not_free(self, needed: Bytes) -> str | None:
        free = free_bytes(self._device, self._offload_dir)
        return shortage(needed, free, device_is_host=self._device_is_host)

    @contextlib.contextmanager
    def _call(self, works: Sequence[Workload], *, scores: bool) -> Iterator[int]:
        """Keeps buffers from block to block of a call, and gives them back in the end.

        Yields how many layers its works look ahead.

        Raises:
            ValueError: the engine is closed, or one of the blocks does not fit.
        """
        with self._running:
            if self._closed:
                raise ValueError(CLOSED)
            layers_ahead = self._start(works, scores=scores)
            try:
                yield layers_ahead
            finally:
                self._clear()

    def _clear(self) -> None:
        """Gives back the buffers that are kept from block to block."""
        self.weights.clear()
        self._runner.clear()


def _blocks[T](rows: Sequence[T], policy: Policy) -> list[Sequence[T]]:
    size = policy.block_size
    return [rows[first : first + size] for first in range(0, len(rows), size)]
