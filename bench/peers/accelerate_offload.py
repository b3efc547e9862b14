# pyright: reportMissingImports=false
"""Runs an OPT checkpoint with Hugging Face accelerate, offloaded; a script of its own.

It runs in the peers' environment (`make peers`) and imports nothing of flexjax.

Decoder layers stay in the checkpoint's safetensors files, without another copy. With
`--layers disk` accelerate maps each into memory when it is its turn. With `--layers
host` it keeps them all, as if they fitted: where the model computes in host memory the
files are mapped once, and what does not fit the kernel reads again.

A prefill of the same shape goes first, so that libraries are set up. Then the kernel
forgets what it has read of layers on disk, and the clock starts.
"""

import argparse
import json
import logging
import os
import pathlib
import resource
import sys
import time
import warnings

import accelerate
import numpy as np
import torch
import transformers

MODULES = (accelerate, torch, transformers)
PROGRESS_S = 10.0  # between two lines on stderr
# What is no decoder layer; not every OPT model has all of it.
RESIDENT = (
    "model.decoder.embed_tokens",
    "model.decoder.embed_positions",
    "model.decoder.project_in",
    "model.decoder.final_layer_norm",
    "model.decoder.project_out",
    "lm_head",
)


class StepClock:
    """Notes when each token of a batch is there; the streamer of `generate`."""

    def __init__(self, num_steps: int) -> None:
        self.arrivals_s: list[float] = []
        self._num_steps = num_steps
        self._has_prompts = False
        self._spoken_s = self._start_s = time.perf_counter()

    def put(self, _tokens: torch.Tensor) -> None:
        """Called once with the prompts, then once a step with its new tokens."""
        if not self._has_prompts:
            self._has_prompts = True
            return
        now_s = time.perf_counter()
        self.arrivals_s.append(now_s - self._start_s)
        if now_s - self._spoken_s > PROGRESS_S:
            self._spoken_s = now_s
            done = f"{len(self.arrivals_s)} of {self._num_steps} steps"
            print(f"{done}, {self.arrivals_s[-1]:.0f} s", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Called after the last step."""

    @property
    def prefill_s(self) -> float:
        return self.arrivals_s[0]

    @property
    def step_s(self) -> list[float]:
        """Seconds of each step after prefill."""
        return np.diff(self.arrivals_s).tolist()


def device_map(num_layers: int, layers_on: str, device: int | str) -> dict:
    """Where accelerate keeps each part of the model."""
    place = {"disk": "disk", "host": "cpu"}[layers_on]
    layers = {f"model.decoder.layers.{i}": place for i in range(num_layers)}
    return dict.fromkeys(RESIDENT, device) | layers


def load(
    folder: pathlib.Path, layers_on: str, device: int | str
) -> transformers.PreTrainedModel:
    """The model as accelerate offloads it, in the checkpoint's own dtype."""
    config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype="auto",
        device_map=device_map(config.num_hidden_layers, layers_on, device),
    )
    model.generation_config.eos_token_id = None  # every row runs to the end
    model.generation_config.pad_token_id = config.pad_token_id
    return model.eval()


def random_prompts(vocab_size: int, count: int, length: int) -> torch.Tensor:
    """The prompts that flexjax's benchmarks use."""
    ids = np.random.default_rng(0).integers(4, vocab_size, (count, length))
    return torch.from_numpy(ids)


def silence() -> None:
    """Turns off what is said of every run, so that progress can be seen."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="The following device_map keys")


def generate(
    model: transformers.PreTrainedModel,
    prompts: torch.Tensor,
    gen_len: int,
    clock: StepClock | None = None,
) -> torch.Tensor:
    """The most likely tokens after each prompt."""
    with torch.inference_mode():
        outputs = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            max_new_tokens=gen_len,
            streamer=clock,
        )
    return outputs[:, prompts.shape[1] :]


def drop_from_page_cache(folder: pathlib.Path) -> None:
    """Makes the kernel forget what it has read of the checkpoint."""
    for path in folder.glob("*.safetensors"):
        file = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def measure(args: argparse.Namespace) -> dict:
    """Loads, generates and returns the figures."""
    device = 0 if torch.cuda.is_available() else "cpu"
    # What others have read would not count against this process's memory cap.
    drop_from_page_cache(args.checkpoint)
    model = load(args.checkpoint, args.layers, device)
    vocab_size = model.config.vocab_size
    prompts = random_prompts(vocab_size, args.batch_size, args.prompt_len).to(device)
    generate(model, prompts, 1)
    drop_from_page_cache(args.checkpoint)
    clock = StepClock(args.gen_len)
    new_tokens = generate(model, prompts, args.gen_len, clock)
    assert new_tokens.shape == (args.batch_size, args.gen_len), new_tokens.shape
    decode_s = sum(clock.step_s)
    num_tokens = args.batch_size * args.gen_len
    return {
        "num_tokens": num_tokens,
        "tokens_per_s": num_tokens / (clock.prefill_s + decode_s),
        "prefill_s": clock.prefill_s,
        "decode_s": decode_s,
        "step_s": clock.step_s,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": {m.__name__: m.__version__ for m in MODULES},
    }


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="OPT with accelerate's offloading.", allow_abbrev=False
    )
    parser.add_argument("--checkpoint", type=pathlib.Path, required=True)
    parser.add_argument("--layers", choices=("disk", "host"), default="disk")
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--prompt-len", type=int, required=True)
    parser.add_argument("--gen-len", type=int, required=True)
    parser.add_argument("--json", type=pathlib.Path, required=True)
    return parser


if __name__ == "__main__":
    silence()
    parsed = build_parser().parse_args()
    parsed.json.write_text(json.dumps(measure(parsed)))
