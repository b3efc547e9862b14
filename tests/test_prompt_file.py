"""Prompts from files: every form of a line, and every line that is none."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexjax.prompt_file import PromptFile

TEXTS = st.text(min_size=1).filter(lambda text: text.strip())
# What a line of a text file may be: nothing of it looks like its end, or like JSON.
LINES = st.text(st.characters(exclude_characters="\r\n[{", exclude_categories=["Cs"]))
IDS = st.lists(st.integers(0, 1 << 40), min_size=1)


def written(folder, name, data):
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


@given(lines=st.lists(LINES.filter(str.strip), min_size=1), end=st.sampled_from("\r "))
def test_a_text_file_has_a_prompt_a_line(tmp_path_factory, lines, end):
    folder = tmp_path_factory.mktemp("texts")
    ends = end.strip(" ") + "\n"
    path = written(folder, "p.txt", "\ufeff" + f"{ends}{ends} {ends}".join(lines))
    with PromptFile(path) as prompts:
        assert list(prompts) == lines
        assert json.loads(prompts.json(-1)) == prompts[-1] == lines[-1]


@given(values=st.lists(TEXTS | IDS, min_size=1), other=st.integers())
def test_a_jsonl_file_has_json_on_each_line(tmp_path_factory, values, other):
    objects = [{"id": other, "prompt": value} for value in values]
    data = "\n\n".join(json.dumps(value) for value in [*values, *objects])
    with PromptFile(written(tmp_path_factory.mktemp("json"), "p.jsonl", data)) as found:
        assert list(found) == [*values, *values]
        assert found[: len(values)] == values
        whole = [found.json(len(values) + i) for i in range(len(values))]
        assert whole == [json.dumps(value) for value in objects]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("p.txt", "", "p.txt is empty; write one prompt a line"),
        ("p.txt", " \n\u00a0\n", "p.txt is empty"),
        ("p.txt", b"a\n\nb\xff\n", "line 3 of .*p.txt is not UTF-8 .* unpack it"),
        ("p.jsonl", '"a"\nb\n', r"line 2 of .* is no JSON \(Expecting value, column 1"),
        ("p.jsonl", '\n{"text": "a"}\n', "line 2 of .*p.jsonl is no prompt; expected"),
        ("p.jsonl", '{"prompt": 3}', "line 1 of .*p.jsonl is no prompt; expected"),
        ("p.jsonl", "null", "line 1 of .*p.jsonl is no prompt; expected"),
        ("p.jsonl", "[" * 100_000, "line 1 of .*p.jsonl is no JSON .*; expected"),
        ("p.jsonl", "[" + "1" * 9999 + "]", "is no JSON that can be read; expected"),
        ("p.jsonl", '{"prompt": "a", "x": NaN}', "is no JSON that can be read; exp"),
        ("p.txt", '{"prompt": "a"}\nb\n', "line 2 of .*p.txt is no JSON"),
    ],
)
def test_what_is_no_prompt_is_refused_by_its_line(tmp_path, name, data, message):
    with pytest.raises(ValueError, match=message):
        PromptFile(written(tmp_path, name, data))


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.txt cannot be read: No such file"):
        PromptFile(tmp_path / "nowhere.txt")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        PromptFile(tmp_path)


def test_a_line_that_changes_is_refused_and_another_file_is_not_read(tmp_path):
    path = written(tmp_path, "p.txt", "one\ntwo\nsix\n")
    with PromptFile(path) as prompts:
        path.write_text("one\nten\nsix\n")
        assert prompts[0] == "one"
        with pytest.raises(ValueError, match="line 2 of .* has changed"):
            prompts[1]
    with PromptFile(path) as prompts:
        written(tmp_path, "other", "two\none\nsix\n").rename(path)
        assert list(prompts) == ["one", "ten", "six"]


def test_the_checksum_is_of_the_whole_file(tmp_path):
    sums = set()
    for data in ("one\ntwo\n", "one\ntwo\n\n", "one\ntow\n"):
        with PromptFile(written(tmp_path, "p.txt", data)) as prompts:
            sums.add(prompts.checksum)
    assert len(sums) == 3


def test_a_pipe_is_read_once_and_its_prompts_as_often_as_wanted(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(pipe.write_text, "one\ntwo\n")
        with PromptFile(pipe) as prompts:
            assert list(prompts) == list(prompts) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "data", "found"),
    [
        ("p.JSONL", '"a"', "a"),
        ("p.ndjson", '"a"', "a"),
        ("pipe", '{"prompt": "a"}', "a"),
        ("pipe", "[5, 6]", [5, 6]),
        ("p.txt", '"a"', '"a"'),
        ("p.txt", '{"text": "a"}', '{"text": "a"}'),
        ("p.txt", "[]", "[]"),
        ("p.txt", "[true]", "[true]"),
    ],
)
def test_json_is_known_by_the_name_or_the_first_line(tmp_path, name, data, found):
    with PromptFile(written(tmp_path, name, f"\n{data}\n{data}\n")) as prompts:
        assert list(prompts) == [found, found]


def test_a_line_is_given_back_as_it_is(tmp_path):
    line = '{"prompt": "a", "price": 1.10, "n": 1e400, "price": 12345678901234567890.1}'
    with PromptFile(written(tmp_path, "p.jsonl", f"\ufeff {line} \r\n")) as prompts:
        assert prompts.json(0) == line
