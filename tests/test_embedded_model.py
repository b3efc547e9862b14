"""The embedded model is complete, small and good; its training is reproducible."""

import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

import flexjax
from checkpoints_tools import train_embedded
from checkpoints_tools.training import (
    Recipe,
    Stream,
    bits_per_byte,
    draw_rows,
    held_out_nats,
    initial_weights,
    token_losses,
    train,
)
from flexjax.models.config import OPTConfig, read_config, tensor_shapes
from flexjax.models.opt import forward, unflatten
from flexjax.tokenizer import load_tokenizer

FOLDER = pathlib.Path(flexjax.__file__).parent / "embedded_model"
PREFIX = "model.decoder."
FILES = {
    "config.json",
    "generation_config.json",
    "heldout.txt",
    "model.safetensors",
    "README.md",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
MAX_BYTES = 8_000_000
MAX_HELD_OUT_BYTES = 150_000
MAX_BITS_PER_BYTE = 1.45  # on the beginnings of chapters, where 1.37 was measured
TINY = OPTConfig(
    vocab_size=300,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    ffn_dim=64,
    max_position_embeddings=32,
)
TINY_RECIPE = Recipe(
    steps=3,
    tokens_per_step=64,
    window=16,
    long_window=32,
    long_steps=1,
    warmup_steps=1,
    report_every=2,
    seed=7,
)


def embedded_tensors() -> dict[str, np.ndarray]:
    with safe_open(FOLDER / "model.safetensors", framework="np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def tiny_stream() -> Stream:
    tokens = np.random.default_rng(0).integers(4, TINY.vocab_size, 400)
    return Stream(tokens.astype(np.int32), np.arange(0, 400, 10))


def test_the_folder_is_complete_and_small():
    assert {path.name for path in FOLDER.iterdir()} == FILES
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert 100_000 < sizes.pop("heldout.txt") <= MAX_HELD_OUT_BYTES
    assert sum(sizes.values()) <= MAX_BYTES


def test_the_weights_are_those_that_the_config_calls_for():
    shapes = {PREFIX + n: s for n, s in tensor_shapes(read_config(FOLDER)).items()}
    tensors = embedded_tensors()
    assert {name: tensor.shape for name, tensor in tensors.items()} == shapes
    assert {tensor.dtype.name for tensor in tensors.values()} == {"bfloat16"}


def test_the_tokenizer_is_opts_and_keeps_the_held_out_text():
    tokenizer, config = load_tokenizer(FOLDER), read_config(FOLDER)
    text = (FOLDER / "heldout.txt").read_text()
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_token_id == config.bos_token_id
    assert tokenizer.eos_token_id == config.eos_token_id
    assert tokenizer.pad_token_id == config.pad_token_id
    assert tokenizer.vocab_size == config.vocab_size
    assert tokenizer.decode(ids) == text
    assert len(text.encode()) / len(ids) > 3


def test_the_model_predicts_text_that_it_has_not_seen():
    config, tokenizer = read_config(FOLDER), load_tokenizer(FOLDER)
    tensors = embedded_tensors()
    params = unflatten(
        {
            n.removeprefix(PREFIX): jnp.asarray(t, jnp.float32)
            for n, t in tensors.items()
        }
    )
    chapters = (FOLDER / "heldout.txt").read_text().split("\n\n")
    texts = [chapter[:900] for chapter in chapters[::3]]
    apply = jax.jit(functools.partial(forward, config=config))
    nats = 0.0
    for text in texts:
        ids = np.asarray(tokenizer.encode(text), np.int32)
        padded = np.pad(ids, (0, config.max_position_embeddings - len(ids)))
        logits = apply(params, jnp.asarray(padded[None]), jnp.zeros(1, jnp.int32))[0]
        log_p = jax.nn.log_softmax(logits[: len(ids) - 1])
        nats -= float(np.asarray(log_p)[np.arange(len(ids) - 1), ids[1:]].sum())
    num_bytes = sum(len(text.encode()) for text in texts)
    assert bits_per_byte(nats, num_bytes) < MAX_BITS_PER_BYTE


def test_the_corpus_and_the_held_out_chapters_do_not_overlap():
    documents = train_embedded.read_corpus(train_embedded.CORPUS)
    held_out = train_embedded.read_corpus(train_embedded.HELD_OUT)
    assert len(documents) == 259
    assert len(held_out) == 10
    seen = {line for text in documents for line in text.split("\n") if len(line) > 80}
    assert not seen.intersection("\n".join(held_out).split("\n"))


def test_the_same_seed_gives_the_same_run():
    reports = []
    with jax.numpy_dtype_promotion("standard"):  # optax's schedules need it
        runs = [
            train(TINY, TINY_RECIPE, tiny_stream(), lambda *args: reports.append(args))
            for _ in range(2)
        ]
    (params, losses), (again, losses_again) = runs
    assert losses == losses_again
    jax.tree.map(np.testing.assert_array_equal, params, again)
    assert [step for step, *_ in reports] == [2, 3, 2, 3]
    assert losses[0] == pytest.approx(math.log(TINY.vocab_size), rel=0.05)


def test_training_uses_the_model_that_inference_runs():
    params = initial_weights(TINY, seed=3)
    drawn = draw_rows(np.random.default_rng(1), tiny_stream(), 16, rows=4, bos=2)
    rows = jnp.asarray(drawn)
    losses = token_losses(params, rows, TINY, "float32")
    logits = forward(params, rows[:, :-1], jnp.zeros(4, jnp.int32), TINY)
    log_p = jax.nn.log_softmax(logits)
    expected = -np.take_along_axis(np.asarray(log_p), drawn[:, 1:, None], 2)[..., 0]
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-5)


def test_windows_begin_with_bos_and_a_paragraph():
    stream = tiny_stream()
    rows = draw_rows(np.random.default_rng(1), stream, 20, rows=50, bos=2)
    assert rows.shape == (50, 21)
    assert set(rows[:, 0]) == {2}
    assert set(rows[:, 1]) <= set(stream.tokens[stream.starts])


def test_held_out_tokens_are_counted_once():
    params = initial_weights(TINY, seed=3)
    long = list(range(4, 4 + TINY.max_position_embeddings + 5))
    nats, count = held_out_nats(params, [long, long[:3]], TINY, "float32")
    assert count == len(long) + 3
    assert nats / count == pytest.approx(math.log(TINY.vocab_size), rel=0.05)


def test_a_written_checkpoint_can_be_read_back(tmp_path: pathlib.Path):
    documents = ["It is a truth\nuniversally acknowledged", "that a single man"]
    tokenizer = train_embedded.train_tokenizer(documents, TINY.vocab_size)
    again = train_embedded.train_tokenizer(documents, TINY.vocab_size)
    assert tokenizer.to_str() == again.to_str()
    params = initial_weights(TINY, seed=0)
    train_embedded.write_checkpoint(tmp_path, params, TINY, tokenizer)
    assert {path.name for path in tmp_path.iterdir()} == FILES - {
        "heldout.txt",
        "README.md",
    }
    assert read_config(tmp_path).hidden_size == TINY.hidden_size
    stream = train_embedded.make_stream(tokenizer, documents, TINY.eos_token_id)
    text = load_tokenizer(tmp_path).backend.decode(stream.tokens.tolist(), False)
    assert text == "</s>".join([*documents, ""])
    assert len(stream.starts) == 3
