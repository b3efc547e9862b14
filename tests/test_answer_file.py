"""Answers outlive whatever ends the run: kills, full disks, mistaken commands."""

import errno
import json
import os

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flexjax import answer_file
from flexjax.answer_file import AnswerFile, partial_path

TASK = {"max_tokens": 5, "stop": ("a",), "checksum of the prompts": "abc"}


def answer(index):
    return {"output": {"text": f"of {index} \u2028 \ud800", "token_ids": [index]}}


def answers_to(indices):
    return {index: answer(index) for index in indices}


def lines_of(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def finished(count):
    return [{"index": index, **answer(index)} for index in range(count)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "made" / "answers.jsonl"


def test_answers_end_up_in_the_order_of_their_prompts(path):
    with AnswerFile(path, TASK, 4) as answers:
        assert answers.missing() == [0, 1, 2, 3]
        answers.add(answers_to([3, 1]))
        assert answers.missing() == [0, 2]
        answers.add(answers_to([0, 2]))
        assert not path.exists()
        answers.finish()
    assert lines_of(path) == finished(4)
    assert list(path.parent.iterdir()) == [path]


@given(
    blocks=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    cut=st.floats(0, 1),
    tail=st.sampled_from([b"", b'{"index": 0, "out', b"\0" * 600]),
)
@example(blocks=[2, 2], cut=1.0, tail=b"")
@example(blocks=[2, 2], cut=0.0, tail=b"")
def test_a_run_that_is_killed_goes_on_from_any_byte(
    tmp_path_factory, blocks, cut, tail
):
    path = tmp_path_factory.mktemp("killed") / "answers.jsonl"
    count = sum(blocks)
    with AnswerFile(path, TASK, count) as answers:
        order = iter(reversed(range(count)))
        for size in blocks:
            answers.add(answers_to([next(order) for _ in range(size)]))
    partial = partial_path(path)
    data = partial.read_bytes()
    kept = data[: round(cut * len(data))]
    # After a whole line only, so that the tail is no part of what was written.
    torn = tail if kept.endswith(b"\n") else b""
    partial.write_bytes(kept + torn)
    whole = max(0, kept.count(b"\n") - 1)
    with AnswerFile(path, TASK, count) as answers:
        assert len(answers.missing()) == count - whole
        answers.add(answers_to(answers.missing()))
        answers.finish()
    assert lines_of(path) == finished(count)


@pytest.mark.parametrize(
    "line", [b"not JSON", b"[1]", b'{"index": 9}', b'{"index": "0"}', b'{"index": -1}']
)
def test_a_line_that_is_no_answer_is_answered_again(path, line):
    with AnswerFile(path, TASK, 2) as answers:
        answers.add(answers_to([1]))
    partial = partial_path(path)
    partial.write_bytes(partial.read_bytes().replace(b'{"index": 1', line + b"\n{", 1))
    with AnswerFile(path, TASK, 2) as answers:
        assert answers.missing() == [0, 1]
        answers.add(answers_to([1, 0]))
        answers.finish()
    assert lines_of(path) == finished(2)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({**TASK, "max_tokens": 6}, "begun with max_tokens 5, and this run has 6"),
        ({**TASK, "top_k": 3}, "begun with top_k None, and this run has 3"),
        ({"max_tokens": 5, "stop": ("a",)}, "checksum of the prompts 'abc', .* None"),
    ],
)
def test_another_job_is_refused_and_nothing_is_lost(path, task, message):
    with AnswerFile(path, TASK, 2) as answers:
        answers.add(answers_to([1]))
    kept = partial_path(path).read_bytes()
    with pytest.raises(ValueError, match=message):
        AnswerFile(path, task, 2)
    assert partial_path(path).read_bytes() == kept


@pytest.mark.parametrize("data", [b"mine\n", b"mine", b'{"answers": 1}\n', b"\0\0"])
def test_a_file_of_another_kind_is_left_alone(path, data):
    path.parent.mkdir()
    partial_path(path).write_bytes(data)
    with pytest.raises(
        ValueError, match=r"answers.jsonl.partial is no file of answers"
    ):
        AnswerFile(path, TASK, 2)
    assert partial_path(path).read_bytes() == data


def test_a_finished_file_is_not_written_over(path):
    path.parent.mkdir()
    path.write_text("answers")
    with pytest.raises(ValueError, match=r"answers.jsonl is there already; name"):
        AnswerFile(path, TASK, 2)
    assert list(path.parent.iterdir()) == [path]


def test_one_run_writes_at_a_time(path):
    with (
        AnswerFile(path, TASK, 2) as answers,
        pytest.raises(ValueError, match="partial is being written by another process"),
    ):
        AnswerFile(path, TASK, 2)
    with AnswerFile(path, TASK, 2) as answers:
        assert answers.missing() == [0, 1]


def test_who_waited_for_the_lock_sees_that_all_is_done(path, monkeypatch):
    lock = answer_file.fcntl.flock

    def late(file, how):
        with monkeypatch.context() as patch:
            patch.setattr(answer_file.fcntl, "flock", lock)
            with AnswerFile(path, TASK, 1) as answers:
                answers.add(answers_to([0]))
                answers.finish()
        lock(file, how)

    monkeypatch.setattr(answer_file.fcntl, "flock", late)
    with pytest.raises(ValueError, match="is there already"):
        AnswerFile(path, TASK, 1)
    assert lines_of(path) == finished(1)


def test_a_full_disk_costs_what_was_not_written_alone(path, monkeypatch):
    write, calls = os.pwrite, []

    def full(file, data, offset):
        calls.append(len(data))
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data[: len(data) // 2], offset)

    with AnswerFile(path, TASK, 4) as answers:
        answers.add(answers_to([2]))
        kept = partial_path(path).read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            with pytest.raises(OSError, match="partial: No space left .* once more"):
                answers.add(answers_to([0, 1]))
        assert len(calls) == 2
        assert partial_path(path).read_bytes() == kept
        assert answers.missing() == [0, 1, 3]
    with AnswerFile(path, TASK, 4) as answers:
        answers.add(answers_to(answers.missing()))
        answers.finish()
    assert lines_of(path) == finished(4)


def test_no_room_for_the_finished_file_loses_nothing(path, monkeypatch):
    def full(path, pieces):
        del pieces
        raise OSError(f"cannot write {path}: No space left on device")

    with AnswerFile(path, TASK, 2) as answers:
        answers.add(answers_to([0, 1]))
        with monkeypatch.context() as patch:
            patch.setattr(answer_file, "write_pieces_atomically", full)
            with pytest.raises(
                OSError, match="all answers are in .*partial: make room"
            ):
                answers.finish()
    with AnswerFile(path, TASK, 2) as answers:
        assert not answers.missing()
        answers.finish()
    assert lines_of(path) == finished(2)
