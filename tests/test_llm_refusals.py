"""What the front door refuses, in one sentence each."""

import dataclasses

import pytest

from flexjax import LLM
from flexjax.steps import head_step
from tests.common import in_time
from tests.test_llm import GREEDY, SPILLS

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def llm(golden, tmp_path):
    with LLM(golden("opt-pre-ln").store, policy=SPILLS, offload_dir=tmp_path) as llm:
        yield llm


@pytest.mark.parametrize("seed", [-1, 1.5, True, 2**64])
def test_a_seed_that_is_none_is_refused_at_the_door(golden, seed):
    with pytest.raises(ValueError, match=f"^seed={seed} cannot be used"):
        LLM(golden("opt-pre-ln").store, seed=seed)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[5], []], r"prompt 1 has no tokens"),
        ([[5], [515]], r"prompt 1 has token id 515, but the vocabulary is 0\.\.514"),
        ([[-1]], r"prompt 0 has token id -1"),
        ([[5, "6"]], r"prompt 0 has '6', which is not a token id"),
        ([[5] * 150], r"prompt 0 has 150 tokens and max_tokens=16.*positions for 160"),
        (["Hello"], r"no tokenizer .*prompts must be given as token ids"),
        ([""], r"prompt 0 is empty"),
        ([b"ab"], r"prompt 0 is b'ab', expected a text or a list of token ids"),
        ([[5], None], r"prompt 1 is None, expected a text"),
        (None, r"prompts are None, expected texts"),
        ({"prompt": "Hello"}, r"prompts are {'prompt': 'Hello'}, expected texts"),
        ([{"prompt": "Hello"}], r"prompt 0 is {'prompt': 'Hello'}, expected a text"),
    ],
)
def test_bad_prompts_are_refused_by_number(llm, prompts, message):
    with pytest.raises(ValueError, match=message):
        llm.generate(prompts, GREEDY)


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([None], "sequence 0 is None, expected a list of token ids"),
        ([[5, 6], 2], "sequence 1 is 2, expected a list of token ids"),
        (["ab"], "sequence 0 is 'ab', expected a list of token ids"),
        (3, "prompts are 3, expected texts or lists of token ids"),
        ([[5], []], "sequence 1 has no tokens"),
        ([[5] * 162], "sequence 0 has 162 tokens, .* for 160 and the last token"),
    ],
)
def test_bad_sequences_are_refused_by_number(llm, sequences, message):
    with pytest.raises(ValueError, match=message):
        llm.score(sequences)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("a text", {}, "prompts are 'a text', expected a sequence of texts"),
        (3, {}, "prompts are 3, expected a sequence of texts"),
        ([[5], [6]], {"indices": [0, 2]}, "indices has 2, but the 2 prompts"),
        ([[5], [6]], {"indices": [1, 1]}, "indices has a prompt twice"),
        ([[5], [6]], {"indices": [-1]}, "indices has -1, but the 2 prompts"),
        ([[5], [600]], {}, "prompt 1 has token id 600"),
    ],
)
def test_what_cannot_be_continued_is_refused_before_the_first(
    llm, prompts, options, message
):
    given = []
    with pytest.raises(ValueError, match=message):
        llm.generate_each(prompts, GREEDY, on_outputs=given.append, **options)
    assert not given


def test_a_prompt_that_changes_while_the_model_runs_is_refused(llm):
    class Growing(list):
        """Prompts that have another token whenever they are looked up."""

        def __getitem__(self, index):
            super().__getitem__(index).append(7)
            return list(super().__getitem__(index))

    with pytest.raises(ValueError, match="prompt 0 had 3 tokens .* has 4 now"):
        llm.generate_each(Growing([[5, 6]]), GREEDY, on_outputs=print)


@pytest.mark.parametrize("call", ["generate", "score", "close"])
def test_a_call_from_inside_of_a_run_is_refused(llm, call):
    calls = {
        "generate": lambda: llm.generate([[5]], GREEDY),
        "score": lambda: llm.score([[5, 6]]),
        "close": llm.close,
    }
    with pytest.raises(ValueError, match="comes from inside of that run"):
        in_time(
            lambda: llm.generate([[5, 6]], GREEDY, on_tokens=lambda _: calls[call]())
        )
    assert len(llm.generate([[5, 6]], GREEDY)) == 1


def test_bad_parameters_are_refused_by_name(llm):
    with pytest.raises(ValueError, match="prompt 0 are 3, expected SamplingParams"):
        llm.generate([[5]], [3])
    with pytest.raises(ValueError, match="1 sampling_params for 2 prompts"):
        llm.generate([[5], [6]], [GREEDY])
    with pytest.raises(ValueError, match="stop_token_ids of prompt 0 has 600"):
        llm.generate([[5]], dataclasses.replace(GREEDY, stop_token_ids=[600]))
    with pytest.raises(ValueError, match="needs a tokenizer"):
        llm.generate([[5]], dataclasses.replace(GREEDY, stop="word"))


def test_logits_that_are_not_numbers_are_refused(golden, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "flexjax.blocks.head_step", lambda table, hidden: head_step(table, hidden) / 0
    )
    with (
        LLM(golden("opt-pre-ln").store) as llm,
        pytest.raises(ValueError, match="logits of prompt 0 are not finite after 0"),
    ):
        llm.generate([[5, 6]], GREEDY)


def test_max_model_len_binds(golden):
    with (
        LLM(golden("opt-pre-ln").store, max_model_len=20) as llm,
        pytest.raises(ValueError, match="positions for 20"),
    ):
        llm.generate([[5] * 5], GREEDY)
