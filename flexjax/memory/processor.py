"""What a model's layout depends on of the device that computes."""

import dataclasses
from collections.abc import Mapping

from flexjax.kernels.products import GROUP_STEP, is_multiplied
from flexjax.policy import Policy
from flexjax.store_format import TensorEntry

Tensors = Mapping[str, TensorEntry]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processor:
    """What a layout depends on of the device.

    Attributes:
        is_host: whether it computes in the host's memory.
        multiplies_quantized: whether it multiplies with quantized weights as they are;
            else they are made wide first.
    """

    is_host: bool
    multiplies_quantized: bool = False


def is_multiplied_narrow(entry: TensorEntry, processor: Processor) -> bool:
    """Whether a tensor that is multiplied with is quantized, and used so."""
    how = entry.quantization
    return (
        how is not None
        and processor.multiplies_quantized
        and is_multiplied(how, entry.used_shape[-1])
    )


def check_activation_bits(policy: Policy, processor: Processor) -> None:
    """Refuses `activation_bits` that no store of weights could be used with.

    Raises:
        ValueError: they are not for this processor, or not for groups of this size.
    """
    bits = policy.activation_bits
    if bits is None:
        return
    if not processor.multiplies_quantized:
        raise ValueError(
            f"activation_bits={bits} is for processors that multiply with quantized "
            "weights as they are: a CPU with AVX-512, its VNNI and its bfloat16, but "
            "no AMX, and a C++ compiler; leave activation_bits out"
        )
    if policy.group_size % GROUP_STEP:
        raise ValueError(
            f"activation_bits={bits} takes groups of a multiple of {GROUP_STEP} "
            f"elements, but group_size is {policy.group_size}: change it, or leave "
            "activation_bits out"
        )


def check_rounding(policy: Policy, multiplied: Tensors, processor: Processor) -> None:
    """Refuses `activation_bits` that some of the tensors to be multiplied cannot have.

    Raises:
        ValueError: see `check_activation_bits`; or a tensor, which is named, is not
            multiplied with as it is quantized.
    """
    if policy.activation_bits is None:
        return
    check_activation_bits(policy, processor)
    for name, entry in multiplied.items():
        if is_multiplied_narrow(entry, processor):
            continue
        how = entry.quantization
        found = "not quantized"
        if how is not None:
            found = f"{how.dtype} in {how.bits} bits, in groups of {how.group_size}"
        raise ValueError(
            f"activation_bits={policy.activation_bits} cannot be had with {name}, "
            f"which is {found}: it takes a checkpoint in bfloat16, and groups that "
            "divide its rows, or half of them if it has 4 bits; leave activation_bits "
            "out"
        )
