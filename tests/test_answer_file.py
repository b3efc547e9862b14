"""Answers outlive whatever ends the run: kills, full disks, mistaken commands."""

import errno
import json
import os
import pathlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flexjax import answer_file
from flexjax.answer_file import AnswerFile, partial_path

TASK = {"max_tokens": 5, "stop": ("a",), "checksum of the prompts": "abc"}


def answer(index):
    return {"output": {"text": f"of {index} \u2028 \ud800", "token_ids": [index]}}


def answers_to(indices):
    return {
        index: json.dumps({"index": index, **answer(index)}, ensure_ascii=False)
        for index in indices
    }


def lines_of(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def finished(count):
    return [{"index": index, **answer(index)} for index in range(count)]


def opened(path, task, count):
    answers = AnswerFile(path, count)
    try:
        answers.begin(task)
    except BaseException:
        answers.close()
        raise
    return answers


@pytest.fixture
def path(tmp_path):
    return tmp_path / "made" / "answers.jsonl"


def test_answers_end_up_in_the_order_of_their_prompts(path):
    with opened(path, TASK, 4) as answers:
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
    tail=st.sampled_from(
        [b"", b'{"index": 0, "out', b"\0" * 600, b"\0\0\n", b'\0\n{"index": 0, "o\n']
    ),
)
@example(blocks=[2, 2], cut=1.0, tail=b"")
@example(blocks=[2, 2], cut=0.0, tail=b"")
def test_a_run_that_is_killed_goes_on_from_any_byte(
    tmp_path_factory, blocks, cut, tail
):
    path = tmp_path_factory.mktemp("killed") / "answers.jsonl"
    count = sum(blocks)
    with opened(path, TASK, count) as answers:
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
    with opened(path, TASK, count) as answers:
        assert len(answers.missing()) == count - whole
        answers.add(answers_to(answers.missing()))
        answers.finish()
    assert lines_of(path) == finished(count)


@pytest.mark.parametrize(
    "line", [b"not JSON", b"[1]", b'{"index": 9}', b'{"index": "0"}', b'{"index": -1}']
)
def test_a_line_that_is_no_answer_is_answered_again(path, line):
    with opened(path, TASK, 2) as answers:
        answers.add(answers_to([1]))
    partial = partial_path(path)
    partial.write_bytes(partial.read_bytes().replace(b'{"index": 1', line + b"\n{", 1))
    with opened(path, TASK, 2) as answers:
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
    with opened(path, TASK, 2) as answers:
        answers.add(answers_to([1]))
    kept = partial_path(path).read_bytes()
    for count in (2, 1):  # of which the answer that is there is none
        with pytest.raises(ValueError, match=message):
            opened(path, task, count)
    assert partial_path(path).read_bytes() == kept


@pytest.mark.parametrize(
    "data", [b"mine\n", b"mine", b'{"answers": 1}\n', b"\0" * 20 + b"mine"]
)
def test_a_file_of_another_kind_is_left_alone(path, data):
    path.parent.mkdir()
    partial_path(path).write_bytes(data)
    with pytest.raises(
        ValueError, match=r"answers.jsonl.partial is no file of answers"
    ):
        opened(path, TASK, 2)
    assert partial_path(path).read_bytes() == data


def test_a_finished_file_is_not_written_over(path):
    path.parent.mkdir()
    path.write_text("answers")
    with pytest.raises(ValueError, match=r"answers.jsonl is there already; name"):
        opened(path, TASK, 2)
    assert list(path.parent.iterdir()) == [path]


def test_one_run_writes_at_a_time(path):
    with (
        opened(path, TASK, 2) as answers,
        pytest.raises(ValueError, match="partial is being written by another process"),
    ):
        opened(path, TASK, 2)
    with opened(path, TASK, 2) as answers:
        assert answers.missing() == [0, 1]


def test_who_waited_for_the_lock_sees_that_all_is_done(path, monkeypatch):
    lock = answer_file.fcntl.flock

    def late(file, how):
        with monkeypatch.context() as patch:
            patch.setattr(answer_file.fcntl, "flock", lock)
            with opened(path, TASK, 1) as answers:
                answers.add(answers_to([0]))
                answers.finish()
        lock(file, how)

    monkeypatch.setattr(answer_file.fcntl, "flock", late)
    with pytest.raises(ValueError, match="is there already"):
        opened(path, TASK, 1)
    assert lines_of(path) == finished(1)


def test_a_full_disk_costs_what_was_not_written_alone(path, monkeypatch):
    write, calls = os.pwrite, []

    def full(file, data, offset):
        calls.append(len(data))
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data[: len(data) // 2], offset)

    with opened(path, TASK, 4) as answers:
        answers.add(answers_to([2]))
        kept = partial_path(path).read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            with pytest.raises(OSError, match="partial: No space left .* once more"):
                answers.add(answers_to([0, 1]))
        assert len(calls) == 2
        assert partial_path(path).read_bytes() == kept
        assert answers.missing() == [0, 1, 3]
    with opened(path, TASK, 4) as answers:
        answers.add(answers_to(answers.missing()))
        answers.finish()
    assert lines_of(path) == finished(4)


def test_no_room_for_the_finished_file_loses_nothing(path, monkeypatch):
    def full(path, pieces, *, beside):
        del pieces, beside
        raise OSError(f"cannot write {path}: No space left on device")

    with opened(path, TASK, 2) as answers:
        answers.add(answers_to([0, 1]))
        with monkeypatch.context() as patch:
            patch.setattr(answer_file, "write_pieces_atomically", full)
            with pytest.raises(
                OSError, match="all answers are kept in .*partial: when"
            ):
                answers.finish()
    with opened(path, TASK, 2) as answers:
        assert not answers.missing()
        answers.finish()
    assert lines_of(path) == finished(2)


@pytest.mark.parametrize("zeros", [0, 5, 5000])
def test_what_a_power_cut_leaves_of_the_beginning_is_begun_anew(path, zeros):
    path.parent.mkdir()
    partial_path(path).write_bytes(b"\0" * zeros)
    with opened(path, TASK, 1) as answers:
        answers.add(answers_to([0]))
        answers.finish()
    assert lines_of(path) == finished(1)


@pytest.mark.parametrize("header", [b"null", b"3", b"[]", b"{}", b"nonsense"])
def test_a_header_that_says_nothing_is_of_another_job(path, header):
    with opened(path, TASK, 2) as answers:
        answers.add(answers_to([1]))
    partial = partial_path(path)
    answer_line = partial.read_bytes().split(b"\n", 1)[1]
    partial.write_bytes(b'{"answers_to": ' + header + b"}\n" + answer_line)
    with pytest.raises(ValueError, match="was begun with max_tokens None"):
        opened(path, TASK, 2)


def test_what_has_no_answer_yet_may_be_begun_as_another_job(path):
    with opened(path, TASK, 2) as answers:
        answers.add(answers_to([1]))
    partial = partial_path(path)
    partial.write_bytes(partial.read_bytes().split(b"\n", 1)[0] + b"\n")
    with opened(path, {"max_tokens": 7}, 2) as answers:
        answers.add(answers_to([0, 1]))
        answers.finish()
    assert lines_of(path) == finished(2)


def test_a_link_leads_to_where_answers_are_wanted(path, tmp_path):
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    with opened(link, TASK, 1) as answers:
        answers.add(answers_to([0]))
        answers.finish()
    assert link.is_symlink()
    assert lines_of(path) == finished(1)


def test_a_folder_in_its_place_is_named(path):
    partial_path(path).mkdir(parents=True)
    with pytest.raises(OSError, match="partial cannot be written: Is a directory"):
        AnswerFile(path, 1)


def test_nothing_is_left_of_a_run_that_never_began(path):
    with AnswerFile(path, 3):
        assert partial_path(path).exists()
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_is_removed_under_a_run_ends_it(path, replaced):
    partial = partial_path(path)
    with opened(path, TASK, 2) as answers:
        answers.add(answers_to([0]))
        partial.unlink()
        if replaced:
            partial.write_text("another's")
        with pytest.raises(OSError, match="partial was removed or replaced"):
            answers.add(answers_to([1]))
    assert not path.exists()
    assert partial.exists() == replaced


def test_a_kill_while_answers_are_put_in_order_leaves_one_file_at_most(
    path, monkeypatch
):
    class Killed(BaseException):
        """Nothing that cleans up runs after it."""

    def killed(self, target):
        raise Killed

    for _ in range(2):
        with opened(path, TASK, 2) as answers:
            answers.add(answers_to([1, 0]))
            with monkeypatch.context() as patch:
                patch.setattr(pathlib.Path, "rename", killed)
                patch.setattr(pathlib.Path, "unlink", lambda *_, **__: None)
                with pytest.raises(Killed):
                    answers.finish()
        assert len(list(path.parent.iterdir())) == 2
    with opened(path, TASK, 2) as answers:
        answers.finish()
    assert list(path.parent.iterdir()) == [path]
    partial_path(path).touch()  # a kill before it was removed
    with pytest.raises(
        ValueError, match=r"it is whole, and answers.jsonl.partial is what"
    ):
        AnswerFile(path, 2)
