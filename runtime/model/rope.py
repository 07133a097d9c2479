"""Rotary frequencies, with dynamic NTK past the trained window."""

import torch
from torch import Tensor

from .config import InternLM3Config


def rope_base(config: InternLM3Config, seq_len: int) -> float:
    """The base of the rotary frequencies for a sequence of `seq_len` tokens.

    Dynamic NTK leaves positions alone and grows the base past the trained window W = max_position_embeddings:
        base' = theta * (factor * L / W - (factor - 1)) ** (D / (D - 2)),   L = max(seq_len, W),   D = head_dim
    so that base' == theta up to W. (bloc97 and emozilla 2023; the form is that of InternLM3's published code.)
    """
    if config.rope_scaling is None or config.rope_scaling["rope_type"] == "default":
        return float(config.rope_theta)  # an integer in JSON may have more than 64 bits
    window, factor, dim = config.max_position_embeddings, config.rope_scaling["factor"], config.head_dim
    stretch = factor * max(seq_len, window) / window - (factor - 1)
    return config.rope_theta * stretch ** (dim / (dim - 2))


def inverse_frequencies(config: InternLM3Config, seq_len: int, device: torch.device | str = "cpu") -> Tensor:
    """base ** (-2j / D) for j in 0 .. D/2 - 1: [D/2] float32, on `device`.

    `seq_len` is the length a sequence has when it begins: its frequencies stay fixed from then on, so that every key in
    its cache was rotated alike.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    return (1.0 / rope_base(config, seq_len) ** exponents).to(device)
