"""The configuration of a model in the settings of a GGUF file."""

from __future__ import annotations

from typing import Any, TypeVar

from ...common.shown import one_line, shown
from ...model.config import InternLM3Config
from .reader import GGUFHeader

_ARCHITECTURE = "llama"
_DTYPES = {0: "float32", 1: "float16"}  # general.file_type; everything else in the dtype that models are trained in

T = TypeVar("T")
Number = TypeVar("Number", int, float)


def config_of(header: GGUFHeader) -> dict[str, Any]:
    """The contents of config.json.

    Raises:
        ValueError: another architecture, or settings that this runtime does not implement or no model can have.
    """
    settings = Settings(header)
    settings.only("split.count", 1, 0)  # first, since the later files of a split have no other settings
    architecture = settings.get("general.architecture", str)
    if architecture != _ARCHITECTURE:
        raise ValueError(
            f"{header.path}: general.architecture is {shown(architecture)}; this runtime runs {_ARCHITECTURE!r}, which "
            "InternLM3 is in GGUF files"
        )
    hidden, heads = settings.number("llama.embedding_length", 0), settings.number("llama.attention.head_count", 0)
    head_dim = settings.number(
        "llama.attention.key_length", settings.number("llama.rope.dimension_count", hidden // heads)
    )
    settings.only("llama.attention.value_length", head_dim)
    settings.only("llama.attention.causal", True)
    settings.only("llama.rope.dimension_count", head_dim)
    settings.only("llama.expert_count", 0)
    if settings.get("llama.rope.scaling.type", str, "linear") != "linear":  # what a file means that does not say it
        settings.only("llama.rope.scaling.type", "none")
    else:
        for key in ("llama.rope.scaling.factor", "llama.rope.scale_linear"):
            settings.only(key, 1, 0)
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        found = "is missing" if embedding is None else f"has shape {list(embedding.shape)}; it must be a matrix"
        raise ValueError(f"{header.path}: 'token_embd.weight' {found}")
    values = {
        "architectures": ["InternLM3ForCausalLM"],
        "model_type": "internlm3",
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": settings.number("llama.feed_forward_length", 0),
        "num_hidden_layers": settings.number("llama.block_count", 0),
        "num_attention_heads": heads,
        "num_key_value_heads": settings.number("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": settings.number("llama.context_length", 0),
        # Stored in float32, whose neighbours of 1e-5 have longer names.
        "rms_norm_eps": float(f"{settings.number('llama.attention.layer_norm_rms_epsilon', 0.0):.6g}"),
        "rope_theta": settings.number("llama.rope.freq_base", 10000.0),
        "rope_scaling": None,
        "qkv_bias": "blk.0.attn_q.bias" in header.tensors,
        "bias": "blk.0.attn_output.bias" in header.tensors,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        **{f"{name}_token_id": settings.token_id(key) for name, key in _ENDS.items()},
        "torch_dtype": _DTYPES.get(settings.get("general.file_type", int, -1), "bfloat16"),
    }
    try:
        InternLM3Config.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{header.path}: {one_line(str(error))}") from None
    return values


def generation_of(header: GGUFHeader) -> dict[str, Any]:
    """The contents of generation_config.json: the tokens that end an answer. Raises ValueError for ids of no token."""
    settings = Settings(header)
    ends = [settings.token_id(key) for key in ("eos", "eot", "eom")]
    return {
        "bos_token_id": settings.token_id("bos"),
        "eos_token_id": list(dict.fromkeys(end for end in ends if end is not None)),
        "pad_token_id": settings.token_id("padding"),
    }


_ENDS = {"bos": "bos", "eos": "eos", "pad": "padding"}


class Settings:
    """The settings of a file, each of the type that it must have. Errors name the file and the key."""

    def __init__(self, header: GGUFHeader):
        self._path, self._values = header.path, header.settings

    def get(self, key: str, kind: type[T], default: Any = None) -> T:
        """A value of one type, or the default where there is none."""
        value = self._values.get(key, default)
        if key in self._values and type(value) is not kind:
            raise ValueError(f"{self._path}: {key} is {shown(value)}; it must be of type {kind.__name__}")
        return value

    def number(self, key: str, default: Number) -> Number:
        """A positive number of the default's type; it must be there if the default is 0."""
        value = self.get(key, type(default), default)
        if not value > 0:
            found = shown(value) if key in self._values else "missing"
            kind = "integer" if isinstance(default, int) else "number"
            raise ValueError(f"{self._path}: {key} is {found}; it must be a positive {kind}")
        return value

    def only(self, key: str, *supported: Any) -> None:
        value = self._values.get(key, supported[0])
        if value not in supported:
            raise ValueError(f"{self._path}: {key} is {shown(value)}; this runtime runs {shown(supported[0])} only")

    def items(self, key: str, kind: type[T]) -> list[T]:
        """A list of values of one type."""
        values = self._values.get(key)
        if not isinstance(values, list) or not all(type(value) is kind for value in values):
            raise ValueError(f"{self._path}: {key} must be a list of values of type {kind.__name__}")
        return values

    def token_id(self, name: str) -> int | None:
        """The id of a special token; None if there is none."""
        key, count = f"tokenizer.ggml.{name}_token_id", len(self.items("tokenizer.ggml.tokens", str))
        id = self.get(key, int)
        if key in self._values and not 0 <= id < count:
            raise ValueError(f"{self._path}: {key} is {id}, of {count} tokens")
        return id
