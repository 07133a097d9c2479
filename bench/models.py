"""The shapes of models: InternLM3-8B, and others of its size, whose figures are published.

Qwen3's norm of each head's q and k is no op here: it is left out. So are Llama 3.1's scaled rotary frequencies, whose
values come from a table and change no time.
"""

from typing import Any, NamedTuple


class Size(NamedTuple):
    """What the shapes of a model's ops depend on."""

    hidden: int
    intermediate: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim


class Model(NamedTuple):
    """A whole model, of random weights."""

    title: str  # says what is left out
    size: Size
    layers: int
    window: int  # tokens, as trained
    rope: dict[str, Any]  # arguments of InternLM3Config


INTERNLM3_8B = Size(4096, 10240, 128512, 32, 2, 128)
INTERNLM3 = "internlm3-8b"
ROPE: dict[str, Any] = {"rope_theta": 50000000.0, "rope_scaling": {"rope_type": "dynamic", "factor": 6.0}}
MODELS = {
    INTERNLM3: Model("InternLM3-8B", INTERNLM3_8B, 48, 32768, ROPE),
    "llama-3.1-8b": Model(
        "Llama-3.1-8B", Size(4096, 14336, 128256, 32, 8, 128), 32, 131072, {"rope_theta": 500000.0}
    ),
    "qwen3-8b": Model(
        "Qwen3-8B without its norms of q and k",
        Size(4096, 12288, 151936, 32, 8, 128), 36, 40960, {"rope_theta": 1000000.0},
    ),
}  # fmt: skip
SIZES = {name: model.size for name, model in MODELS.items()}


def title_of(name: str) -> str:
    """What a model in MODELS is called; any other name is itself."""
    return MODELS[name.lower()].title if name.lower() in MODELS else name


def shapes(name: str) -> dict[str, Any]:
    """What the stamp of a record of a model in MODELS has."""
    return {"of": MODELS[name].title, **MODELS[name].size._asdict()}


def shapes_of(stamp: dict[str, Any]) -> dict[str, Any]:
    """The model's shapes in the stamp of a record, and its title `of`. A record without is of InternLM3-8B."""
    return stamp.get("shapes") or shapes(INTERNLM3)
