"""The front door: what a caller sees, on real checkpoints, and every refusal."""

import dataclasses
import json
import os
import pathlib
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import flexjax
from flexjax import LLM, Placement, Policy, SamplingParams
from flexjax.memory.lanes import Lane
from flexjax.steps import head_step
from flexjax.trace import write_trace

GREEDY = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
SPILLS = Policy(
    weights=Placement(host=0.5),
    kv_cache=Placement(),
    activations=Placement(host=1.0),
    batch_size=2,
    num_batches=2,
)


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def llm(golden, tmp_path):
    with LLM(golden("opt-pre-ln").store, policy=SPILLS, offload_dir=tmp_path) as llm:
        yield llm


def token_ids(outputs):
    return [output.outputs[0].token_ids for output in outputs]


def test_a_hugging_face_folder_gives_hugging_faces_tokens(golden, tmp_path):
    checkpoint = golden("opt-sharded-bin-f16")
    with LLM(
        checkpoint.folder, policy=SPILLS, dtype="float32", offload_dir=tmp_path
    ) as llm:
        outputs = llm.generate(checkpoint.prompts, GREEDY)
    assert token_ids(outputs) == checkpoint.greedy_ids
    assert [output.prompt_token_ids for output in outputs] == checkpoint.prompts
    assert {output.outputs[0].finish_reason for output in outputs} == {"length"}


def test_float16_becomes_bfloat16_on_a_cpu(golden):
    with LLM(golden("opt-sharded-bin-f16").folder, policy=Policy()) as llm:
        held = llm.placement["weights"]["device"]["bytes"]
        llm.generate([[5, 6]], dataclasses.replace(GREEDY, max_tokens=2))
    folders = [
        path.name
        for path in pathlib.Path(os.environ["FLEXJAX_CACHE"]).iterdir()
        if path.is_dir()
    ]
    assert ["bfloat16" in name for name in folders] == [True]
    assert held == 2 * sum(
        np.prod(shape)
        for shape in flexjax.models.config.tensor_shapes(llm.config).values()
    )


def test_score_equals_the_logprobs_collected_while_generating(llm, golden):
    prompts = golden("opt-pre-ln").prompts
    params = dataclasses.replace(GREEDY, logprobs=3)
    outputs = llm.generate(prompts, params)
    scores = llm.score([o.prompt_token_ids + o.outputs[0].token_ids for o in outputs])
    for output, scored in zip(outputs, scores, strict=True):
        completion = output.outputs[0]
        seen = [
            table[token].logprob
            for table, token in zip(
                completion.logprobs, completion.token_ids, strict=True
            )
        ]
        np.testing.assert_allclose(
            seen, scored[len(output.prompt_token_ids) - 1 :], atol=2e-4
        )
        assert completion.cumulative_logprob == pytest.approx(sum(seen))
        assert all(len(table) == 3 for table in completion.logprobs)


def test_a_sampled_row_does_not_depend_on_its_neighbours(golden, tmp_path):
    prompts = golden("opt-pre-ln").prompts
    params = SamplingParams(
        max_tokens=12, temperature=1.0, top_p=0.95, top_k=100, seed=7, ignore_eos=True
    )
    greedy = dataclasses.replace(params, temperature=0.0, seed=None)
    answers = []
    for shape in ((1, 1), (5, 1), (2, 2)):
        policy = Policy(batch_size=shape[0], num_batches=shape[1])
        with LLM(golden("opt-pre-ln").store, policy=policy) as llm:
            answers.append(token_ids(llm.generate(prompts, params))[3])
            mixed = [greedy, greedy, params, params, greedy]
            answers.append(token_ids(llm.generate(prompts, mixed))[3])
            answers.append(token_ids(llm.generate(prompts[3], params))[0])
    assert all(answer == answers[0] for answer in answers)


def test_the_seed_of_the_llm_decides_where_no_prompt_has_one(golden):
    params = SamplingParams(max_tokens=12, temperature=1.0, ignore_eos=True)
    answers = []
    for seed in (1, 1, 2):
        with LLM(golden("opt-pre-ln").store, seed=seed) as llm:
            answers.append(token_ids(llm.generate([[5, 6], [5, 6]], params)))
    assert answers[0] == answers[1] != answers[2]
    assert answers[0][0] != answers[0][1]


def test_a_repetition_penalty_sees_the_prompt_and_the_output(llm):
    params = SamplingParams(
        max_tokens=20, temperature=0.0, repetition_penalty=1e6, ignore_eos=True
    )
    (output,) = llm.generate([[5, 6, 7]], params)
    seen = output.prompt_token_ids + output.outputs[0].token_ids
    assert len(set(seen)) == len(seen)


def test_end_of_text_and_stop_tokens_end_a_row(llm, golden):
    (free,) = llm.generate([golden("opt-pre-ln").prompts[0]], GREEDY)
    stop = free.outputs[0].token_ids[4]
    params = dataclasses.replace(GREEDY, stop_token_ids=[stop])
    (output,) = llm.generate([golden("opt-pre-ln").prompts[0]], params)
    completion = output.outputs[0]
    end = free.outputs[0].token_ids.index(stop)
    assert completion.token_ids == free.outputs[0].token_ids[: end + 1]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert llm.metrics["num_tokens"] == end + 1


def test_metrics_and_placement_can_be_written_as_json(llm, golden):
    llm.generate(golden("opt-pre-ln").prompts, GREEDY)
    metrics = json.loads(json.dumps(llm.metrics))
    assert metrics["num_tokens"] == 5 * 16
    assert metrics["bytes_moved"]["disk->device"] > 0
    for name in ("prefill", "decode"):
        assert metrics[name]["seconds"] > 0
        assert metrics[name]["bytes_moved"]["disk->device"] > 0
        assert metrics[name]["busy_s"]["disk"] > 0
    for link, nbytes in metrics["bytes_moved"].items():
        parts = [metrics[name]["bytes_moved"] for name in ("prefill", "decode")]
        assert sum(part.get(link, 0) for part in parts) == nbytes
    assert len(metrics["step_s"]) == 2 * 15, "two blocks, of all tokens but the first"
    assert sum(metrics["step_s"]) == pytest.approx(metrics["decode"]["seconds"])
    for tier, peak in metrics["peak_bytes"].items():
        assert peak <= metrics["predicted_peak_bytes"][tier]
    placement = json.loads(json.dumps(llm.placement))
    for kind in ("weights", "kv_cache", "activations"):
        effective = [tier["effective"] for tier in placement[kind].values()]
        assert sum(effective) == pytest.approx(1.0)
    assert placement["weights"]["host"]["requested"] == 0.5
    assert placement["kv_cache"]["disk"]["effective"] == 1.0
    for kind in ("weight", "kv_cache", "activation"):
        assert placement[f"{kind}_bits"] == 32
    assert placement["attention"] == dict.fromkeys(("device", "host", "disk"), "device")
    assert placement["attention_sparsity"] == 1.0


def test_a_call_that_only_reads_prompts_has_no_decode(llm, golden):
    llm.score(golden("opt-pre-ln").score_ids)
    assert llm.metrics["decode"]["seconds"] == 0
    assert llm.metrics["step_s"] == []
    assert llm.metrics["prefill"]["seconds"] == llm.metrics["seconds"] > 0


def test_a_trace_holds_the_last_run_and_is_empty_unless_asked_for(llm, tmp_path):
    llm.generate([[5, 6]], GREEDY)
    assert llm.trace == []
    policy = dataclasses.replace(SPILLS, weights=Placement())
    with LLM(None, policy=policy, offload_dir=tmp_path, trace=True) as traced:
        assert traced.trace == []
        names = []
        for count in (2, 3):
            params = dataclasses.replace(GREEDY, max_tokens=count)
            traced.generate(["It is a truth"], params)
            busy_s = traced.metrics["prefill"]["busy_s"]
            lanes = {span.lane.value for span in traced.trace}
            assert lanes >= {name for name, seconds in busy_s.items() if seconds}
            assert lanes >= {"disk", "weights in", "cache in", "cache out", "compute"}
            computed = [s.name for s in traced.trace if s.lane is Lane.COMPUTE]
            names.append(computed)
        assert names[0].count("step 1, layer 0, batch 0") == 1
        assert "step 2, layer 0, batch 0" not in names[0]
        assert names[1].count("step 2, layer 0, batch 0") == 1
        file = tmp_path / "trace.json"
        write_trace(file, traced.trace)
    events = json.loads(file.read_text())["traceEvents"]
    assert sum(event["ph"] == "X" for event in events) == len(traced.trace)


def test_tokens_are_told_as_they_come_and_the_caller_may_end_the_call(llm, golden):
    prompts = golden("opt-pre-ln").prompts[:3]
    params, told = dataclasses.replace(GREEDY, max_tokens=4), []
    outputs = llm.generate(prompts, params, on_tokens=told.append)
    assert sum(told) == sum(len(o.outputs[0].token_ids) for o in outputs) == 12
    assert len(told) > 1

    def enough(count):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm.generate(prompts, params, on_tokens=enough)
    again = llm.generate(prompts, params)
    assert [o.outputs for o in again] == [o.outputs for o in outputs]


def test_outputs_of_each_block_are_given_away_when_it_ends(llm, golden):
    prompts = golden("opt-pre-ln").prompts * 2
    whole = llm.generate(prompts, GREEDY)
    seen, given = [], []

    class Prompts(list):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    llm.generate_each(
        Prompts(prompts),
        GREEDY,
        indices=[7, 1, 4, 8, 5],
        on_outputs=lambda outputs: given.append((outputs, len(seen))),
    )
    assert [len(outputs) for outputs, _ in given] == [4, 1]
    found = given[0][0] | given[1][0]
    assert sorted(found) == [1, 4, 5, 7, 8]
    assert all(found[index] == whole[index] for index in found)
    assert [count for _, count in given] == [5 + 2 * 4, 5 + 2 * 4 + 2]


def test_token_ids_may_come_from_an_iterator(llm):
    expected = llm.generate([[5, 6, 7]], GREEDY)
    assert llm.generate([iter([5, 6, 7])], GREEDY) == expected


def test_what_takes_outputs_may_end_the_call(llm):
    def refuse(outputs):
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        llm.generate_each([[5], [6]], GREEDY, on_outputs=refuse)
    assert len(llm.generate([[5]], GREEDY)) == 1


def test_an_empty_list_of_prompts_gives_an_empty_list(llm):
    assert llm.generate([]) == []
    assert llm.score([]) == []


def test_weights_are_predicted_where_they_are_though_there_is_no_prompt(golden):
    with LLM(golden("opt-pre-ln").store, policy=Policy()) as llm:
        llm.generate([])
        assert llm.metrics["peak_bytes"]["device"] > 0
        predicted = llm.metrics["predicted_peak_bytes"]
        assert predicted["device"] >= llm.metrics["peak_bytes"]["device"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "nowhere.json"}, r"policy nowhere.json cannot be read"),
        ({"policy": Policy(weights=Placement(device=1.5))}, "weights.*1.5"),
        ({"policy": Policy(weight_bits=3)}, "weight_bits is 3, expected 4, 8"),
        ({"max_model_len": 161}, "max_model_len is 161, expected 1 to 160"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
    ],
)
def test_bad_options_are_refused_by_name(golden, options, message):
    with pytest.raises(ValueError, match=message):
        LLM(golden("opt-pre-ln").store, **options)


def test_calls_from_several_threads_take_turns(llm, golden):
    prompts = golden("opt-pre-ln").prompts
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(llm.generate, [prompt], GREEDY) for prompt in prompts]
    found = [token_ids(run.result())[0] for run in runs]
    assert found == golden("opt-pre-ln").greedy_ids


def test_a_closed_llm_says_so(golden, tmp_path):
    llm = LLM(golden("opt-pre-ln").store, policy=SPILLS, offload_dir=tmp_path)
    llm.close()
    with pytest.raises(ValueError, match="this model is closed"):
        llm.generate([[5]], GREEDY)
    with pytest.raises(ValueError, match="this model is closed"):
        llm.score([[5, 6]])
    assert list(tmp_path.glob("flexjax-spill*")) == []


def test_a_row_that_has_ended_fails_nobody(golden, monkeypatch):
    calls = 0

    def head_that_breaks_the_first_row(table, hidden):
        nonlocal calls
        calls += 1
        logits = head_step(table, hidden)
        return logits.at[0].set(np.nan) if calls > 2 else logits

    monkeypatch.setattr("flexjax.blocks.head_step", head_that_breaks_the_first_row)
    short, long = (dataclasses.replace(GREEDY, max_tokens=n) for n in (2, 6))
    with LLM(golden("opt-pre-ln").store) as llm:
        outputs = llm.generate([[5, 6], [7, 8]], [short, long])
    assert [len(output.outputs[0].token_ids) for output in outputs] == [2, 6]


def test_a_folder_that_cannot_be_spilled_to_is_refused(golden, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ValueError, match=f"cannot write into {blocked}"):
        LLM(golden("opt-pre-ln").store, policy=SPILLS, offload_dir=blocked)


def test_an_altered_weight_is_refused_by_name(golden, tmp_path):
    store = tmp_path / "store"
    shutil.copytree(golden("opt-pre-ln").store, store)
    (chunk,) = (store / "tensors" / "layers.1.fc1.weight").glob("c*")
    data = bytearray(chunk.read_bytes())
    data[100] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(ValueError, match=r"layers\.1\.fc1\.weight"):
        LLM(store, policy=Policy())
    policy = dataclasses.replace(SPILLS, weights=Placement())
    with (
        LLM(store, policy=policy, offload_dir=tmp_path) as llm,
        pytest.raises(ValueError, match=r"layers\.1\.fc1\.weight"),
    ):
        llm.generate([[5]], GREEDY)
