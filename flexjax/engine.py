"""Token ids in, token ids out: runs blocks of prompts, each as a schedule."""

import contextlib
import dataclasses
import functools
import pathlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from flexjax.arrangement import Block, Group, blocks_of, one_block, row_length
from flexjax.blocks import GenerateRows, Row, RowSize
from flexjax.checkpoint import WeightStore
from flexjax.memory.footprint import weights_at_home
from flexjax.memory.layout import lay_out
from flexjax.memory.link import Device, processor_of
from flexjax.memory.most_bytes import most_peak_bytes
from flexjax.memory.room import Room
from flexjax.memory.routes import shares_prefixes
from flexjax.memory.transport import Transport
from flexjax.memory.weights import PlacedWeights
from flexjax.metrics import RunTimes
from flexjax.outputs import Scores
from flexjax.policy import Kind, Policy, Tier
from flexjax.preemption import Waiting
from flexjax.runner import BlockRunner
from flexjax.schedule.footprint import Bytes
from flexjax.score_rows import ScoreRows, num_scored_inputs, scored_rows
from flexjax.workload import MOST_LAYERS_AHEAD, Workload, looking_ahead

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
        processor = processor_of(device, is_quantized=store.quantization is not None)
        self._device_is_host = processor.is_host
        layout = lay_out(
            store.config, store.dtype, store.tensors, policy, processor=processor
        )
        homes = weights_at_home(layout)
        del homes[Tier.DISK, Kind.WEIGHTS]  # where the store is already
        with contextlib.ExitStack() as undo:
            self._transport = Transport(device, keeps_spans=keeps_spans)
            undo.callback(self._transport.close)
            self.ledger, self.timeline = (
                self._transport.ledger,
                self._transport.timeline,
            )
            self.times = RunTimes(self.ledger, self.timeline)
            self._room = Room(
                device, offload_dir, self.ledger, device_is_host=processor.is_host
            )
            if refusal := self._room.shortage(homes):
                raise ValueError(refusal)
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
        groups: Sequence[Group] = (),
    ) -> None:
        """Runs rows that are there until they have ended.

        Rows are sorted, so that those that begin alike, and of these such of about the
        same length, share a block (see `blocks_of`).
        Those that outlive most of their block go on in another (see `Waiting`).

        Args:
            sizes: of all rows.
            make_rows: makes the rows of a block, given their places in `sizes`.
            on_rows: called when a block ends, with its rows that have ended.
            on_tokens: called whenever a batch has tokens, with their number.
            may_preempt: whether rows may go on in another block; else each block takes
                as long as its last row.
            groups: of rows whose prompts begin alike, with fewer tokens than any has;
                where attention can share these, they are computed once a block. Every
                row is in one of them, if there are any.

        Raises:
            ValueError: the policy does not fit.
            OSError: a transfer failed; the message names what and where.
        """
        groups = self._sharing(groups, len(sizes))
        blocks = blocks_of(groups, [size.prompt_len for size in sizes], self.policy)
        works = [
            self._workload(block.of([sizes[i] for i in block.rows])) for block in blocks
        ]
        num_shared = groups[0].num_shared if len(groups) == 1 else 0

        def alike(sizes: Sequence[RowSize], **ahead: int) -> Workload:
            """Of rows that are preempted, whatever their group."""
            return self._workload(one_block(sizes, self.policy, num_shared), **ahead)

        def count(num_tokens: int) -> None:
            self.times.num_tokens += num_tokens
            on_tokens(num_tokens)

        with self._call(works, scores=False) as layers_ahead:
            planned = {looking_ahead(work, layers_ahead) for work in works}
            waiting = Waiting(
                blocks,
                make_rows,
                policy=self.policy,
                num_shared=num_shared,
                fits=self._fits_room(
                    sizes, functools.partial(alike, layers_ahead=layers_ahead)
                ),
                may_preempt=may_preempt,
            )
            while block := waiting.next_block():
                rows = block.rows
                work = self._workload(
                    block.of([row.size for row in rows]), layers_ahead=layers_ahead
                )
                if work not in planned:
                    self._clear()  # what is kept of other sizes is not reckoned with
                    self.times.expect(self.predict(work, scores=False))
                sampler = GenerateRows(
                    block,
                    work,
                    self.weights.layout,
                    seed=self._seed,
                    ledger=self.ledger,
                    on_tokens=count,
                    is_worth_preempting=waiting.is_worth_preempting,
                )
                self._runner.run(work, sampler, self.weights, self.times)
                if work not in planned:
                    self._clear()
                self.times.num_shared += block.num_spared
                self.times.num_preemptions += waiting.preempt(rows)
                on_rows([row for row in rows if row.has_ended])

    def score(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """For each sequence, log p(token t+1 | tokens up to t), `[length - 1]`.

        Raises: as `score_blocks`.
        """
        scores: dict[int, Scores] = {}
        alone = [Group(0, [place]) for place in range(len(sequences))]
        self.score_blocks(sequences, alone, scores.update)
        return [scores[place].logprobs for place in range(len(sequences))]

    def score_blocks(
        self,
        sequences: Sequence[Sequence[int]],
        rows: Sequence[Group],
        on_scores: Callable[[dict[int, Scores]], object],
        *,
        groups: Sequence[Group] = (),
    ) -> None:
        """Scores sequences, of which a row may hold several that begin alike.

        Args:
            rows: of sequences that are to be scored, see `ScoredRow`.
            on_scores: called when a block ends, with the scores of its sequences, by
                their places.
            groups: of places in `rows`, as of `generate_blocks`; one token more than a
                group shares begins all its inputs, and its rows share no fewer.

        Raises:
            ValueError, OSError: as `generate`; or attention is sparse.
        """
        scored = scored_rows(sequences, rows, self.policy)
        each = list(map(num_scored_inputs, sequences))
        lengths = [row_length(row, each) for row in rows]
        groups = self._sharing(groups, len(rows))
        blocks = blocks_of(groups, lengths, self.policy)
        works = [
            dataclasses.replace(
                self._workload(block.of([RowSize(lengths[i], 1) for i in block.rows])),
                scores_prefixes=True,
            )
            for block in blocks
        ]
        with self._call(works, scores=True) as layers_ahead:
            for block, work in zip(blocks, works, strict=True):
                ahead = looking_ahead(work, layers_ahead)
                chosen = [scored[i] for i in block.rows]
                running = ScoreRows(block.of(chosen), ahead, self.weights.layout)
                self._runner.run(ahead, running, self.weights, self.times)
                self.times.num_shared += block.num_spared
                self.times.num_shared += sum(row.num_spared for row in chosen)
                places = [place for i in block.rows for place in rows[i].places]
                on_scores(dict(zip(places, running.results(), strict=True)))

    def predict(self, work: Workload, *, scores: bool) -> dict[tuple[Tier, Kind], int]:
        """Peak bytes of a run, by tier and kind, workspaces included."""
        layout = self.weights.layout
        return dict(most_peak_bytes([work], self.policy, layout, scores=scores))

    def close(self) -> None:
        """Ends the threads, lets go of all memory and removes what was spilled."""
        with self._running:
            self._closed = True
            self._undo.close()
            self.weights.close()

    def _workload(
        self,
        block: Block[RowSize],
        *,
        layers_ahead: int = MOST_LAYERS_AHEAD,
    ) -> Workload:
        """A block of rows of such sizes."""
        prompt_lens = [
            max(size.prompt_len for size in batch) - block.shared_by(number)
            for number, batch in enumerate(block.batches)
        ]
        work = self.weights.layout.workload(
            self.policy,
            block.shape,
            prompt_len=max(prompt_lens),
            prompt_lens=prompt_lens,
            gen_len=max(size.max_tokens for size in block.rows),
            num_shared=max(block.num_shared),
        )
        return looking_ahead(work, layers_ahead)

    def _sharing(self, groups: Sequence[Group], num_rows: int) -> Sequence[Group]:
        """Groups that are heeded: all rows as one where attention cannot share."""
        if groups and shares_prefixes(self.policy, device_is_host=self._device_is_host):
            return groups
        return [Group(0, range(num_rows))]

    def _fits_room(
        self,
        sizes: Sequence[RowSize],
        workload: Callable[[Sequence[RowSize]], Workload],
    ) -> Callable[[Sequence[RowSize]], bool]:
        """Tells whether a block needs no more memory than a call may take.

        It may take what its blocks need, or if that is free, also what one needs whose
        prompts have become as long as they can.
        """

        def longest() -> Bytes:
            most = RowSize(max(sum(size) for size in sizes), 1)
            rows = [most] * min(len(sizes), self.policy.block_size)
            return self.predict(workload(rows), scores=False)

        takes = self._room.still_takes(self.times.predicted_peak, longest)

        @functools.cache
        def fits(work: Workload) -> bool:
            return takes(self.predict(work, scores=False))

        return lambda sizes: fits(workload(sizes))

    def _start(self, works: Sequence[Workload], *, scores: bool) -> int:
        """Refuses a call that does not fit before it does.

        Returns:
            Layers to look ahead: as many as memory allows.
        """
        self._transport.start()
        layout = self.weights.layout
        refusal: str | None = None
        for layers_ahead in range(self._layers_ahead, 0, -1):
            ahead = [looking_ahead(work, layers_ahead) for work in works]
            peak = Counter(weights_at_home(layout))
            peak |= most_peak_bytes(ahead, self.policy, layout, scores=scores)
            refusal = self._room.shortage(self._room.beyond_held(peak))
            if refusal is None:
                self.times = RunTimes(self.ledger, self.timeline, dict(peak))
                return layers_ahead
        raise ValueError(refusal)

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
