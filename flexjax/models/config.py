"""The configuration of an OPT model, with Hugging Face's field names.

Everything that can be known about a model without its weights: the shape of every
tensor, and which tensors one schedulable layer needs.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

CONFIG_FILE = "config.json"
ACTIVATIONS = ("relu", "gelu")
POSITION_OFFSET = 2  # OPT's position table starts with two rows that no token uses
LAYER_NORM_EPSILON = 1e-5  # torch's default, which every OPT checkpoint relies on


@dataclasses.dataclass(frozen=True, kw_only=True)
class OPTConfig:
    """An OPT model's hyper-parameters; names and defaults are Hugging Face's."""

    vocab_size: int = 50272
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    ffn_dim: int = 3072
    max_position_embeddings: int = 2048
    word_embed_proj_dim: int | None = None  # None: hidden_size
    do_layer_norm_before: bool = True
    _remove_final_layer_norm: bool = False
    layer_norm_elementwise_affine: bool = True
    enable_bias: bool = True
    activation_function: str = "relu"
    tie_word_embeddings: bool = True
    pad_token_id: int = 1
    bos_token_id: int = 2
    eos_token_id: int = 2

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def embed_dim(self) -> int:
        """Width of the token table: 350m's is narrower than its hidden state."""
        return self.word_embed_proj_dim or self.hidden_size

    @property
    def is_projected(self) -> bool:
        return self.embed_dim != self.hidden_size

    @property
    def has_final_layer_norm(self) -> bool:
        return self.do_layer_norm_before and not self._remove_final_layer_norm

    @property
    def head_table(self) -> str:
        """Name of the table that turns hidden states into logits."""
        return "embed_tokens.weight" if self.tie_word_embeddings else "lm_head.weight"


def parse_config(values: Mapping[str, Any], origin: str) -> OPTConfig:
    """Reads a Hugging Face `config.json` that was already parsed.

    Raises:
        ValueError: not an OPT model, or one that this implementation cannot run;
            the message names `origin` and the field.
    """
    if values.get("model_type") != "opt":
        raise ValueError(
            f"{origin}: model_type is {values.get('model_type')!r}, but only 'opt' is "
            "supported; give an OPT, OPT-IML or Galactica checkpoint"
        )
    known = {field.name for field in dataclasses.fields(OPTConfig)}
    config = OPTConfig(
        **{
            name: value
            for name, value in values.items()
            if name in known and value is not None
        }
    )
    _validate(config, origin)
    return config


def _validate(config: OPTConfig, origin: str) -> None:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type is bool and type(value) is not bool:
            raise ValueError(
                f"{origin}: {field.name} is {value!r}, expected true or false"
            )
        is_count = field.type in (int, int | None) and value is not None
        least = 0 if field.name.endswith("_token_id") else 1
        if is_count and (type(value) is not int or value < least):
            raise ValueError(
                f"{origin}: {field.name} is {value!r}, expected an integer of at "
                f"least {least}"
            )
    if config.activation_function not in ACTIVATIONS:
        raise ValueError(
            f"{origin}: activation_function is {config.activation_function!r}, "
            f"supported are {', '.join(ACTIVATIONS)}"
        )
    if config.pad_token_id >= config.vocab_size:
        raise ValueError(
            f"{origin}: pad_token_id is {config.pad_token_id}, but vocab_size is "
            f"{config.vocab_size}: padding has no row in the table of tokens"
        )
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"{origin}: hidden_size {config.hidden_size} is not a multiple of "
            f"num_attention_heads {config.num_attention_heads}"
        )


def read_config(folder: pathlib.Path) -> OPTConfig:
    """Reads `folder/config.json`.

    Raises:
        ValueError: the file is missing, is not JSON, or does not describe an OPT model.
    """
    return parse_config(_read_values(folder), str(folder / CONFIG_FILE))


def read_dtype(folder: pathlib.Path) -> str:
    """The type that `folder/config.json` says the weights have, such as "float16".

    Raises:
        ValueError: the file is missing or is not JSON.
    """
    values = _read_values(folder)
    return str(values.get("dtype") or values.get("torch_dtype") or "float32")


def _read_values(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ValueError(
            f"{folder} has no config.json; give a folder with a Hugging Face checkpoint"
        )
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, expected an object")
    return values


def to_hugging_face(config: OPTConfig, dtype: str) -> dict[str, Any]:
    """The content of the `config.json` that `parse_config` reads back as `config`.

    The width of the token table is written out, even where it is the hidden state's.
    """
    values = dataclasses.asdict(config)
    values["word_embed_proj_dim"] = config.embed_dim
    return values | {
        "model_type": "opt",
        "architectures": ["OPTForCausalLM"],
        "dtype": dtype,
        "torch_dtype": dtype,  # the name that transformers before version 5 reads
        "dropout": 0.0,
        "attention_dropout": 0.0,
    }


Shapes = dict[str, tuple[int, ...]]


def _linear(name: str, outputs: int, inputs: int, bias: bool) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (outputs, inputs)}
    return shapes | ({f"{name}.bias": (outputs,)} if bias else {})


def _layer_norm(name: str, size: int, affine: bool) -> Shapes:
    return {f"{name}.{part}": (size,) for part in ("weight", "bias")} if affine else {}


def embedding_shapes(config: OPTConfig) -> Shapes:
    """Tensors of the embedding: token table, position table, and 350m's projection."""
    hidden, embed = config.hidden_size, config.embed_dim
    positions = config.max_position_embeddings + POSITION_OFFSET
    shapes: Shapes = {
        "embed_tokens.weight": (config.vocab_size, embed),
        "embed_positions.weight": (positions, hidden),
    }
    if config.is_projected:
        shapes |= _linear("project_in", hidden, embed, bias=False)
    return shapes


def decoder_layer_shapes(config: OPTConfig) -> Shapes:
    """Tensors of one decoder layer, by their names inside the layer."""
    hidden, bias = config.hidden_size, config.enable_bias
    affine = config.layer_norm_elementwise_affine
    shapes: Shapes = {}
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        shapes |= _linear(f"self_attn.{name}", hidden, hidden, bias)
    shapes |= _layer_norm("self_attn_layer_norm", hidden, affine)
    shapes |= _linear("fc1", config.ffn_dim, hidden, bias)
    shapes |= _linear("fc2", hidden, config.ffn_dim, bias)
    return shapes | _layer_norm("final_layer_norm", hidden, affine)


def final_shapes(config: OPTConfig) -> Shapes:
    """Tensors between the last decoder layer and the table of logits."""
    affine = config.layer_norm_elementwise_affine and config.has_final_layer_norm
    shapes = _layer_norm("final_layer_norm", config.hidden_size, affine)
    if config.is_projected:
        shapes |= _linear(
            "project_out", config.embed_dim, config.hidden_size, bias=False
        )
    return shapes


def tensor_shapes(config: OPTConfig) -> Shapes:
    """Shape of every tensor of a model; a tied table is named once.

    Names are Hugging Face's without the `model.decoder.` in front.
    """
    shapes = embedding_shapes(config)
    for layer in range(config.num_hidden_layers):
        for name, shape in decoder_layer_shapes(config).items():
            shapes[f"layers.{layer}.{name}"] = shape
    shapes |= final_shapes(config)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.embed_dim)
    return shapes


def layer_tensors(config: OPTConfig, layer: int) -> list[str]:
    """Tensors that decoder layer `layer` of a run needs, in the order of their use.

    The first layer embeds the tokens, whose rows of the token table are looked up
    apart; the last one ends in the final norm.
    """
    names = [f"layers.{layer}.{name}" for name in decoder_layer_shapes(config)]
    if layer == 0:
        names = [*embedding_shapes(config)][1:] + names
    if layer == config.num_hidden_layers - 1:
        names += final_shapes(config)
    return names


def _sized(layers: int, heads: int, hidden: int, **other: Any) -> OPTConfig:
    return OPTConfig(
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_size=hidden,
        ffn_dim=4 * hidden,
        **other,
    )


_OWNER = "facebook/"  # of all published models, on the Hub
_OPT_SIZES = {
    "125m": (12, 12, 768),
    "1.3b": (24, 32, 2048),
    "2.7b": (32, 32, 2560),
    "6.7b": (32, 32, 4096),
    "13b": (40, 40, 5120),
    "30b": (48, 56, 7168),
    "66b": (64, 72, 9216),
    "175b": (96, 96, 12288),
}
_GALACTICA_SIZES = {
    "125m": (12, 12, 768),
    "1.3b": (24, 32, 2048),
    "6.7b": (32, 32, 4096),
    "30b": (48, 56, 7168),
    "120b": (96, 80, 10240),
}

# Sizes of table 1 of the OPT paper (arXiv 2205.01068) and table 5 of Galactica's
# (arXiv 2211.09085); 350m is the one post-norm model with a narrow token table.
MODELS: dict[str, OPTConfig] = (
    {f"opt-{name}": _sized(*size) for name, size in _OPT_SIZES.items()}
    | {
        "opt-350m": _sized(
            24, 16, 1024, word_embed_proj_dim=512, do_layer_norm_before=False
        )
    }
    | {
        f"opt-iml-{kind}{name}": _sized(*_OPT_SIZES[name])
        for kind in ("", "max-")
        for name in ("1.3b", "30b")
    }
    | {
        f"galactica-{name}": _sized(
            *size, vocab_size=50000, activation_function="gelu", bos_token_id=0
        )
        for name, size in _GALACTICA_SIZES.items()
    }
)


def published_name(name: str) -> str | None:
    """What `MODELS` calls a model, such as `facebook/OPT-6.7B`; None: not published.

    The same name of another owner is another model.
    """
    short = name.lower().removeprefix(_OWNER)
    return short if short in MODELS else None


def named_config(name: str) -> OPTConfig:
    """The configuration of a published model, such as `facebook/opt-6.7b`.

    Raises:
        ValueError: there is no such model; the message lists those that there are.
    """
    short = published_name(name)
    if short is None:
        raise ValueError(
            f"unknown model {name!r}; known are {', '.join(sorted(MODELS))}"
        )
    return MODELS[short]
