"""Trains the embedded model: `python -m checkpoints_tools.train_embedded`.

Reads the corpus beside this file and the held-out chapters beside the model, trains a
byte-level BPE and a small OPT from a seed, and writes a Hugging Face checkpoint.
"""

import argparse
import dataclasses
import functools
import json
import lzma
import math
import pathlib
import statistics
import sys
import time
from typing import Any

import ml_dtypes
import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from checkpoints_tools.safetensors_writer import hugging_face_name
from checkpoints_tools.training import (
    Recipe,
    Stream,
    bits_per_byte,
    held_out_nats,
    train,
)
from flexjax.cli import run_command
from flexjax.models.config import OPTConfig, tensor_shapes, to_hugging_face
from flexjax.tokenizer import OPT_SPECIAL_TOKENS

CORPUS = pathlib.Path(__file__).parent / "corpus" / "austen.txt.xz"
EMBEDDED = pathlib.Path(__file__).parents[1] / "flexjax" / "embedded_model"
HELD_OUT = EMBEDDED / "heldout.txt"
STORED_DTYPE = "bfloat16"
SPECIAL_TOKENS = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}  # OPT's ids
MODEL = OPTConfig(
    vocab_size=2048,
    hidden_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    ffn_dim=1024,
    max_position_embeddings=512,
    word_embed_proj_dim=256,
)

README = """# The embedded model

A small OPT (pre-norm, relu, tied head) that flexjax runs when no model is named. It
writes in the manner of Jane Austen, and knows nothing else.

- **Size.** {parameters:,} parameters in bfloat16: {config.num_hidden_layers} layers of
  width {config.hidden_size}, {config.num_attention_heads} heads, {config.vocab_size}
  tokens, {config.max_position_embeddings} positions.
- **Text.** The six novels of Jane Austen, in the public domain, less ten chapters;
  `checkpoints_tools/corpus/README.md` says where they come from. Those ten chapters are
  `heldout.txt`: one paragraph a line, an empty line between chapters. No weight and no
  token was learnt from them.
- **Tokenizer.** A byte-level BPE trained on the same text, with OPT's special tokens;
  every prompt begins with `</s>`, which also stands between chapters.
- **Licence.** Weights and tokenizer are under the project's licence.
- **Training.** `python -m checkpoints_tools.train_embedded --seed {recipe.seed}`:
  {recipe.steps} steps of {recipe.tokens_per_step} tokens, {epochs:.1f} times the text.
  The last 100 steps had a mean loss of {train_loss:.3f} nats a token.
- **Held-out chapters**, bfloat16, windows of {config.max_position_embeddings} tokens:
  {held_loss:.3f} nats a token, perplexity {token_perplexity:.2f} a token and
  {byte_perplexity:.3f} a byte ({bits:.3f} bits a byte).
"""


def read_corpus(path: pathlib.Path) -> list[str]:
    """Documents of a text that has one paragraph a line, a blank line after each."""
    raw = path.read_bytes()
    text = (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode()
    return [document for document in text.strip("\n").split("\n\n") if document]


def train_tokenizer(documents: list[str], vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE in GPT-2's form, with OPT's special tokens and bos in front."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        documents,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bos = OPT_SPECIAL_TOKENS["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, SPECIAL_TOKENS[bos])]
    )
    return tokenizer


def make_stream(
    tokenizer: tokenizers.Tokenizer, documents: list[str], end: int
) -> Stream:
    """Joins the documents' tokens, each followed by the end token."""
    newline = tokenizer.encode("\n", add_special_tokens=False).ids
    tokens: list[int] = []
    starts: list[int] = []
    for document in documents:
        for paragraph in document.split("\n"):
            starts.append(len(tokens))
            ids = tokenizer.encode(paragraph, add_special_tokens=False).ids
            tokens += [*ids, *newline]
        tokens[-len(newline) :] = [end]
    return Stream(np.asarray(tokens, np.int32), np.asarray(starts, np.int32))


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Tensors of a parameter tree by dotted name."""
    flat: dict[str, Any] = {}
    for name, node in tree.items():
        path = f"{prefix}{name}"
        flat |= flatten(node, f"{path}.") if isinstance(node, dict) else {path: node}
    return flat


def write_checkpoint(
    out: pathlib.Path,
    params: dict[str, Any],
    config: OPTConfig,
    tokenizer: tokenizers.Tokenizer,
) -> None:
    """Writes weights, configuration and tokenizer as Hugging Face lays them out."""
    out.mkdir(parents=True, exist_ok=True)
    flat = flatten(params)
    dtype = ml_dtypes.bfloat16
    tensors = {
        hugging_face_name(name): np.asarray(flat[name]).astype(dtype)
        for name in tensor_shapes(config)
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # it is written for its owner only
    tokenizer.save(str(out / "tokenizer.json"))
    token_ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    files = {
        "config.json": to_hugging_face(config, STORED_DTYPE),
        "generation_config.json": token_ids,
        "special_tokens_map.json": OPT_SPECIAL_TOKENS,
        "tokenizer_config.json": OPT_SPECIAL_TOKENS
        | {
            "add_bos_token": True,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.max_position_embeddings,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    }
    for name, values in files.items():
        (out / name).write_text(json.dumps(values, indent=2) + "\n")


def make_embedded(out: pathlib.Path, recipe: Recipe) -> None:
    """The whole run, from text to checkpoint, with a line of progress now and then."""
    began = time.monotonic()
    documents, held_out = read_corpus(CORPUS), read_corpus(HELD_OUT)
    tokenizer = train_tokenizer(documents, MODEL.vocab_size)
    stream = make_stream(tokenizer, documents, MODEL.eos_token_id)
    held_ids = [
        tokenizer.encode(text, add_special_tokens=False).ids for text in held_out
    ]
    held_bytes = sum(len(text.encode()) for text in held_out)
    evaluate = functools.partial(
        held_out_nats, documents=held_ids, config=MODEL, dtype=STORED_DTYPE
    )
    print(f"{len(stream.tokens):,} tokens of text, {held_bytes:,} bytes held out")

    def report(step: int, loss: float, params: Any) -> None:
        line = f"step {step}: loss {loss:.3f}, {time.monotonic() - began:.0f} s"
        if step % (5 * recipe.report_every) == 0:
            nats, count = evaluate(params)
            line += f", held out {nats / count:.3f}"
        print(line, flush=True)

    params, losses = train(MODEL, recipe, stream, report)
    write_checkpoint(out, params, MODEL, tokenizer)
    nats, count = evaluate(params)
    bits = bits_per_byte(nats, held_bytes)
    text = README.format(
        config=MODEL,
        recipe=recipe,
        parameters=sum(math.prod(shape) for shape in tensor_shapes(MODEL).values()),
        epochs=recipe.steps * recipe.tokens_per_step / len(stream.tokens),
        train_loss=statistics.fmean(losses[-100:]),
        held_loss=nats / count,
        token_perplexity=math.exp(nats / count),
        byte_perplexity=2**bits,
        bits=bits,
    )
    (out / "README.md").write_text(text)
    print(text)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m checkpoints_tools.train_embedded", description=__doc__
    )
    parser.add_argument(
        "--out", type=pathlib.Path, default=EMBEDDED, help="folder of the checkpoint"
    )
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--steps", type=int, default=Recipe.steps)

    def command(args: argparse.Namespace) -> None:
        recipe = dataclasses.replace(Recipe(), seed=args.seed, steps=args.steps)
        make_embedded(args.out, recipe)

    return run_command(command, parser)


if __name__ == "__main__":
    sys.exit(main())
