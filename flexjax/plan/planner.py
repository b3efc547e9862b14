"""From what a user says to a plan: models before their weights, allowed policies."""

import dataclasses
import math
import pathlib
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from checkpoints_tools.open_source import open_source
from checkpoints_tools.resolve import AUTO, HUB_ID, choose_dtype
from flexjax.checkpoint import is_store, read_manifest
from flexjax.models.config import (
    OPTConfig,
    named_config,
    published_name,
    read_config,
    read_dtype,
)
from flexjax.plan.closed_form import Model
from flexjax.plan.hardware import Hardware
from flexjax.plan.job import Job
from flexjax.plan.search import Plan, search, with_exact_peak
from flexjax.policy import ACTIVATION_BITS, Policy
from flexjax.quant import Quantization
from flexjax.store_format import DTYPES, Manifest, planned_entries

# What a user who allows quantized tensors gets tried, beside nothing: (weights, cache).
QUANTIZED = ((8, None), (4, None), (8, 8), (4, 4))


class Found(NamedTuple):
    """A model by its name: with its manifest where there is a store of it."""

    config: OPTConfig
    dtype: np.dtype
    manifest: Manifest | None = None

    @property
    def template(self) -> Policy:
        """A policy that takes the weights as they are stored."""
        return template_of(self.manifest and self.manifest.quantization)

    def model(self, policy: Policy) -> Model:
        """The model as it would be stored for a policy, or is already.

        Raises:
            ValueError: groups do not divide the rows of a tensor, which is named.
        """
        how = None
        if policy.weight_bits is not None:
            how = Quantization(
                bits=policy.weight_bits,
                group_size=policy.group_size,
                dtype=self.dtype.name,
            )
        if self.manifest is not None and self.manifest.quantization == how:
            tensors = self.manifest.tensors
        else:
            tensors = planned_entries(self.config, self.dtype, how)
        return Model(config=self.config, dtype=self.dtype, tensors=tensors)


def template_of(how: Quantization | None) -> Policy:
    """A policy that takes weights that are quantized so, or are not."""
    if how is None:
        return Policy()
    return Policy(weight_bits=how.bits, group_size=how.group_size)


def find_model(name: str, *, platform: str) -> Found:
    """A folder with a checkpoint or a store, a published model, or a Hub id.

    A published model is known here, and is in bfloat16. Of another one on the Hub only
    the config is fetched.

    Args:
        name: of the folder or the model.
        platform: JAX's name of what will compute: a CPU takes float16 as bfloat16.

    Raises:
        ValueError: it is none of them, or not an OPT model.
        OSError: the Hub cannot be reached.
    """
    folder = pathlib.Path(name)
    if not folder.is_dir():
        if published_name(name) or not re.fullmatch(HUB_ID, name):
            return Found(named_config(name), DTYPES["bfloat16"])
        return _on_hub(name, platform)
    if is_store(folder):
        manifest = read_manifest(folder)
        return Found(manifest.config, manifest.dtype, manifest)
    source = open_source(folder)
    return Found(source.config, choose_dtype(AUTO, source.dtype, platform))


def _on_hub(name: str, platform: str) -> Found:
    # Imported where it is needed: the Hub's client takes a second to load.
    from checkpoints_tools.hub import download_config

    folder = download_config(name)
    config, stated = read_config(folder), read_dtype(folder)
    if stated not in DTYPES:
        raise ValueError(
            f"{name} has weights of {stated}, expected one of {', '.join(DTYPES)}"
        )
    return Found(config, choose_dtype(AUTO, DTYPES[stated], platform))


def allowed_policies(
    *,
    quantized: bool,
    host_attention: bool,
    rounded: bool = False,
    base: Policy | None = None,
) -> list[Policy]:
    """What the search may choose besides placement and sizes.

    Weights that are quantized already stay as they are. Where it may quantize, it may
    also round activations if these are `rounded`.
    """
    base = base or Policy()
    bits = [(base.weight_bits, base.kv_cache_bits, base.activation_bits)]
    if quantized:
        bits += [
            (*pair, activation_bits)
            for pair in QUANTIZED
            if base.weight_bits in (None, pair[0])
            for activation_bits in (None, *(ACTIVATION_BITS if rounded else ()))
        ]
    return [
        dataclasses.replace(
            base,
            weight_bits=weight_bits,
            kv_cache_bits=cache_bits,
            activation_bits=activation_bits,
            host_attention=on_host,
        )
        for weight_bits, cache_bits, activation_bits in bits
        for on_host in ((False, True) if host_attention else (False,))
    ]


def storable(found: Found, allowed: Sequence[Policy]) -> list[tuple[Model, Policy]]:
    """What is allowed of a model, each with the model as it would be stored.

    Raises:
        ValueError: it can be stored for none of them.
    """
    models: list[tuple[Model, Policy]] = []
    refusal: ValueError | None = None
    for policy in allowed:
        try:
            models.append((found.model(policy), policy))
        except ValueError as error:  # not every model's rows can be cut into groups
            refusal = error
    if not models:
        assert refusal is not None
        raise refusal
    return models


def make_plan(
    found: Found,
    hardware: Hardware,
    job: Job,
    allowed: Sequence[Policy],
    *,
    most_block_s: float = math.inf,
) -> tuple[Plan, Model]:
    """The best plan that one of `allowed` gives, and the model as it would be stored.

    Raises:
        ValueError: not even one prompt fits, whatever is allowed.
    """
    models = storable(found, allowed)
    return best_plan(models, hardware, job, most_block_s=most_block_s)


def best_plan(
    allowed: Sequence[tuple[Model, Policy]],
    hardware: Hardware,
    job: Job,
    *,
    most_block_s: float = math.inf,
) -> tuple[Plan, Model]:
    """The fastest of the plans that models get, each with what it is stored for.

    Raises:
        ValueError: none of them fits; the message is that of the first.
    """
    plans: list[tuple[Plan, Model]] = []
    refusal: ValueError | None = None
    for model, policy in allowed:
        try:
            plan = search(model, hardware, job, policy, most_block_s=most_block_s)
            plans.append((plan, model))
        except ValueError as error:
            refusal = refusal or error
    if not plans:
        assert refusal is not None
        raise refusal
    plan, model = min(plans, key=lambda pair: pair[0].prediction.total_s)
    return with_exact_peak(plan, model, hardware.processor), model


def check_job(job: Job, config: OPTConfig) -> None:
    """Refuses a job that no policy can do.

    Raises:
        ValueError: a count is not positive, or the model has too few positions.
    """
    for field in dataclasses.fields(Job):
        count = getattr(job, field.name)
        least = 1 if field.default is dataclasses.MISSING else 0
        if count < least:
            raise ValueError(f"{field.name} is {count}, expected at least {least}")
    length = job.num_shared + job.prompt_len + job.gen_len
    most = config.max_position_embeddings
    if length > most:
        raise ValueError(
            f"prompt_len and gen_len make {length} tokens, but the model has {most} "
            "positions; shorten one of them"
        )
