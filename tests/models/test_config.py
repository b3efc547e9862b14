"""What is known of a model without its weights: sizes, tensors, and bad configs."""

import collections
import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexjax.models.config import (
    MODELS,
    OPTConfig,
    layer_tensors,
    named_config,
    parse_config,
    read_config,
    tensor_shapes,
    to_hugging_face,
)

GOOD = {
    "model_type": "opt",
    "vocab_size": 97,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 32,
    "max_position_embeddings": 50,
}


@st.composite
def configs(draw):
    """Every kind of OPT there is, and kinds there might be."""
    heads, flags = draw(st.integers(1, 4)), st.booleans()
    hidden = heads * draw(st.integers(1, 4))
    return OPTConfig(
        vocab_size=draw(st.integers(2, 99)),
        hidden_size=hidden,
        num_hidden_layers=draw(st.integers(1, 5)),
        num_attention_heads=heads,
        ffn_dim=draw(st.integers(1, 20)),
        max_position_embeddings=draw(st.integers(1, 20)),
        word_embed_proj_dim=draw(st.just(hidden) | st.integers(1, 20)),
        do_layer_norm_before=draw(flags),
        _remove_final_layer_norm=draw(flags),
        layer_norm_elementwise_affine=draw(flags),
        enable_bias=draw(flags),
        activation_function=draw(st.sampled_from(["relu", "gelu"])),
        tie_word_embeddings=draw(flags),
        eos_token_id=draw(st.integers(0, 9)),
    )


def num_parameters(config):
    return sum(math.prod(shape) for shape in tensor_shapes(config).values())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("facebook/opt-125m", 125_239_296),
        ("facebook/opt-350m", 331_196_416),
        ("facebook/opt-1.3b", 1_315_758_080),
        ("facebook/opt-2.7b", 2_651_596_800),
        ("facebook/opt-6.7b", 6_658_473_984),
        ("facebook/opt-13b", 12_853_473_280),
        ("facebook/opt-30b", 29_974_540_288),
    ],
)
def test_models_have_the_published_number_of_parameters(name, expected):
    assert num_parameters(named_config(name)) == expected


@pytest.mark.parametrize("name", MODELS)
def test_models_are_as_large_as_their_names_say(name):
    size = name.rpartition("-")[2]
    said = float(size[:-1]) * {"m": 1e6, "b": 1e9}[size[-1]]
    off = 0.06 if name == "opt-350m" else 0.02  # whose published size is 331 million
    assert num_parameters(named_config(name)) == pytest.approx(said, rel=off)


def test_the_smallest_model_reads_as_the_paper_says():
    config = named_config("opt-125m")
    assert (config.num_hidden_layers, config.hidden_size) == (12, 768)
    shapes = tensor_shapes(config)
    assert shapes["embed_tokens.weight"] == (50272, 768)
    assert shapes["embed_positions.weight"] == (2050, 768)  # two rows nobody uses
    assert shapes["layers.11.fc1.weight"] == (3072, 768)
    assert shapes["final_layer_norm.bias"] == (768,)
    assert "lm_head.weight" not in shapes


def test_the_post_norm_model_projects_its_narrow_table_and_has_no_final_norm():
    shapes = tensor_shapes(named_config("opt-350m"))
    assert shapes["embed_tokens.weight"] == (50272, 512)
    assert shapes["project_in.weight"] == (1024, 512)
    assert shapes["project_out.weight"] == (512, 1024)
    assert "final_layer_norm.weight" not in shapes


@pytest.mark.parametrize("name", ["facebook/opt-6.7b", "OPT-6.7B", "opt-6.7b"])
def test_a_model_is_found_with_or_without_its_owner(name):
    assert named_config(name) is MODELS["opt-6.7b"]


def test_an_unknown_model_is_refused_with_those_there_are():
    with pytest.raises(
        ValueError, match=r"^unknown model 'gpt2'; known are galactica-1.*, opt-6.7b"
    ):
        named_config("gpt2")
    with pytest.raises(ValueError, match="unknown model 'someone/opt-1.3b'"):
        named_config("someone/opt-1.3b")


@given(config=configs())
def test_layers_need_every_tensor_but_the_tables_exactly_once(config):
    needed = collections.Counter(
        name
        for layer in range(config.num_hidden_layers)
        for name in layer_tensors(config, layer)
    )
    tables = {"embed_tokens.weight", config.head_table}
    assert needed == dict.fromkeys(set(tensor_shapes(config)) - tables, 1)
    assert tables <= set(tensor_shapes(config))


@given(config=configs())
def test_flags_take_tensors_away(config):
    names = {name.rpartition(".")[0]: name for name in tensor_shapes(config)}
    shapes = tensor_shapes(config)
    assert any("layer_norm" in name for name in names) == (
        config.layer_norm_elementwise_affine
    )
    assert ("layers.0.fc1.bias" in shapes) == config.enable_bias
    assert ("lm_head" in names) != config.tie_word_embeddings
    assert ("project_in" in names) == ("project_out" in names) == config.is_projected
    assert ("final_layer_norm" in names) == (
        config.has_final_layer_norm and config.layer_norm_elementwise_affine
    )


@given(config=configs(), dtype=st.sampled_from(["float32", "float16", "bfloat16"]))
def test_a_config_survives_hugging_face_s_form(config, dtype):
    values = json.loads(json.dumps(to_hugging_face(config, dtype)))
    assert parse_config(values, "config.json") == config
    assert values["dtype"] == values["torch_dtype"] == dtype


@pytest.mark.parametrize("name", MODELS)
def test_a_published_config_survives_it_with_the_table_s_width_written_out(name):
    config = MODELS[name]
    read = parse_config(to_hugging_face(config, "float16"), "config.json")
    assert read == dataclasses.replace(config, word_embed_proj_dim=config.embed_dim)
    assert tensor_shapes(read) == tensor_shapes(config)


def test_what_is_unknown_or_null_in_a_config_is_left_at_the_default():
    values = GOOD | {"use_cache": True, "word_embed_proj_dim": None}
    assert parse_config(values, "config.json") == parse_config(GOOD, "config.json")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("vocab_size", 0, "an integer of at least 1"),
        ("hidden_size", -16, "an integer of at least 1"),
        ("num_hidden_layers", 2.5, "an integer of at least 1"),
        ("num_attention_heads", "4", "an integer of at least 1"),
        ("ffn_dim", True, "an integer of at least 1"),
        ("max_position_embeddings", 0, "an integer of at least 1"),
        ("word_embed_proj_dim", -8, "an integer of at least 1"),
        ("word_embed_proj_dim", 0, "an integer of at least 1"),
        ("eos_token_id", -1, "an integer of at least 0"),
        ("pad_token_id", [1], "an integer of at least 0"),
        ("enable_bias", "false", "true or false"),
        ("do_layer_norm_before", 1, "true or false"),
    ],
)
def test_a_bad_field_is_refused_by_its_name(name, value, expected):
    with pytest.raises(ValueError, match=r".") as caught:
        parse_config(GOOD | {name: value}, "some/config.json")
    message = f"some/config.json: {name} is {value!r}, expected {expected}"
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_function": "silu"}, r"activation_function is 'silu', .* relu, "),
        ({"pad_token_id": 97}, r"pad_token_id is 97, but vocab_size is 97: padding"),
        ({"num_attention_heads": 3}, r"hidden_size 16 is not a multiple of num_att"),
        ({"model_type": "llama"}, r"model_type is 'llama', but only 'opt' is suppor"),
        ({"model_type": None}, r"model_type is None, but only 'opt' is supported"),
    ],
)
def test_a_model_that_cannot_run_is_refused_with_the_reason(changes, message):
    with pytest.raises(ValueError, match=f"^some/config.json: {message}"):
        parse_config(GOOD | changes, "some/config.json")


def test_a_config_is_read_from_its_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(GOOD))
    assert read_config(tmp_path) == parse_config(GOOD, "")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not valid JSON: Expecting value"),
        (json.dumps(GOOD)[:-1], "is not valid JSON: Expecting ',' delimiter"),
        ("[1]", "holds a list, expected an object"),
        (b"\xff\xfe\xfa", "is not valid JSON: .* codec can't decode"),
    ],
)
def test_a_broken_config_is_named_with_what_is_wrong_in_it(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        read_config(tmp_path)
    assert str(caught.value).startswith(str(path))


def test_a_folder_without_a_config_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(
        ValueError, match=r"has no config.json; give a folder with a Hugging Face"
    ):
        read_config(tmp_path)
