"""From what a user calls a model to a weight store that can run."""

import contextlib
import fcntl
import hashlib
import logging
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from checkpoints_tools.hugging_face import copy_tokenizer
from checkpoints_tools.open_source import open_source
from checkpoints_tools.source import Source
from checkpoints_tools.store_conversion import convert_to_store
from flexjax.cache_folder import default_cache
from flexjax.checkpoint import is_store, read_manifest
from flexjax.memory.layout import multiplied
from flexjax.memory.link import Device, ensure_rounds, processor_of
from flexjax.memory.processor import check_rounding
from flexjax.models.config import OPTConfig
from flexjax.policy import Policy
from flexjax.quant import Quantization
from flexjax.safe_files import make_folder
from flexjax.store_format import DTYPES, TensorEntry, planned_entries

AUTO = "auto"
HUB_ID = r"\w[\w.-]*/\w[\w.-]*"  # owner/name

logger = logging.getLogger(__name__)


def resolve_model(
    model: str | os.PathLike[str],
    dtype: str = AUTO,
    cache_dir: str | os.PathLike[str] | None = None,
    *,
    platform: str = "cpu",
    weight_bits: int | None = None,
    group_size: int = Policy.group_size,
    check: Callable[[OPTConfig, Mapping[str, TensorEntry]], object] = lambda *_: None,
) -> pathlib.Path:
    """The folder of a weight store of `model` in `dtype`, converted if need be.

    Args:
        model: a weight store, a folder with a checkpoint, or a Hub id.
        dtype: "auto" is the checkpoint's own, but bfloat16 for float16 on a CPU, which
            computes float16 slowly.
        cache_dir: where conversions are kept (`default_cache` if not given).
        platform: JAX's name of what will compute, such as "cpu" or "gpu".
        weight_bits: 4 or 8: the decoder layers' matrices quantized so; None: as stored.
        group_size: elements that share a scale and a minimum, where they are.
        check: called with what the store holds before it is made, and before a Hub's
            model is fetched; what it raises is raised here.

    Raises:
        ValueError: no such model, not an OPT model, a damaged one, or one that is
            quantized in another way.
        OSError: the conversion could not be written.
    """
    if dtype != AUTO and dtype not in DTYPES:
        raise ValueError(
            f"dtype is {dtype!r}, expected one of {', '.join([AUTO, *DTYPES])}"
        )

    def quantization(dtype: np.dtype) -> Quantization | None:
        if weight_bits is None:
            return None
        return Quantization(bits=weight_bits, group_size=group_size, dtype=dtype.name)

    def check_plan(config: OPTConfig, dtype: np.dtype) -> None:
        check(config, planned_entries(config, dtype, quantization(dtype)))

    # A config alone may be wrong about the weights' own dtype.
    likely = DTYPES["bfloat16" if dtype == AUTO else dtype]
    folder, notice = _find(model, lambda config: check_plan(config, likely)), ""
    if is_store(folder):
        manifest = read_manifest(folder)
        stored, how = manifest.dtype, manifest.quantization
        wanted = choose_dtype(dtype, stored, platform)
        if how is not None:
            asked: dict[str, str | int] = {} if dtype == AUTO else {"dtype": dtype}
            if weight_bits is not None:
                asked |= {"weight_bits": weight_bits, "group_size": group_size}
            _ensure_stored_so(folder, how, asked)
        if how is not None or (wanted == stored and weight_bits is None):
            check(manifest.config, manifest.tensors)
            return folder
        into = wanted.name if weight_bits is None else f"{weight_bits}-bit"
        notice = f"{folder} holds {stored.name}: making a {into} copy"
    source = open_source(folder)
    wanted = choose_dtype(dtype, source.dtype, platform)
    name = folder.resolve().name if pathlib.Path(model).is_dir() else str(model)
    cache = default_cache() if cache_dir is None else pathlib.Path(cache_dir)
    check_plan(source.config, wanted)
    return _cached(source, wanted, quantization(wanted), name, cache, notice)


def resolve_for(
    policy: Policy,
    model: str | os.PathLike[str],
    dtype: str = AUTO,
    *,
    device: Device,
) -> pathlib.Path:
    """The folder of the weight store that `policy` runs `model` from.

    What the policy asks of the device that computes, or of such weights, that they
    cannot have is refused before anything is fetched or converted.

    Raises:
        ValueError, OSError: as `resolve_model`, which tells of `model` and `dtype`.
    """
    ensure_rounds(policy, device)
    processor = processor_of(device, is_quantized=policy.activation_bits is not None)

    def check(config: OPTConfig, tensors: Mapping[str, TensorEntry]) -> None:
        check_rounding(policy, multiplied(config, tensors), processor)

    return resolve_model(
        model,
        dtype,
        platform=device.platform,
        weight_bits=policy.weight_bits,
        group_size=policy.group_size,
        check=check,
    )


def _find(
    model: str | os.PathLike[str], check: Callable[[OPTConfig], object]
) -> pathlib.Path:
    """The folder of a model, which the Hub is asked for if `check` takes its config."""
    folder = pathlib.Path(model).expanduser()
    if folder.is_dir() and str(model):
        return folder
    if folder.exists() or not re.fullmatch(HUB_ID, str(model)):
        raise ValueError(
            f"{str(model)!r} is neither a folder nor a Hub id; give a folder with a "
            "checkpoint or a weight store, or a Hub id such as facebook/opt-125m"
        )
    # Imported where it is needed: the Hub's client takes a second to load.
    from checkpoints_tools.hub import download

    return download(str(model), check)


def _ensure_stored_so(
    folder: pathlib.Path, how: Quantization, asked: Mapping[str, str | int]
) -> None:
    """Refuses a quantized store that is not as asked: nothing can be made of it."""
    there = {"weight_bits": how.bits, "group_size": how.group_size, "dtype": how.dtype}
    for name, value in asked.items():
        if value != there[name]:
            raise ValueError(
                f"{folder} was quantized with {name}={there[name]}, but {name}={value} "
                f"is asked for; ask for {name}={there[name]}, or give the checkpoint "
                "that it was made from"
            )


def choose_dtype(dtype: str, own: np.dtype, platform: str) -> np.dtype:
    """What a model is stored in that has `own` type; see `resolve_model`."""
    if dtype != AUTO:
        return DTYPES[dtype]
    if own == DTYPES["float16"] and platform == "cpu":
        return DTYPES["bfloat16"]
    return own


def _cached(
    source: Source,
    dtype: np.dtype,
    how: Quantization | None,
    name: str,
    cache: pathlib.Path,
    notice: str,
) -> pathlib.Path:
    """The store of `source` in the cache; another state of the source is another.

    But its tokenizer is that of the source as it is now: nothing has to be converted
    again for it. `notice` is what to say before a store is made.
    """
    kind = dtype.name
    if how is not None:
        kind += f"-{how.bits}bit-{how.group_size}"
    key = hashlib.sha256(f"{source.fingerprint}/{kind}".encode()).hexdigest()[:12]
    store = cache / f"{name.replace('/', '--')}-{kind}-{key}"
    # Looked at without the writer's lock: two programs may start from one store.
    if not _is_made(store, source):
        with _turn(store, name):
            if not _is_made(store, source):
                if notice:
                    logger.warning(notice)
                convert_to_store(source, store, dtype, f"making {store.name}", how)
    copy_tokenizer(source.folder, store)
    return store


def _is_made(store: pathlib.Path, source: Source) -> bool:
    return is_store(store) and read_manifest(store).source == source.fingerprint


@contextlib.contextmanager
def _turn(store: pathlib.Path, name: str) -> Iterator[None]:
    """Waits until no other process makes `store`."""
    make_folder(store.parent)
    with open(store.with_name(f".{store.name}.lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("waiting for another process that converts %s", name)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
