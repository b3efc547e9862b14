"""An engine whose policy was given, or is planned for the first job that it gets."""

import contextlib
import functools
import itertools
import logging
import math
import pathlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from flexjax.arrangement import Group, within
from flexjax.checkpoint import WeightStore
from flexjax.engine import CLOSED, Engine
from flexjax.memory.capacity import give_back_freed
from flexjax.memory.lanes import Span
from flexjax.memory.link import Device
from flexjax.metrics import (
    is_shortage,
    joined_reports,
    metrics_report,
    shortage_report,
)
from flexjax.placement_report import placement_report
from flexjax.plan.auto import Choice, choose_policies, on_device
from flexjax.plan.job import NOTHING
from flexjax.plan.parts import Asked, asks
from flexjax.plan.predict import Prediction, combined
from flexjax.plan.report import format_seconds, prediction_to_json
from flexjax.policy import Kind, Policy, Tier, to_json
from flexjax.store_format import TensorEntry
from flexjax.workload import MOST_LAYERS_AHEAD, longest_first

logger = logging.getLogger(__name__)
# Opens what is told of the bytes that are loaded, given how many there will be.
Loading = Callable[[int], contextlib.AbstractContextManager[Callable[[int], object]]]


class PlannedEngine:
    """Makes an engine when it is known under which policy.

    Args of the constructor:
        store: the model's weights.
        policy: validated; None plans for each job that asks for more than the last.
        device: that computes.
        offload_dir: where to make the spill folder.
        seed: of rows that have none of their own.
        keeps_spans: see `Engine`.
        loading: see `Loading`.

    Attributes:
        is_auto: whether policies are planned.
        policy: of the engine; None before there is one.
        choice: how it was planned, if it was.
        spans: what every lane did in the last run; empty unless they are kept.
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
        self.is_auto, self._planned_for = policy is None, NOTHING
        self._lock, self._is_closed = threading.Lock(), False
        self._running_in: int | None = None  # the thread that holds the lock
        self._chosen_for: Asked | None = None  # the longest first
        self._was_cut = False  # into parts, when it was planned last
        self.spans: list[Span] = []
        self._layers_ahead = MOST_LAYERS_AHEAD
        self.engine: Engine | None = None
        self.policy: Policy | None = None
        self.choice: Choice | None = None
        self.placement: dict[str, Any] = {}
        if policy is not None:
            self._start(policy)

    def run(
        self,
        lengths: Sequence[int],
        gen_len: int,
        run: Callable[[Engine, Sequence[int], list[Group]], object],
        *,
        groups: Sequence[Group],
        most_block_s: float = math.inf,
    ) -> dict[str, Any]:
        """Runs prompts under the policy that was given, or under what is planned.

        One call runs at a time, since a plan may replace the engine.

        Args:
            lengths: tokens of each prompt.
            gen_len: tokens to generate for each, at most.
            run: called with the engine, the places in `lengths` of what it is to run,
                and the groups of these: once, or once for each plan, those that share
                nothing first, and of both the longest prompts.
            groups: of all prompts.
            most_block_s: seconds that a block may take where policies are searched.

        Returns:
            The metrics, and what was predicted if just these prompts were planned for.

        Raises:
            ValueError: nothing fits, or this is closed, or runs in this very thread.
            OSError: the disk failed.
            MemoryError: what was planned to fit does not; the message has the account.
        """
        whole = Asked(lengths, gen_len, most_block_s=most_block_s)
        wanted = [(whole, range(len(lengths)))]
        reports: list[dict[str, Any]] = []
        parts: list[dict[str, Any]] = []
        predictions: list[tuple[float, Prediction]] = []
        with self._alone():
            if self._is_closed:
                raise ValueError(CLOSED)
            self.spans = []
            if self.is_auto:
                wanted = self._wanted(whole, groups)
            for asked, chosen in self._parts(wanted):
                assert self.engine is not None
                assert self.policy is not None
                places, engine = list(chosen), self.engine
                alike = within(groups, places)
                self._run_part(functools.partial(run, engine, places, alike), engine)
                reports.append(metrics_report(engine.times, engine.ledger))
                what = {"num_prompts": len(places), "policy": to_json(self.policy)}
                parts.append(what | reports[-1])
                if prediction := self._prediction_of(asked):
                    predictions.append((1.0, prediction))
        report = joined_reports(reports)
        if len(parts) > 1:
            report["parts"] = parts
        if len(predictions) == len(reports):
            report["predicted"] = prediction_to_json(combined(predictions))
        return report

    def _wanted(
        self, whole: Asked, groups: Sequence[Group]
    ) -> list[tuple[Asked, Sequence[int]]]:
        """What is planned apart, unless all prompts fit on the device with the model.

        Then one policy serves all, and nothing has to be loaded anew.
        """
        lengths = whole.lengths
        apart = asks(lengths, whole.gen_len, groups, whole.most_block_s)
        if len(apart) > 1 and on_device(
            self._store,
            whole,
            device=self._device,
            offload_dir=self._offload_dir,
            held=self._held(),
        ):
            return [(whole, range(len(lengths)))]
        return apart

    def _prediction_of(self, asked: Asked) -> Prediction | None:
        """What was predicted of just these prompts, if they were planned for."""
        plan = None if self.choice is None else self.choice.plan
        in_order = asked._replace(lengths=sorted(asked.lengths, reverse=True))
        return plan.prediction if plan and in_order == self._chosen_for else None

    def _run_part(self, run: Callable[[], object], engine: Engine) -> None:
        before = engine.timeline.spans
        try:
            run()
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            if self.is_auto and is_shortage(error):
                raise MemoryError(
                    shortage_report(engine.times, engine.ledger)
                ) from error
            raise
        finally:
            if engine.timeline.spans is not before:  # else it was refused
                self.spans += engine.timeline.spans

    def _parts(
        self, wanted: Sequence[tuple[Asked, Sequence[int]]]
    ) -> Iterator[tuple[Asked, Sequence[int]]]:
        """What runs under one policy, and its places, each when the engine has it."""
        for asked, places in wanted:
            for chosen in self._parts_of(asked, is_one_of_many=len(wanted) > 1):
                lengths = [asked.lengths[number] for number in chosen]
                yield (
                    asked._replace(lengths=lengths),
                    [places[number] for number in chosen],
                )

    def _parts_of(
        self, asked: Asked, *, is_one_of_many: bool
    ) -> Iterator[Sequence[int]]:
        """The parts of prompts that are planned for together."""
        lengths, most_block_s = asked.lengths, asked.most_block_s
        if not most_block_s > 0:
            raise ValueError(
                f"block_latency_s is {most_block_s!r}, expected more than 0 seconds"
            )
        if math.isfinite(most_block_s):
            if not self.is_auto:
                raise ValueError(
                    "block_latency_s bounds what is planned, but there is a policy; "
                    "leave out one of them"
                )
            yield from self._cut(asked, is_one_of_many=is_one_of_many)
            return
        job = asked.job
        wanted = self._planned_for.joined(job)
        if not self.is_auto or wanted == self._planned_for:
            yield range(len(lengths))
        elif wanted == job or self._was_cut or is_one_of_many:
            yield from self._cut(asked, is_one_of_many=is_one_of_many)
        else:  # what was asked for before may be again
            several = Asked(
                [wanted.prompt_len] * wanted.num_prompts,
                wanted.gen_len,
                wanted.num_shared,
                wanted.rows_per_prefix,
                wanted.fewest_per_prefix,
            )
            (choice,) = self._choose(several)
            self._take(choice, several)
            yield range(len(lengths))

    def _cut(self, asked: Asked, *, is_one_of_many: bool) -> Iterator[Sequence[int]]:
        """The parts of just these prompts, the longest first."""
        lengths = asked.lengths
        rest, is_first = longest_first(lengths), True
        while rest or is_first:
            choices = self._choose(asked.part([lengths[place] for place in rest]))
            self._was_cut = is_one_of_many or not is_first or len(choices) > 1
            for number, choice in enumerate(choices):
                places = rest[: choice.job.num_prompts]
                part = asked._replace(lengths=[lengths[place] for place in places])
                try:
                    self._take(choice, part)
                except ValueError:
                    if number == 0:
                        raise
                    break  # there is less memory than there was: plan for what is left
                yield places
                rest, is_first = rest[len(places) :], False

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

    def _choose(self, asked: Asked) -> list[Choice]:
        """Policies for prompts, the longest of which come first."""
        choices = choose_policies(
            self._store,
            asked,
            device=self._device,
            offload_dir=self._offload_dir,
            held=self._held(),
            progress=logger.warning,
        )
        if len(choices) > 1:
            predictions = [choice.plan.prediction for choice in choices if choice.plan]
            logger.warning(
                "prompts of so different lengths are taken in %d parts, each with a "
                "policy of its own; expect %s in all",
                len(choices),
                format_seconds(sum(part.total_s for part in predictions)),
            )
        return choices

    def _held(self) -> dict[Tier, int]:
        """Bytes of the engine, which are free for another policy."""
        held = dict.fromkeys(Tier, 0)
        if self.engine is not None:
            for tier, kind in itertools.product((Tier.DEVICE, Tier.HOST), Kind):
                held[tier] += self.engine.ledger.held(tier, kind)
        return held

    def _take(self, choice: Choice, asked: Asked) -> None:
        """Makes the engine run under what was chosen for what was asked."""
        # What was searched takes long, or is far from what a user would expect.
        level = logging.INFO if choice.plan is None else logging.WARNING
        logger.log(level, "%s", choice.reason)
        ahead = MOST_LAYERS_AHEAD if choice.plan is None else choice.plan.layers_ahead
        if (choice.policy, ahead) != (self.policy, self._layers_ahead):
            self._stop()
            self._start(choice.policy, ahead)
        self.choice, self._planned_for = choice, choice.job
        self._chosen_for = asked

    def _stop(self) -> None:
        if self.engine is not None:
            self.engine.close()
        self.engine, self.policy, self.choice = None, None, None
        give_back_freed()  # what comes next may need all of it
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


def _resident_bytes(tensors: Mapping[str, TensorEntry], policy: Policy) -> int:
    """About what is read at the start; a bar may end a little early or late."""
    total = sum(entry.nbytes for entry in tensors.values())
    return round(total * (1.0 - policy.weights.disk))
