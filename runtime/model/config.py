"""InternLM3Config: a checkpoint's config.json, read, checked and written back."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..common.checks import as_list, as_number, check_ids, is_int, is_number
from ..common.files import has_file, read_json, write_json
from ..common.hub import locate, name_of
from ..common.neutral import LOAD, SAVE, without_neutral
from ..common.shown import one_line, shown

ROPE_TYPES = ("default", "dynamic")

_MAX_SIZE = 2**28  # so that no product of two sizes and an element's bytes overflows

# Newer name in transformers -> the published checkpoint's key.
_NEWER = {"attention_bias": "qkv_bias", "mlp_bias": "bias", "rope_parameters": "rope_scaling"}
# Keys that would change what the model computes, which this runtime does not implement -> values that change nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "sliding_window": (None, 0, False),
    "partial_rotary_factor": (None, 1),
}


class InternLM3Config:
    """The shape of an InternLM3 model.

    Defaults are those of InternLM3's published configuration class. Unknown keys of a checkpoint are kept as attributes
    and written back by `save_pretrained`.

    Args:
        vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: positive integers.
        num_key_value_heads: number of key and value heads, a divisor of num_attention_heads; None: the same number.
        hidden_act: only "silu" is supported.
        max_position_embeddings: the trained context window, in tokens.
        initializer_range: standard deviation of random weights.
        rms_norm_eps: added to the mean square in RMSNorm.
        use_cache: whether `forward` returns a cache by default.
        bos_token_id, eos_token_id, pad_token_id: token ids or None; eos_token_id may be a list; a pad_token_id of -1
            means None.
        tie_word_embeddings: the head shares the embedding's weight.
        rope_theta: base of the rotary frequencies.
        rope_scaling: None, {"rope_type": "default"}, or {"rope_type": "dynamic", "factor": float >= 1} for dynamic NTK.
            The older key "type" and transformers' newer `rope_parameters`, which contains rope_theta too, are accepted.
        qkv_bias (or attention_bias): the q, k and v projections have a bias.
        bias (or mlp_bias): the o projection and the three of the MLP have a bias.
        head_dim: size of a head, even; None: hidden_size // num_attention_heads.
        dtype (or torch_dtype): the checkpoint's dtype, such as "bfloat16".
        attention_dropout: kept, and not used: this runtime does not train.

    Raises:
        ValueError: a value that no InternLM3 model can have, or two keys that contradict each other; the message names
            the keys.
    """

    model_type = "internlm3"

    def __init__(
        self,
        /,  # so that a checkpoint may have a key of that name
        vocab_size: int = 128512,
        hidden_size: int = 4096,
        intermediate_size: int = 11008,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = 32,
        hidden_act: str = "silu",
        max_position_embeddings: int = 32768,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-6,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = 1,
        eos_token_id: int | list[int] | None = 2,
        tie_word_embeddings: bool = False,
        rope_theta: float = 10000.0,
        rope_scaling: Mapping[str, Any] | None = None,
        rope_parameters: Mapping[str, Any] | None = None,
        qkv_bias: bool | None = None,
        attention_bias: bool | None = None,
        attention_dropout: float = 0.0,
        bias: bool | None = None,
        mlp_bias: bool | None = None,
        head_dim: int | None = None,
        dtype: Any = None,
        torch_dtype: Any = None,
        **extra: Any,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.use_cache = use_cache
        self.pad_token_id = None if pad_token_id == -1 else pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.tie_word_embeddings = tie_word_embeddings
        self.rope_scaling, self.rope_theta = _rotary(rope_scaling, rope_parameters, rope_theta)
        self.qkv_bias = _one_of("qkv_bias", qkv_bias, "attention_bias", attention_bias)
        self.attention_dropout = attention_dropout
        self.bias = _one_of("bias", bias, "mlp_bias", mlp_bias)
        self.dtype = _dtype_name(dtype if dtype is not None else torch_dtype)
        self.extra = extra
        self._check_sizes()
        self.head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
        self._check_heads(head_dim_given=head_dim is not None)
        self._check_rope()
        self._check_unsupported(extra, rope_scaling or {}, rope_parameters or {})

    # ---------------------------------------------------------------- reading and writing

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        **overrides: Any,
    ) -> "InternLM3Config":
        """Reads the config.json of a local folder or a hub repository, or a file of that form by its path.

        `overrides` replace single keys.

        Raises:
            FileNotFoundError: there is no such folder or repository, or it has no config.json.
            ValueError: config.json is not valid JSON, describes another architecture, or has an impossible value.
            TypeError: an override is no configuration key.
        """
        path = Path(name_of(pretrained_model_name_or_path)).expanduser()
        if not path.is_file():
            folder = locate(
                pretrained_model_name_or_path,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                weights=False,
            )
            path = folder / "config.json"
        known = {**cls().to_dict(), **_NEWER}
        overrides = without_neutral("InternLM3Config.from_pretrained", overrides, LOAD, known=known)
        return cls.from_file(path, **overrides)

    @classmethod
    def from_file(cls, path: Path, **overrides: Any) -> "InternLM3Config":
        """Reads one config.json. Raises as `from_pretrained` does."""
        if not has_file(path):
            raise FileNotFoundError(f"{path} is missing: the folder of a checkpoint contains a config.json")
        values = read_json(path)
        # An override replaces its key under either name.
        other_names = {**_NEWER, **{old: new for new, old in _NEWER.items()}}
        replaced = {other_names.get(key) for key in overrides}
        if "rope_theta" in overrides and isinstance(rope := values.get("rope_parameters"), dict):
            values["rope_parameters"] = {key: value for key, value in rope.items() if key != "rope_theta"}
        try:
            return cls.from_dict({**{k: value for k, value in values.items() if k not in replaced}, **overrides})
        except ValueError as error:
            raise ValueError(f"{path}: {one_line(str(error))}") from None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "InternLM3Config":
        """The configuration in the contents of a config.json. Raises ValueError for another model_type."""
        model_type = values.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(
                f"model_type is {shown(model_type)}, and this runtime runs {cls.model_type!r} checkpoints only "
                f"(architectures: {shown(values.get('architectures'))})"
            )
        for key in ("qkv_bias", "bias"):
            if values.get(key, False) is None:
                raise ValueError(f"{key} must be true or false; it is None")
        # auto_map names remote code, which is never executed.
        ignored = ("model_type", "auto_map", "architectures", "transformers_version")
        return cls(**{key: value for key, value in values.items() if key not in ignored})

    def to_dict(self) -> dict[str, Any]:
        """The contents of config.json, with the keys of the published checkpoint."""
        values = {key: value for key, value in vars(self).items() if key not in ("extra", "dtype")}
        return {
            "architectures": ["InternLM3ForCausalLM"],
            "model_type": self.model_type,
            **values,
            "torch_dtype": self.dtype,
            **self.extra,
        }

    def save_pretrained(self, save_directory: str | os.PathLike[str], **unknown: Any) -> None:
        """Writes config.json into a folder, which is created if necessary."""
        without_neutral("InternLM3Config.save_pretrained", unknown, SAVE, known=("save_directory",))
        write_json(Path(save_directory) / "config.json", self.to_dict())

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """rope_theta and rope_scaling in one dictionary, as newer transformers has them."""
        return {"rope_type": "default", **(self.rope_scaling or {}), "rope_theta": self.rope_theta}

    @property
    def eos_token_ids(self) -> list[int]:
        """eos_token_id as a list, empty if there is none."""
        return as_list(self.eos_token_id)

    def __getattr__(self, name: str) -> Any:
        # Called only for names that are no attribute: a checkpoint's unknown keys.
        extra = self.__dict__.get("extra", {})
        if name in extra:
            return extra[name]
        raise AttributeError(f"InternLM3Config has no key {name!r}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, InternLM3Config) and self.to_dict() == other.to_dict()

    def __repr__(self) -> str:
        return f"InternLM3Config {json.dumps(self.to_dict(), indent=2)}"

    # ---------------------------------------------------------------- checks

    def _check_sizes(self) -> None:
        sizes = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
        )
        for key in sizes:
            value = getattr(self, key)
            if not is_int(value) or not 1 <= value <= _MAX_SIZE:
                raise ValueError(f"{key} must be a positive integer of at most {_MAX_SIZE}; it is {shown(value)}")
        for key in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, key)
            if not is_number(value) or not (as_number(value) or 0) > 0:
                raise ValueError(f"{key} must be a positive number; it is {shown(value)}")
        for key in ("qkv_bias", "bias", "tie_word_embeddings"):
            if not isinstance(getattr(self, key), bool):
                raise ValueError(f"{key} must be true or false; it is {shown(getattr(self, key))}")
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            check_ids(key, as_list(getattr(self, key)), self.vocab_size)
        if self.hidden_act != "silu":
            raise ValueError(f"hidden_act is {shown(self.hidden_act)}; InternLM3's MLP supports 'silu' only")

    def _check_heads(self, head_dim_given: bool) -> None:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if not head_dim_given and self.hidden_size % heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) is not a multiple of num_attention_heads ({heads}): "
                "correct one of them or give head_dim"
            )
        if heads % kv_heads:
            raise ValueError(f"num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({kv_heads})")
        if not isinstance(self.head_dim, int) or self.head_dim < 4 or self.head_dim % 2:
            raise ValueError(f"head_dim must be an even integer of at least 4; it is {shown(self.head_dim)}")
        if heads * self.head_dim > _MAX_SIZE:
            raise ValueError(
                f"num_attention_heads ({heads}) of head_dim {self.head_dim} are more than {_MAX_SIZE} wide"
            )

    def _check_rope(self) -> None:
        if self.rope_scaling is None:
            return
        rope_type = self.rope_scaling["rope_type"]
        if rope_type not in ROPE_TYPES:
            raise ValueError(
                f"rope_scaling has rope_type {shown(rope_type)}; known are {', '.join(ROPE_TYPES)}. "
                "Running it as another type would give wrong text."
            )
        factor = self.rope_scaling.get("factor")
        if rope_type == "dynamic" and not (is_number(factor) and (as_number(factor) or 0) >= 1):
            raise ValueError(f"rope_scaling of type 'dynamic' needs a factor of at least 1; it is {shown(factor)}")

    def _check_unsupported(self, *parts: Mapping[str, Any]) -> None:
        for key, neutral in _UNSUPPORTED.items():
            for settings in parts:
                if (value := settings.get(key)) not in neutral:
                    raise ValueError(f"{key} is {shown(value)}, which this runtime does not implement")


def _rotary(scaling: Any, parameters: Any, theta: float | None) -> tuple[dict[str, Any] | None, Any]:
    """rope_scaling in one form, and rope_theta, from the older keys and the newer one that combines both."""
    old, new = _settings("rope_scaling", scaling), _settings("rope_parameters", parameters)
    for settings in (old, new):
        if settings is not None:
            theta = settings.pop("rope_theta", theta)
            # Older checkpoints have "type"; the published one has "rope_type".
            settings.setdefault("rope_type", settings.get("type", "default" if settings is new else None))
    if new is not None and new["rope_type"] == "default":
        new = None
    same = old == new or (new is None and old is not None and old["rope_type"] == "default")
    if old is not None and parameters is not None and not same:
        raise ValueError(
            f"rope_scaling ({shown(scaling)}) and rope_parameters ({shown(parameters)}) disagree: remove one of them"
        )
    return (old if old is not None else new), theta


def _one_of(name: str, value: Any, newer_name: str, newer: Any) -> Any:
    """The value of a switch with two names; False if neither is given."""
    if value is not None and newer is not None and value != newer:
        raise ValueError(
            f"{name} is {shown(value)} and {newer_name}, its newer name, is {shown(newer)}: remove one of them"
        )
    return next((given for given in (value, newer) if given is not None), False)


def _settings(key: str, value: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(
            f"{key} must be an object such as {{'rope_type': 'dynamic', 'factor': 6.0}}; it is {shown(value)}"
        )
    return None if value is None else dict(value)


def _dtype_name(dtype: Any) -> str | None:
    """ "bfloat16" for "bfloat16", torch.bfloat16 and "torch.bfloat16"."""
    return None if dtype is None else str(dtype).removeprefix("torch.")
