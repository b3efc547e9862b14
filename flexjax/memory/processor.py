"""What a model's layout depends on of the device that computes."""

import dataclasses

from flexjax.kernels.products import is_multiplied
from flexjax.store_format import TensorEntry


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


def check_rounding(
    activation_bits: int, matrix: TensorEntry, processor: Processor
) -> None:
    """Refuses to round what is multiplied with weights such as `matrix`.

    Raises:
        ValueError: they are not multiplied with as they are quantized.
    """
    if is_multiplied_narrow(matrix, processor):
        return
    raise ValueError(
        f"activation_bits={activation_bits} is for weights that are multiplied with as "
        "they are quantized, and these are made wide: it takes a checkpoint in "
        "bfloat16, groups of a multiple of 32 that divide half of a row, a C++ "
        "compiler, and a CPU with AVX-512, its VNNI and its bfloat16, but no AMX; "
        "leave activation_bits out"
    )
