"""From what a user says to a plan: models before their weights, allowed policies."""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from flexjax.checkpoint import is_store, read_manifest
from flexjax.models.config import OPTConfig, named_config, read_config
from flexjax.plan.closed_form import Model
from flexjax.plan.hardware import Hardware
from flexjax.plan.predict import Job
from flexjax.plan.search import Plan, search
from flexjax.policy import Policy
from flexjax.quant import Quantization
from flexjax.store_format import planned_entries

# What a user who allows quantized tensors gets tried, beside nothing: (weights, cache).
QUANTIZED = ((8, None), (4, None), (8, 8), (4, 4))


def find_config(model: str) -> OPTConfig:
    """The configuration of a folder with a checkpoint or a store, or of a known model.

    Raises:
        ValueError: it is neither.
    """
    folder = pathlib.Path(model)
    if not folder.is_dir():
        return named_config(model)
    return read_manifest(folder).config if is_store(folder) else read_config(folder)


def model_of(config: OPTConfig, dtype: np.dtype, policy: Policy) -> Model:
    """The model as a policy would store it.

    Raises:
        ValueError: groups do not divide the rows of a tensor, which is named.
    """
    how = None
    if policy.weight_bits is not None:
        how = Quantization(
            bits=policy.weight_bits, group_size=policy.group_size, dtype=dtype.name
        )
    tensors = planned_entries(config, dtype, how)
    return Model(config=config, dtype=dtype, tensors=tensors)


def allowed_policies(
    *, quantized: bool, host_attention: bool, base: Policy | None = None
) -> list[Policy]:
    """What the search may choose besides placement and sizes."""
    base = base or Policy()
    bits = [(base.weight_bits, base.kv_cache_bits)]
    bits += QUANTIZED if quantized else ()
    return [
        dataclasses.replace(
            base,
            weight_bits=weight_bits,
            kv_cache_bits=cache_bits,
            host_attention=on_host,
        )
        for weight_bits, cache_bits in bits
        for on_host in ((False, True) if host_attention else (False,))
    ]


def make_plan(
    config: OPTConfig,
    dtype: np.dtype,
    hardware: Hardware,
    job: Job,
    allowed: Sequence[Policy],
) -> tuple[Plan, Model]:
    """The best plan that one of `allowed` gives, and the model as it would be stored.

    Raises:
        ValueError: not even one prompt fits, whatever is allowed.
    """
    best: tuple[Plan, Model] | None = None
    refusal: ValueError | None = None
    for policy in allowed:
        model = model_of(config, dtype, policy)
        try:
            plan = search(model, hardware, job, policy)
        except ValueError as error:
            refusal = refusal or error
            continue
        if best is None or plan.prediction.total_s < best[0].prediction.total_s:
            best = plan, model
    if best is None:
        assert refusal is not None
        raise refusal
    return best


def check_job(job: Job, config: OPTConfig) -> None:
    """Refuses a job that no policy can do.

    Raises:
        ValueError: a count is not positive, or the model has too few positions.
    """
    for field in dataclasses.fields(Job):
        count = getattr(job, field.name)
        if count < 1:
            raise ValueError(f"{field.name} is {count}, expected at least 1")
    length, most = job.prompt_len + job.gen_len, config.max_position_embeddings
    if length > most:
        raise ValueError(
            f"prompt_len and gen_len make {length} tokens, but the model has {most} "
            "positions; shorten one of them"
        )
