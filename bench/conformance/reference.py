"""InternLM3 in float64, written from its specification and independent of the runtime: logits at some places."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from .checkpoint import DIM, HIDDEN, LAYERS, WINDOW, weights

THETA, FACTOR, EPS = 5e7, 6.0, 1e-5


def base(length: int, window: int = WINDOW) -> float:
    """The base of the rotary frequencies of a sequence of `length` tokens, by dynamic NTK."""
    return THETA * (FACTOR * max(length, window) / window - (FACTOR - 1)) ** (DIM / (DIM - 2))


def rotated(x: Tensor, angles: Tensor, pairs: bool) -> Tensor:
    """x [heads, T, DIM] turned by angles [T, DIM / 2]. Dimension j turns with j + DIM / 2; in pairs, 2j with 2j + 1."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1) if pairs else x.chunk(2, -1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    turned = a * cos - b * sin, b * cos + a * sin
    return torch.stack(turned, -1).flatten(-2) if pairs else torch.cat(turned, -1)


def logits(
    ids: Sequence[int],
    places: Sequence[int],
    bases: float | Tensor,
    *,
    stretch: float = 1.0,
    pairs: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Logits [len(places), VOCAB] of one sequence.

    bases: the rotary base of the whole sequence, or [T] float64, of each token's query and key. A position is `stretch`
    times a token's place. The last layer computes the queries at `places` only.
    """
    w = {name: torch.from_numpy(values).to(dtype) for name, values in weights().items()}
    x = w["model.embed_tokens.weight"][torch.tensor(ids)]
    exponents = -torch.arange(0, DIM, 2, dtype=torch.float64) / DIM
    frequencies = torch.as_tensor(bases, dtype=torch.float64).view(-1, 1) ** exponents
    angles = stretch * torch.arange(len(ids), dtype=torch.float64)[:, None] * frequencies

    def norm(x: Tensor, name: str) -> Tensor:
        return rms_norm(x, (HIDDEN,), w[name], EPS)

    for layer in range(LAYERS):
        own = {part.split(".")[-2]: w[part] for part in w if part.startswith(f"model.layers.{layer}.")}
        h = norm(x, f"model.layers.{layer}.input_layernorm.weight")
        q, k, v = ((h @ own[f"{part}_proj"].T).unflatten(-1, (-1, DIM)).transpose(0, 1) for part in "qkv")
        q, k = (rotated(each, angles, pairs) for each in (q, k))
        if layer < LAYERS - 1:
            seen = scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0]
        else:
            x, q = x[list(places)], q[:, list(places)]
            mask = torch.arange(len(ids)) <= torch.tensor(places)[:, None]
            seen = scaled_dot_product_attention(q[None], k[None], v[None], mask, enable_gqa=True)[0]
        x = x + seen.transpose(0, 1).flatten(1) @ own["o_proj"].T
        h = norm(x, f"model.layers.{layer}.post_attention_layernorm.weight")
        x = x + (silu(h @ own["gate_proj"].T) * (h @ own["up_proj"].T)) @ own["down_proj"].T
    return norm(x, "model.norm.weight") @ w["lm_head.weight"].T
