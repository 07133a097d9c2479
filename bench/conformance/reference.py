"""InternLM3 in float64, written from its specification and independent of the runtime."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .checkpoint import DIM, WINDOW, weights

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
    bases: float | Tensor,
    *,
    stretch: float = 1.0,
    pairs: bool = False,
) -> Tensor:
    """Logits [VOCAB] of the token after a sequence, float64.

    bases: the rotary base of the whole sequence, or [T] float64, of each token's query and key. A position is `stretch`
    times a token's place. Only the last token's query runs: with one layer, nothing else of the others is needed.
    """
    w = {name.split(".")[-2]: torch.from_numpy(values).double() for name, values in weights().items()}
    exponents = -torch.arange(0, DIM, 2, dtype=torch.float64) / DIM
    frequencies = torch.as_tensor(bases, dtype=torch.float64).view(-1, 1) ** exponents
    angles = stretch * torch.arange(len(ids), dtype=torch.float64)[:, None] * frequencies
    x = w["embed_tokens"][torch.tensor(ids)]

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * w[name]

    h = norm(x, "input_layernorm")
    k, v = ((h @ w[f"{part}_proj"].T).unflatten(-1, (-1, DIM)).transpose(0, 1) for part in "kv")
    q = (h[-1] @ w["q_proj"].T).unflatten(-1, (-1, 1, DIM))
    q, k = rotated(q, angles[-1:], pairs), rotated(k, angles, pairs)
    x, q = x[-1], q.view(len(k), -1, DIM)  # adjacent heads of q share keys and values
    scores = q @ k.mT * DIM**-0.5
    x = x + (scores.softmax(-1) @ v).flatten() @ w["o_proj"].T
    h = norm(x, "post_attention_layernorm")
    gate = h @ w["gate_proj"].T
    x = x + (gate * gate.sigmoid() * (h @ w["up_proj"].T)) @ w["down_proj"].T
    return norm(x, "norm") @ w["lm_head"].T
