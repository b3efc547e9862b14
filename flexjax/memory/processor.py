"""What a model's layout depends on of the device that computes."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from flexjax.kernels.decode_attention import is_attended
from flexjax.kernels.products import fitting_groups, is_multiplied
from flexjax.models.config import OPTConfig
from flexjax.policy import Policy
from flexjax.quant import cache_quantization
from flexjax.store_format import TensorEntry

Tensors = Mapping[str, TensorEntry]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processor:
    """What a layout depends on of the device.

    Attributes:
        is_host: whether it computes in the host's memory.
        multiplies_quantized: whether it multiplies with quantized weights as they are;
            else they are made wide first.
        has_attention_kernel: whether a kernel attends to caches that `is_attended`;
            else XLA does.
    """

    is_host: bool
    multiplies_quantized: bool = False
    has_attention_kernel: bool = False


def is_multiplied_narrow(entry: TensorEntry, processor: Processor) -> bool:
    """Whether a tensor that is multiplied with is quantized, and used so."""
    how = entry.quantization
    return (
        how is not None
        and processor.multiplies_quantized
        and is_multiplied(how, entry.used_shape[-1])
    )


def is_attended_by_kernel(
    policy: Policy, config: OPTConfig, dtype: np.dtype, processor: Processor
) -> bool:
    """Whether new tokens attend to a cache by the kernel: to what is in use alone."""
    cache_as = cache_quantization(policy, config, dtype)
    return (
        processor.has_attention_kernel
        and policy.attention_sparsity == 1
        and is_attended(dtype, config.head_dim, cache_as)
    )


def check_rounding(policy: Policy, multiplied: Tensors, processor: Processor) -> None:
    """Refuses `activation_bits` that some of the tensors to be multiplied cannot have.

    Raises:
        ValueError: a tensor, which is named, is not multiplied with as it is quantized.
    """
    bits = policy.activation_bits
    if bits is None:
        return
    for name, entry in multiplied.items():
        if not is_multiplied_narrow(entry, processor):
            reason = _why_wide(entry, multiplied, processor)
            raise ValueError(
                f"activation_bits={bits} cannot be had with {name}, {reason}, or leave "
                "activation_bits out"
            )


def _why_wide(entry: TensorEntry, multiplied: Tensors, processor: Processor) -> str:
    """Why a tensor is not multiplied with as it is quantized, and what to do."""
    how = entry.quantization
    if how is None:
        return f"which is {entry.dtype.name} and not quantized: give weight_bits"
    if not processor.multiplies_quantized:
        return "which is made wide before products here: compute elsewhere"
    if how.dtype != "bfloat16":
        return (
            f"which is quantized from {how.dtype}: quantize a checkpoint in dtype "
            "bfloat16"
        )
    fitting = fitting_groups(
        (tensor.quantization or how, tensor.used_shape[-1])
        for tensor in multiplied.values()
    )
    reason = (
        f"whose rows of {entry.used_shape[-1]} elements, of {how.bits} bits, are in "
        f"groups of {how.group_size}"
    )
    if not fitting:
        return f"{reason}, and no others would do: take another model"
    best = min(fitting, key=lambda size: abs(size - how.group_size))
    return f"{reason}: quantize a checkpoint with group_size {best}"
