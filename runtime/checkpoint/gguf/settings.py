"""The configuration of a model in the settings of a GGUF file."""

from __future__ import annotations

from typing import Any

from ...common.shown import shown
from .reader import GGUFHeader

_ARCHITECTURE = "llama"
_DTYPES = {0: "float32", 1: "float16"}  # general.file_type; everything else in the dtype that models are trained in
_ABSENT = object()


def config_of(header: GGUFHeader) -> dict[str, Any]:
    """The contents of config.json.

    Raises:
        ValueError: another architecture, or settings that this runtime does not implement.
    """
    settings = Settings(header)
    architecture = settings.get("general.architecture")
    if architecture != _ARCHITECTURE:
        raise ValueError(
            f"{header.path}: general.architecture is {shown(architecture)}; this runtime runs {_ARCHITECTURE!r}, which "
            "InternLM3 is in GGUF files"
        )
    hidden, heads = settings.number("llama.embedding_length"), settings.number("llama.attention.head_count")
    head_dim = settings.number(
        "llama.attention.key_length", settings.number("llama.rope.dimension_count", hidden // heads)
    )
    settings.only("llama.attention.value_length", head_dim)
    settings.only("llama.rope.dimension_count", head_dim)
    settings.only("llama.expert_count", 0)
    settings.only("llama.rope.scaling.type", "none")
    settings.only("split.count", 1, 0)
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise ValueError(f"{header.path}: 'token_embd.weight' is missing")
    return {
        "architectures": ["InternLM3ForCausalLM"],
        "model_type": "internlm3",
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": settings.number("llama.feed_forward_length"),
        "num_hidden_layers": settings.number("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": settings.number("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": settings.number("llama.context_length"),
        # Stored in float32, whose neighbours of 1e-5 have longer names.
        "rms_norm_eps": float(f"{settings.get('llama.attention.layer_norm_rms_epsilon', 1e-6):.6g}"),
        "rope_theta": settings.get("llama.rope.freq_base", 10000.0),
        "rope_scaling": None,
        "qkv_bias": "blk.0.attn_q.bias" in header.tensors,
        "bias": "blk.0.attn_output.bias" in header.tensors,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        **{f"{name}_token_id": settings.get(f"tokenizer.ggml.{key}_token_id") for name, key in _ENDS.items()},
        "torch_dtype": _DTYPES.get(settings.get("general.file_type"), "bfloat16"),
    }


def generation_of(header: GGUFHeader) -> dict[str, Any]:
    """The contents of generation_config.json: the tokens that end an answer."""
    settings = Settings(header)
    ends = [settings.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    return {
        "bos_token_id": settings.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(dict.fromkeys(end for end in ends if end is not None)),
        "pad_token_id": settings.get("tokenizer.ggml.padding_token_id"),
    }


_ENDS = {"bos": "bos", "eos": "eos", "pad": "padding"}


class Settings:
    """The settings of a file; errors name it."""

    def __init__(self, header: GGUFHeader):
        self._path, self._values = header.path, header.settings

    def get(self, key: str, default: Any = None) -> Any:
        return self._values.get(key, default)

    def number(self, key: str, default: Any = _ABSENT) -> int:
        value = self._values.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            found = "missing" if value is _ABSENT else shown(value)
            raise ValueError(f"{self._path}: {key} is {found}; it must be a positive integer")
        return value

    def only(self, key: str, *supported: Any) -> None:
        value = self._values.get(key, supported[0])
        if value not in supported:
            raise ValueError(f"{self._path}: {key} is {shown(value)}; this runtime runs {shown(supported[0])} only")

    def items(self, key: str, kind: type) -> list[Any]:
        """A list of values of one type."""
        values = self._values.get(key)
        if not isinstance(values, list) or not all(type(value) is kind for value in values):
            raise ValueError(f"{self._path}: {key} must be a list of values of type {kind.__name__}")
        return values
