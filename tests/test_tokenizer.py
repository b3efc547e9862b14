"""Laws of the tokenizer, on tiny byte-level BPEs trained here."""

import json
import pathlib
import re

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from flexjax.tokenizer import load_tokenizer

TEXT = "It is a truth universally acknowledged, that a single man in possession of"
OPT_IDS = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
# The files of facebook/opt-125m, less the parts that concern no one here.
OPT_CONFIG = {"add_bos_token": True, "add_prefix_space": False, "errors": "replace"}
OPT_SPECIAL = {
    "bos_token": {"content": "</s>", "lstrip": False, "rstrip": False},
    "eos_token": "</s>",
    "unk_token": "</s>",
    "pad_token": "<pad>",
}


def train_backend() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=list(OPT_IDS),
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    return backend


def write_json(path: pathlib.Path, values: object) -> None:
    path.write_text(json.dumps(values))


@pytest.fixture(scope="module")
def opt_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder laid out as every published OPT is."""
    folder = tmp_path_factory.mktemp("opt")
    train_backend().model.save(str(folder))
    write_json(folder / "tokenizer_config.json", OPT_CONFIG)
    write_json(folder / "special_tokens_map.json", OPT_SPECIAL)
    return folder


@pytest.fixture
def copied(opt_folder: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of `opt_folder` that a test may spoil."""
    for path in opt_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_opt_prompts_begin_with_its_bos_token(opt_folder: pathlib.Path):
    tokenizer = load_tokenizer(opt_folder)
    ids = tokenizer.encode(TEXT)
    assert ids[0] == tokenizer.bos_token_id == tokenizer.eos_token_id == 2
    assert tokenizer.pad_token_id == 1
    assert 2 not in ids[1:]
    assert tokenizer.encode("") == [2]
    assert max(ids) < tokenizer.vocab_size == 300


def test_merges_are_applied_and_a_word_is_not_the_word_behind_a_space(
    opt_folder: pathlib.Path,
):
    tokenizer = load_tokenizer(opt_folder)
    assert len(tokenizer.encode(TEXT)) < len(TEXT) / 2
    assert tokenizer.encode("truth")[1:] != tokenizer.encode(" truth")[1:]


@given(text=st.text())
def test_decoding_gives_the_text_back(opt_folder: pathlib.Path, text: str):
    tokenizer = load_tokenizer(opt_folder)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_in_a_text_are_one_token_and_are_not_printed(
    opt_folder: pathlib.Path,
):
    tokenizer = load_tokenizer(opt_folder)
    ids = tokenizer.encode("a</s>b")
    assert len(ids) == 4
    assert ids[2] == 2
    assert tokenizer.decode(ids) == "ab"


def test_half_a_character_is_replaced_not_refused(opt_folder: pathlib.Path):
    tokenizer = load_tokenizer(opt_folder)
    first_byte = tokenizer.encode("é")[1]
    assert tokenizer.decode([first_byte]) == "\ufffd"


def test_tokens_that_only_the_model_has_are_no_text(opt_folder: pathlib.Path):
    assert load_tokenizer(opt_folder).decode([299_999]) == ""


def test_no_bos_where_the_config_asks_for_none(copied: pathlib.Path):
    write_json(copied / "tokenizer_config.json", OPT_CONFIG | {"add_bos_token": False})
    assert load_tokenizer(copied).encode("") == []
    write_json(copied / "tokenizer_config.json", {"errors": "replace"})
    assert load_tokenizer(copied).encode("") == []


def test_opt_is_assumed_where_no_file_says_what_is_special(copied: pathlib.Path):
    (copied / "tokenizer_config.json").unlink()
    (copied / "special_tokens_map.json").unlink()
    tokenizer = load_tokenizer(copied)
    assert tokenizer.encode("")[0] == 2
    assert tokenizer.pad_token_id == 1


def test_tokenizer_json_without_bos_stays_without(tmp_path: pathlib.Path):
    """Galactica is published like this."""
    train_backend().save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("") == []
    assert tokenizer.eos_token_id is None


def test_tokenizer_json_obeys_an_explicit_add_bos_token(
    copied: pathlib.Path, tmp_path: pathlib.Path
):
    train_backend().save(str(copied / "tokenizer.json"))
    with_bos = load_tokenizer(copied)
    assert with_bos.encode("") == [2]
    with_bos.backend.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "tokenizer_config.json", {"add_bos_token": False})
    assert load_tokenizer(tmp_path).encode("") == []


def test_saved_truncation_and_padding_do_not_cut_prompts(copied: pathlib.Path):
    backend = train_backend()
    backend.enable_truncation(4)
    backend.enable_padding(length=9)
    backend.save(str(copied / "tokenizer.json"))
    tokenizer = load_tokenizer(copied)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert len(tokenizer.encode("a")) == 2


def test_a_folder_without_tokenizer_files_says_what_is_left(tmp_path: pathlib.Path):
    message = f"{re.escape(str(tmp_path))} has no tokenizer.*given as token ids"
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", "{", "vocab.json is not valid JSON"),
        ("vocab.json", "[]", "vocab.json holds a list, expected an object"),
        ("vocab.json", '{"a": "b"}', "vocab.json must map every token to an integer"),
        ("merges.txt", "#version: 0.2\nonly-one\n", "merges.txt is not a list of"),
        ("merges.txt", "#version: 0.2\nzzz qqq\n", "merges.txt is not a list of"),
        ("tokenizer.json", "{}", "tokenizer.json is not a valid tokenizer file"),
        ("tokenizer_config.json", "nonsense", "tokenizer_config.json is not valid"),
        ("special_tokens_map.json", '{"bos_token": 3}', "bos_token in .* is 3"),
    ],
)
def test_malformed_files_are_named(
    copied: pathlib.Path, name: str, content: str, message: str
):
    (copied / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(copied)


def test_bos_that_no_file_names_is_refused(tmp_path: pathlib.Path):
    train_backend().save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "tokenizer_config.json", {"add_bos_token": True})
    with pytest.raises(ValueError, match=r"add_bos_token.*no file names a bos_token"):
        load_tokenizer(tmp_path)


def test_text_that_is_no_unicode_is_refused(opt_folder: pathlib.Path):
    with pytest.raises(ValueError, match="not valid Unicode"):
        load_tokenizer(opt_folder).encode("\ud800")
