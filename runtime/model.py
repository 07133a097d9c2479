"""InternLM3 as its paper would write it: a block is attention and a gated MLP, each behind a norm and a residual sum.

This is the plain forward pass: any batch, any mask, any length, in PyTorch ops alone. Weights carry no gradients: this
runtime runs models and does not train them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import reference as ops
from .cache import KVCache
from .config import InternLM3Config
from .layers import Embedding, Linear, PartNames, RMSNorm, StackedLinear


@dataclass
class Rows:
    """Where the tokens of one pass stand: rotary tables [B, T, D], and for each row the indices of its real tokens.

    None in `live` says that all of a row's tokens are real.
    """

    cos: Tensor
    sin: Tensor
    live: list[Tensor | None]


class Attention(PartNames):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: InternLM3Config, layer: int, **factory: Any):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        parts = {"q_proj": q, "k_proj": kv, "v_proj": kv}
        self.qkv_proj = StackedLinear(config.hidden_size, parts, config.qkv_bias, **factory)
        self.o_proj = Linear(q, config.hidden_size, config.bias, **factory)

    def forward(self, x: Tensor, rows: Rows, cache: KVCache | None) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv_proj(x).view(batch, tokens, -1, self.head_dim)
        qk = ops.rotary(qkv[:, :, : self.heads + self.kv_heads], rows.cos, rows.sin)
        q, k, v = qk[:, :, : self.heads], qk[:, :, self.heads :], qkv[:, :, self.heads + self.kv_heads :]
        # Each sequence on its own, over exactly its own tokens: no padding enters, and no row sees another's length.
        out = [self._attend(b, q[b], k[b], v[b], rows.live[b], cache) for b in range(batch)]
        return self.o_proj(torch.stack(out).view(batch, tokens, -1))

    def _attend(self, row: int, q: Tensor, k: Tensor, v: Tensor, live: Tensor | None, cache: KVCache | None) -> Tensor:
        if live is not None:
            out = torch.zeros_like(q)
            if len(live):
                out[live] = self._attend(row, q[live], k[live], v[live], None, cache)
            return out
        if cache is not None:
            k, v = cache.append(self.layer, row, k, v)
        return ops.attention(q, k, v, self.head_dim**-0.5)


class MLP(PartNames):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: InternLM3Config, **factory: Any):
        super().__init__()
        parts = {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size}
        self.gate_up_proj = StackedLinear(config.hidden_size, parts, config.bias, **factory)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, config.bias, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ops.swiglu(self.gate_up_proj(x)))


class Block(nn.Module):
    """x + attention(norm(x)), then the same with the MLP."""

    def __init__(self, config: InternLM3Config, layer: int, **factory: Any):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, **factory)
        self.self_attn = Attention(config, layer, **factory)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, **factory)
        self.mlp = MLP(config, **factory)

    def forward(self, x: Tensor, rows: Rows, cache: KVCache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rows, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """The embedding, the blocks and the last norm.

    Weights are random (normal, config.initializer_range) until they are loaded. `factory`: device and dtype of the
    weights, PyTorch's defaults by default.
    """

    def __init__(self, config: InternLM3Config, **factory: Any):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, **factory)
        self.layers = nn.ModuleList(Block(config, layer, **factory) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, **factory)
        _initialise(self, config)

    def run(
        self, x: Tensor, positions: Tensor, inv_freq: Tensor, live: list[Tensor | None], cache: KVCache | None
    ) -> Iterator[Tensor]:
        """x [B, T, C] and what each block makes of it; positions [B, T], inv_freq [B, 1, D/2], live as in Rows."""
        cos, sin = ops.rope_tables(positions, inv_freq, x.dtype)
        rows = Rows(cos, sin, live)
        yield x
        for block in self.layers:
            x = block(x, rows, cache)
            yield x

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype


class LanguageModel(nn.Module):
    """A decoder with its language-model head, which is the embedding's own weight where the configuration says so."""

    def __init__(self, decoder: Decoder, **factory: Any):
        super().__init__()
        self.config = config = decoder.config
        self.model = decoder
        self.lm_head = Linear(config.hidden_size, config.vocab_size, False, **factory)
        if config.tie_word_embeddings:
            self.lm_head.weight = decoder.embed_tokens.weight
        else:
            _initialise(self.lm_head, config)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype


def _initialise(module: nn.Module, config: InternLM3Config) -> None:
    """Random matrices, zero biases; norms are ones already."""
    for parameter in module.parameters():
        if parameter.dim() == 2 and not parameter.is_meta:
            nn.init.normal_(parameter, std=config.initializer_range)
