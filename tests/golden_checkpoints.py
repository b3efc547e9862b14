"""The golden checkpoints and what Hugging Face answers for them (see golden/README)."""

import dataclasses
import pathlib

import numpy as np

from checkpoints_tools.open_source import open_source
from checkpoints_tools.store_conversion import convert_to_store

FOLDER = pathlib.Path(__file__).parent / "golden"
GOLDEN_NAMES = sorted(path.parent.name for path in FOLDER.glob("*/config.json"))


@dataclasses.dataclass(frozen=True)
class Golden:
    """One checkpoint, as a float32 store, and its answers."""

    folder: pathlib.Path
    store: pathlib.Path
    prompts: list[list[int]]
    prefill_logits: np.ndarray
    greedy_ids: list[list[int]]
    score_ids: list[list[int]]
    score_logprobs: np.ndarray


def load_golden(name: str, store: pathlib.Path) -> Golden:
    """Reads a checkpoint's answers and converts it into the folder `store`."""
    folder = FOLDER / name
    convert_to_store(open_source(folder), store, np.dtype(np.float32), name)
    answers = np.load(folder / "golden.npz")
    masks = answers["attention_mask"].astype(bool)
    return Golden(
        folder=folder,
        store=store,
        prompts=[
            ids[mask].tolist()
            for ids, mask in zip(answers["input_ids"], masks, strict=True)
        ],
        prefill_logits=answers["prefill_logits"],
        greedy_ids=answers["greedy_ids"][:, masks.shape[1] :].tolist(),
        score_ids=answers["score_ids"].tolist(),
        score_logprobs=answers["score_logprobs"],
    )
