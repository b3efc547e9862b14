"""An engine whose policy was given, or is planned for the first job that it gets."""

import contextlib
import itertools
import logging
import pathlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from flexjax.checkpoint import WeightStore
from flexjax.engine import CLOSED, Engine
from flexjax.memory.layout import MOST_LAYERS_AHEAD
from flexjax.memory.link import Device
from flexjax.metrics import metrics_report
from flexjax.placement_report import placement_report
from flexjax.plan.auto import Choice, choose_policy
from flexjax.plan.predict import NOTHING, Job
from flexjax.plan.report import prediction_to_json
from flexjax.policy import Kind, Policy, Tier
from flexjax.sizes import format_bytes
from flexjax.store_format import TensorEntry
from flexjax.workload import bucket

logger = logging.getLogger(__name__)
# Opens what is told of the bytes that are loaded, given how many there will be.
Loading = Callable[[int], contextlib.AbstractContextManager[Callable[[int], object]]]


class PlannedEngine:
    """Makes an engine when it is known under which policy.

    Args of the constructor:
        store: the model's weights.
        policy: validated; None plans one for each job that asks for more than the last.
        device: that computes.
        offload_dir: where to make the spill folder.
        seed: of rows that have none of their own.
        keeps_spans: see `Engine`.
        loading: see `Loading`.

    Attributes:
        policy: of the engine; None before there is one.
        choice: how it was planned, if it was.
        placement: see `placement_report`; empty before there is an engine.
    """

    def __init__(
        self,
        store: WeightStore,
        policy: Policy | None,
        *,
        device: Device,
        offload_dir: pathlib.Path,
        seed: int,
        keeps_spans: bool,
        loading: Loading,
    ) -> None:
        self._store, self._device, self._offload_dir = store, device, offload_dir
        self._seed, self._keeps_spans, self._loading = seed, keeps_spans, loading
        self._is_auto, self._planned_for = policy is None, NOTHING
        self._lock, self._is_closed = threading.Lock(), False
        self._running_in: int | None = None  # the thread that holds the lock
        self._layers_ahead = MOST_LAYERS_AHEAD
        self.engine: Engine | None = None
        self.policy: Policy | None = None
        self.choice: Choice | None = None
        self.placement: dict[str, Any] = {}
        if policy is not None:
            self._start(policy)

    @contextlib.contextmanager
    def running(self, lengths: Sequence[int], gen_len: int) -> Iterator[Engine]:
        """The engine, under a policy that was given, or planned for as much as this.

        One block runs at a time, since a plan may replace the engine.

        Args:
            lengths: tokens of each prompt.
            gen_len: tokens to generate for each, at most.

        Raises:
            ValueError: nothing fits, or this is closed, or runs in this very thread.
            OSError: the disk failed.
            MemoryError: what was planned to fit does not; the message has the account.
        """
        job = _job(lengths, gen_len)
        with self._alone():
            if self._is_closed:
                raise ValueError(CLOSED)
            wanted = self._planned_for.joined(job)
            if self._is_auto and wanted != self._planned_for:
                self._plan(wanted)
            assert self.engine is not None
            try:
                yield self.engine
            except (MemoryError, jax.errors.JaxRuntimeError) as error:
                if self._is_auto and _is_shortage(error):
                    raise MemoryError(_account(self.engine)) from error
                raise

    def report(self, engine: Engine, lengths: Sequence[int], gen_len: int) -> dict:
        """The metrics of its last call, beside what was predicted of just that job."""
        report = metrics_report(engine.times, engine.ledger)
        plan = None if self.choice is None else self.choice.plan
        if plan is not None and plan.job == _job(lengths, gen_len):
            report["predicted"] = prediction_to_json(plan.prediction)
        return report

    def close(self) -> None:
        """Lets go of all memory and removes what was spilled; may be called again.

        Raises:
            ValueError: this runs in this very thread.
        """
        with self._alone():
            self._is_closed = True
            if self.engine is not None:
                self.engine.close()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Waits until no other thread runs this; one's own call would wait for ever."""
        thread = threading.get_ident()
        if self._running_in == thread:
            raise ValueError(
                "this model is running, and this call comes from inside of that run, "
                "as from on_tokens; make it when that run has ended, or raise to end it"
            )
        with self._lock:
            try:
                self._running_in = thread
                yield
            finally:
                self._running_in = None

    def _plan(self, job: Job) -> None:
        held = dict.fromkeys(Tier, 0)  # which is free for another policy
        if self.engine is not None:
            for tier, kind in itertools.product((Tier.DEVICE, Tier.HOST), Kind):
                held[tier] += self.engine.ledger.held(tier, kind)
        choice = choose_policy(
            self._store,
            job,
            device=self._device,
            offload_dir=self._offload_dir,
            held=held,
            progress=logger.warning,
        )
        # What was searched takes long, or is far from what a user would expect.
        level = logging.INFO if choice.plan is None else logging.WARNING
        logger.log(level, "%s", choice.reason)
        ahead = MOST_LAYERS_AHEAD if choice.plan is None else choice.plan.layers_ahead
        if (choice.policy, ahead) != (self.policy, self._layers_ahead):
            self._stop()
            self._start(choice.policy, ahead)
        self.choice, self._planned_for = choice, job

    def _stop(self) -> None:
        if self.engine is not None:
            self.engine.close()
        self.engine, self.policy, self.choice = None, None, None
        self.placement, self._planned_for = {}, NOTHING

    def _start(self, policy: Policy, layers_ahead: int = MOST_LAYERS_AHEAD) -> None:
        with self._loading(_resident_bytes(self._store.tensors, policy)) as update:
            self.engine = Engine(
                self._store,
                policy,
                offload_dir=self._offload_dir,
                device=self._device,
                seed=self._seed,
                on_weights=update,
                keeps_spans=self._keeps_spans,
                layers_ahead=layers_ahead,
            )
        self.policy, self._layers_ahead = policy, layers_ahead
        self.placement = placement_report(self.engine.weights.layout, policy)


def _is_shortage(error: Exception) -> bool:
    """Whether memory ran out, of the process or of the device."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def _account(engine: Engine) -> str:
    """What each tier held at most, and what had been predicted, by kind."""
    predicted = engine.times.predicted_peak
    tiers = []
    for tier in (Tier.DEVICE, Tier.HOST):
        kinds = ", ".join(
            f"{kind.value} {format_bytes(predicted.get((tier, kind), 0))}"
            for kind in Kind
        )
        tiers.append(
            f"{tier.value} {format_bytes(engine.ledger.peak(tier))} counted, with "
            f"workspaces {kinds} predicted"
        )
    return (
        "out of memory under a policy that was planned, which is a mistake of the plan "
        f"({'; '.join(tiers)}); give a policy with smaller batches, and report this"
    )


def _job(lengths: Sequence[int], gen_len: int) -> Job:
    return Job(
        prompt_len=bucket(max(lengths, default=1)),
        gen_len=gen_len,
        num_prompts=max(1, len(lengths)),
    )


def _resident_bytes(tensors: Mapping[str, TensorEntry], policy: Policy) -> int:
    """About what is read at the start; a bar may end a little early or late."""
    total = sum(entry.nbytes for entry in tensors.values())
    return round(total * (1.0 - policy.weights.disk))
