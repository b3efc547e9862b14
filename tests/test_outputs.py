"""Outputs are plain values that JSON can hold."""

import dataclasses
import json

from flexjax.outputs import CompletionOutput, FinishReason, Logprob, RequestOutput


def test_outputs_become_json_by_asdict():
    logprob = Logprob(logprob=-0.5, rank=1, decoded_token="b")
    completion = CompletionOutput(
        index=0,
        text="b",
        token_ids=[98, 2],
        logprobs=[{98: logprob}, {2: logprob}],
        cumulative_logprob=-1.0,
        finish_reason=FinishReason.STOP,
    )
    request = RequestOutput(prompt="a", prompt_token_ids=[97], outputs=[completion])
    written = json.loads(json.dumps(dataclasses.asdict(request)))
    row = written["outputs"][0]
    assert row["finish_reason"] == "stop"
    assert row["stop_reason"] is None
    assert row["logprobs"][0]["98"] == {
        "logprob": -0.5,
        "rank": 1,
        "decoded_token": "b",
    }


def test_a_finish_reason_is_its_string():
    assert FinishReason.STOP == "stop"
    assert f"{FinishReason.LENGTH}" == "length"
