"""A policy that nobody gave: planned for the first job, and again for a larger one."""

import dataclasses

import jax
import numpy as np
import pytest

from flexjax import shared_prefixes
from flexjax.llm import LLM
from flexjax.memory.room import Room
from flexjax.plan import auto, parts, search
from flexjax.plan.hardware import read_hardware
from flexjax.planned_engine import PlannedEngine
from flexjax.policy import Kind, Policy, Tier, to_json
from flexjax.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)


@pytest.fixture
def small_machine(monkeypatch):
    """One whose memory holds no more than some KiB, calibrated from a file."""
    monkeypatch.setattr(search, "RESERVED_BYTES", 0)
    described = dataclasses.replace(read_hardware("epyc-2-cores"), disk_bytes=1 << 30)
    calibrations = []

    def shrink(memory_bytes):
        free = {Tier.DEVICE: memory_bytes, Tier.HOST: memory_bytes, Tier.DISK: 1 << 30}
        monkeypatch.setattr(auto, "free_bytes", lambda *_: free)

        def calibrated(folder, device, progress):
            del folder, device, progress
            calibrations.append(memory_bytes)
            return described

        monkeypatch.setattr(auto, "calibrated", calibrated)
        # As described too, so that each run finds the same plans.
        rate = described.disk_read_bytes_per_s
        monkeypatch.setattr(auto, "store_read_rate", lambda store: rate)
        return calibrations

    return shrink


def token_ids(outputs):
    return [output.outputs[0].token_ids for output in outputs]


def test_a_model_that_fits_is_all_on_the_device_and_nothing_is_measured(
    golden, small_machine
):
    calibrations = small_machine(1 << 30)
    checkpoint = golden("opt-pre-ln")
    with LLM(checkpoint.store) as llm:
        assert llm.policy is None
        assert llm.placement == {}
        outputs = llm.generate(checkpoint.prompts, GREEDY)
        assert llm.policy == Policy(batch_size=len(checkpoint.prompts))
        assert llm.placement["weights"]["device"]["effective"] == 1.0
        assert llm.plan is not None
        assert len(llm.plan.reason.splitlines()) == 2
        assert "predicted" not in llm.metrics
    expected = [ids[:4] for ids in checkpoint.greedy_ids]
    assert token_ids(outputs) == expected
    assert calibrations == []


def test_a_model_that_does_not_fit_is_offloaded_and_says_what_to_expect(
    golden, small_machine, tmp_path, caplog
):
    checkpoint = golden("opt-pre-ln")
    with LLM(checkpoint.store, policy=Policy()) as whole:
        whole.generate(checkpoint.prompts, GREEDY)
        needed = whole.metrics["predicted_peak_bytes"]
    small_machine(int(0.9 * needed["device"]))
    with LLM(checkpoint.store, offload_dir=tmp_path) as llm:
        outputs = llm.generate(checkpoint.prompts, GREEDY)
        assert llm.policy is not None
        on_device = [llm.policy.placement(kind).device for kind in Kind]
        assert min(on_device) < 1.0 or llm.policy.batch_size < len(checkpoint.prompts)
    expected = [ids[:4] for ids in checkpoint.greedy_ids]
    assert token_ids(outputs) == expected
    assert any("expect" in record.getMessage() for record in caplog.records)


def test_a_smaller_job_keeps_the_plan_and_a_larger_one_is_planned_anew(
    golden, small_machine
):
    small_machine(1 << 30)
    checkpoint = golden("opt-pre-ln")
    with LLM(checkpoint.store) as llm:
        llm.generate(checkpoint.prompts[:2], GREEDY)
        first, engine = llm.plan, llm._planned.engine
        llm.generate(checkpoint.prompts[:1], GREEDY)
        llm.score([[5, 6]])
        assert llm.plan is first
        longer = dataclasses.replace(GREEDY, max_tokens=6)
        llm.generate(checkpoint.prompts[:2], longer)
        assert llm.plan is not first
        assert llm._planned.engine is engine  # under the same policy
        llm.generate(checkpoint.prompts[:3], GREEDY)
        assert llm.policy is not None
        assert llm.policy.batch_size == 3


def test_prompts_of_very_different_lengths_are_planned_apart(
    golden, small_machine, tmp_path, monkeypatch
):
    checkpoint = golden("opt-pre-ln")
    prompts = [[5 + i, 9] for i in range(30)]
    prompts[4:4] = [[7 + i] * 150 for i in range(3)]
    with LLM(checkpoint.store, policy=Policy(batch_size=33)) as whole:
        expected = token_ids(whole.generate(prompts, GREEDY))
        scores = whole.score(prompts)
        needed = whole.metrics["predicted_peak_bytes"]["device"]
    small_machine(needed // 3)
    monkeypatch.setattr(parts, "SEARCH_S", 1e-9)
    with LLM(checkpoint.store, offload_dir=tmp_path, trace=True) as llm:
        assert token_ids(llm.generate(prompts, GREEDY)) == expected
        metrics = llm.metrics
        long, short = metrics["parts"]
        assert (long["num_prompts"], short["num_prompts"]) == (3, 30)
        assert long["policy"] != short["policy"] == to_json(llm.policy)
        assert metrics["num_tokens"] == 33 * 4
        assert metrics["seconds"] == long["seconds"] + short["seconds"]
        assert metrics["predicted"]["total_s"] > llm.plan.plan.prediction.total_s
        prefills = [span.name for span in llm.trace if span.name.startswith("step 0,")]
        assert len(prefills) > len(set(prefills)), "the trace has both parts"
        with monkeypatch.context() as patch:
            patch.setattr(Room, "shortage", lambda *_: "no room")
            with pytest.raises(ValueError, match="no room"):
                llm.generate(prompts[:3], GREEDY)
        assert llm.trace == [], "nothing ran"
        # The last policy is kept for what asks for no more.
        assert token_ids(llm.generate(prompts[:3], GREEDY)) == expected[:3]
        assert "parts" not in llm.metrics
        assert "predicted" not in llm.metrics
        # What asks for more is planned anew, and cut again.
        for one, other in zip(llm.score(prompts), scores, strict=True):
            np.testing.assert_allclose(one, other, atol=2e-4)
        assert [part["num_prompts"] for part in llm.metrics["parts"]] == [3, 30]
        assert token_ids(llm.generate(prompts, GREEDY)) == expected
        assert len(llm.metrics["parts"]) == 2
        fewer = dataclasses.replace(GREEDY, max_tokens=3)
        llm.generate(prompts[7:], fewer)
        assert "predicted" not in llm.metrics, "it was said of more tokens"


def test_prompts_that_share_something_are_planned_apart_from_others(
    golden, small_machine, tmp_path, monkeypatch
):
    for name, count in {
        "LEAST_SHARED": 30,
        "LEAST_BATCH": 1,
        "TOKENS_OF_A_PASS": 1,
    }.items():
        monkeypatch.setattr(shared_prefixes, name, count)
    checkpoint = golden("opt-pre-ln")
    begins = [[5 + number] * 40 for number in range(3)]
    prompts = [[*begins[i % 3], *range(20, 20 + 1 + i)] for i in range(12)]
    prompts += [[7, 8, 9 + i] for i in range(4)]
    with LLM(checkpoint.store, offload_dir=tmp_path) as whole:
        expected = token_ids(whole.generate(prompts, GREEDY))
        scores = whole.score(prompts)
        assert "parts" not in whole.metrics
        needed = whole.metrics["predicted_peak_bytes"]["device"]
    small_machine(needed * 3 // 4)
    with LLM(checkpoint.store, offload_dir=tmp_path) as llm:
        for _ in range(2):
            assert token_ids(llm.generate(prompts, GREEDY)) == expected
            alone, sharing = llm.metrics["parts"]
            assert (alone["num_prompts"], sharing["num_prompts"]) == (4, 12)
            assert alone["num_shared_tokens"] == 0 < sharing["num_shared_tokens"]
            assert llm.metrics["num_shared_tokens"] == sharing["num_shared_tokens"]
        assert "behind 42 that about 4 share" in llm.plan.reason
        for one, other in zip(llm.score(prompts), scores, strict=True):
            np.testing.assert_allclose(one, other, atol=2e-4)


def test_a_part_for_which_there_is_no_room_any_more_is_planned_again(
    golden, small_machine, tmp_path, monkeypatch
):
    checkpoint = golden("opt-pre-ln")
    prompts = [[7 + i] * 150 for i in range(3)] + [[5 + i, 9] for i in range(30)]
    with LLM(checkpoint.store, policy=Policy(batch_size=33)) as whole:
        expected = token_ids(whole.generate(prompts, GREEDY))
        needed = whole.metrics["predicted_peak_bytes"]["device"]
    small_machine(needed // 3)
    monkeypatch.setattr(parts, "SEARCH_S", 1e-9)
    take, taken = PlannedEngine._take, []

    def refusing(self, choice, asked):
        taken.append(choice.job.num_prompts)
        if len(taken) == 2:
            raise ValueError("the policy needs more than there is now")
        take(self, choice, asked)

    monkeypatch.setattr(PlannedEngine, "_take", refusing)
    with LLM(checkpoint.store, offload_dir=tmp_path) as llm:
        assert token_ids(llm.generate(prompts, GREEDY)) == expected
        assert taken == [3, 30, 30]
        taken[:] = [0]
        with pytest.raises(ValueError, match="needs more than there is now"):
            llm.generate(prompts, GREEDY)


def test_blocks_take_no_longer_than_they_may(golden, small_machine, tmp_path):
    checkpoint = golden("opt-pre-ln")
    prompts = checkpoint.prompts * 5
    with LLM(checkpoint.store, policy=Policy(batch_size=25)) as whole:
        whole.generate(prompts, GREEDY)
        needed = whole.metrics["predicted_peak_bytes"]["device"]
    small_machine(int(0.6 * needed))
    given = []
    with LLM(checkpoint.store, offload_dir=tmp_path) as llm:
        llm.generate_each(prompts, GREEDY, on_outputs=given.append)
        free_s, free_sizes = llm.metrics["predicted"]["block_s"], list(map(len, given))
        given.clear()
        most_s = 0.98 * free_s
        llm.generate_each(
            prompts, GREEDY, on_outputs=given.append, block_latency_s=most_s
        )
        assert llm.metrics["predicted"]["block_s"] <= most_s
        assert max(map(len, given)) < max(free_sizes)
        with pytest.raises(ValueError, match="no block is done within 1e-09 s"):
            llm.generate_each(
                prompts, GREEDY, on_outputs=given.append, block_latency_s=1e-9
            )
    with LLM(checkpoint.store, policy=Policy()) as llm:
        for bound_s, message in (
            (9.0, "block_latency_s bounds what is planned"),
            (0.0, "block_latency_s is 0.0, expected more than 0 seconds"),
            (float("nan"), "block_latency_s is nan, expected more than 0 seconds"),
        ):
            with pytest.raises(ValueError, match=message):
                llm.generate_each(
                    prompts,
                    GREEDY,
                    on_outputs=given.append,
                    block_latency_s=bound_s,
                )


def test_a_job_that_does_not_fit_leaves_what_ran_before(golden, small_machine):
    checkpoint = golden("opt-pre-ln")
    small_machine(1 << 30)
    with LLM(checkpoint.store) as llm:
        llm.generate(checkpoint.prompts[:1], GREEDY)
        policy = llm.policy
        small_machine(-(10**9))
        with pytest.raises(ValueError, match="not even one prompt"):
            llm.generate(checkpoint.prompts, GREEDY)
        assert llm.policy == policy
        outputs = llm.generate(checkpoint.prompts[:1], GREEDY)
    assert token_ids(outputs) == [checkpoint.greedy_ids[0][:4]]


def test_where_not_even_one_prompt_fits_the_call_says_so(golden, small_machine):
    small_machine(10_000)
    with (
        LLM(golden("opt-pre-ln").store) as llm,
        pytest.raises(ValueError, match="not even one prompt"),
    ):
        llm.generate([[5, 6]], GREEDY)


def test_a_closed_model_that_never_ran_says_so(golden):
    llm = LLM(golden("opt-pre-ln").store)
    llm.close()
    with pytest.raises(ValueError, match="this model is closed"):
        llm.generate([[5]], GREEDY)


def test_prompts_may_be_none_at_all(golden):
    with LLM(golden("opt-pre-ln").store) as llm:
        assert llm.generate([], GREEDY) == []


class DeviceIsFull(jax.errors.JaxRuntimeError):
    """What XLA raises where a device has no room."""

    def __init__(self):
        super().__init__("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")


@pytest.mark.parametrize("fault", [MemoryError, DeviceIsFull])
@pytest.mark.parametrize("policy", [None, Policy(batch_size=4)])
def test_memory_that_runs_out_under_a_plan_is_accounted_for(
    golden, monkeypatch, fault, policy
):
    checkpoint = golden("opt-pre-ln")
    with LLM(checkpoint.store, policy=policy) as llm:
        llm.generate(checkpoint.prompts, GREEDY)

        def fail(*_):
            raise fault

        assert llm._planned.engine is not None
        monkeypatch.setattr(llm._planned.engine._runner, "run", fail)
        with pytest.raises((MemoryError, jax.errors.JaxRuntimeError)) as caught:
            llm.generate(checkpoint.prompts, GREEDY)
        monkeypatch.undo()
        told = str(caught.value)
        assert ("a mistake of the plan (device" in told) == (policy is None)
        if policy is None:
            assert all(kind.value in told for kind in Kind)
        llm.generate(checkpoint.prompts, GREEDY)  # nothing is left behind
