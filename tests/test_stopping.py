"""Laws of stopping, on a tokenizer that splits characters between tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexjax.outputs import FinishReason
from flexjax.sampling_params import SamplingParams
from flexjax.stopping import Finish, StopChecker, TextStream

EOS = 256
WORDS = ["ab", "abc", "bca", " the", "é", "日本", "🙂", "b\n"]
TOKENS = [bytes([byte]) for byte in range(256)] + [b""]
TOKENS += [word.encode() for word in WORDS]
TOKENS += ["日".encode()[:2], "🙂".encode()[1:], "é".encode()[1:] + b"a", b"a\xf0\x9f"]
LETTERS = [ord(letter) for letter in "abc \n"]
EXTRA = list(range(EOS + 1, len(TOKENS)))


def decode(ids):
    return b"".join(TOKENS[one] for one in ids).decode("utf-8", errors="replace")


def encode(text):
    return list(text.encode())


def run(ids, params, *, decode=decode):
    """Feeds tokens until the row ends; returns the checker and how it ended."""
    checker = StopChecker(params, eos_token_id=EOS, decode=decode)
    for one in ids:
        if checker.push(one):
            break
    return checker, checker.finish


def reference(ids, stops):
    """How many tokens are taken and their text, decoding all of it each time."""
    for count in range(1, len(ids) + 1):
        text = decode(ids[:count]).rstrip("\ufffd")
        found = [text.find(stop) for stop in stops if stop in text]
        if found:
            return count, text[: min(found)]
    return len(ids), decode(ids)


@given(
    ids=st.lists(st.sampled_from(LETTERS + EXTRA), max_size=40),
    stops=st.lists(
        st.sampled_from(["a", "abca", "cab", "\n", "é", "日", "本a", " the", "🙂b"]),
        max_size=3,
    ),
)
def test_stop_strings_end_the_text_as_if_all_of_it_were_decoded(ids, stops):
    checker, finish = run(ids, SamplingParams(max_tokens=100, stop=stops))
    count, text = reference(ids, stops)
    assert (len(checker.token_ids), checker.text) == (count, text)
    if finish is not None:
        assert finish.finish_reason is FinishReason.STOP
        assert finish.stop_reason in stops


@given(st.lists(st.integers(0, len(TOKENS) - 1), max_size=80))
def test_text_comes_in_whole_characters_and_is_never_taken_back(ids):
    stream = TextStream(decode)
    for count, one in enumerate(ids, 1):
        before = stream.text
        num_new = stream.push(one)
        assert stream.text[: len(stream.text) - num_new] == before
        assert stream.text == decode(ids[:count]).rstrip("\ufffd")


def test_characters_split_over_tokens_leave_no_garbage():
    ids = encode("日本語🙂")
    checker, finish = run(ids, SamplingParams(max_tokens=len(ids), stop="語🙂"))
    assert checker.text == "日本"
    assert finish == Finish(FinishReason.STOP, "語🙂")


def test_a_stop_string_is_found_before_an_unfinished_character():
    ids = [*encode("see: STO"), ord("P"), *encode("日")[:1]]
    checker, _ = run(ids[:-2], SamplingParams(stop="STOP"))
    assert checker.finish is None
    assert checker.push(ord("P")) == Finish(FinishReason.STOP, "STOP")
    mixed = TOKENS.index(b"a\xf0\x9f")
    checker, finish = run([ord("x"), mixed], SamplingParams(stop="a"))
    assert (checker.text, finish) == ("x", Finish(FinishReason.STOP, "a"))


@pytest.mark.parametrize(
    ("asked", "ids", "text", "num_tokens", "finish"),
    [
        ({}, [97, EOS, 98], "a", 2, Finish(FinishReason.STOP)),
        ({"ignore_eos": True}, [97, EOS, 98], "ab", 3, None),
        (
            {"ignore_eos": True, "stop_token_ids": [EOS]},
            [97, EOS, 98],
            "a",
            2,
            Finish(FinishReason.STOP, EOS),
        ),
        ({"stop_token_ids": [98]}, [97, 98, 99], "a", 2, Finish(FinishReason.STOP, 98)),
        ({"max_tokens": 2}, [97, 98, 99], "ab", 2, Finish(FinishReason.LENGTH)),
        ({"max_tokens": 2}, [97, EOS, 99], "a", 2, Finish(FinishReason.STOP)),
        (
            {"max_tokens": 2, "stop": "b"},
            [97, 98, 99],
            "a",
            2,
            Finish(FinishReason.STOP, "b"),
        ),
        ({"stop": ["c", "b"]}, [97, 98, 99], "a", 2, Finish(FinishReason.STOP, "b")),
        ({"stop": "z"}, [97, EOS], "a", 2, Finish(FinishReason.STOP)),
    ],
)
def test_the_first_reason_ends_the_row(asked, ids, text, num_tokens, finish):
    checker, ended = run(ids, SamplingParams(**asked))
    assert ended == finish
    assert checker.text == text
    assert len(checker.token_ids) == num_tokens


def test_of_stop_strings_in_one_token_the_first_in_the_text_wins():
    token = TOKENS.index(b"bca")
    checker, finish = run([token], SamplingParams(stop=["a", "ca", "c"]))
    assert (checker.text, finish) == ("b", Finish(FinishReason.STOP, "ca"))


def test_nothing_is_decoded_before_the_text_is_asked_for():
    calls = []

    def counted(ids):
        calls.append(len(ids))
        return decode(ids)

    checker, _ = run([97] * 50, SamplingParams(max_tokens=50), decode=counted)
    assert calls == []
    assert checker.text == "a" * 50
    assert calls == [50]


def test_looking_for_stop_strings_decodes_a_window_only():
    lengths = []

    def counted(ids):
        lengths.append(len(ids))
        return decode(ids)

    ids = encode("some text, 日本語 and more. " * 20)
    run(ids, SamplingParams(max_tokens=len(ids), stop="never"), decode=counted)
    assert max(lengths) <= 24
    assert len(lengths) < 1.2 * len(ids)


def test_a_row_without_a_tokenizer_ends_but_has_no_text():
    checker, finish = run([97, EOS], SamplingParams(), decode=None)
    assert finish == Finish(FinishReason.STOP)
    assert checker.text == ""
    with pytest.raises(ValueError, match="stop=.*needs a tokenizer.*stop_token_ids"):
        run([], SamplingParams(stop="x"), decode=None)


def test_a_model_without_an_end_token_goes_on_to_max_tokens():
    checker = StopChecker(SamplingParams(max_tokens=2), eos_token_id=None)
    assert checker.push(EOS) is None
    assert checker.push(EOS) == Finish(FinishReason.LENGTH)
