"""The fastest decode step that plain PyTorch gives: fused weights through cuBLAS, SDPA over a contiguous KV cache.

This is what a careful user writes without custom kernels, and what torch.compile is given to improve.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from internlm3 import InternLM3ForCausalLM


class PlainModel:
    """The weights of a model, with the keys and values of `batch` sequences of `context` tokens.

    `step` reads and writes the same tensors each time, so it can be captured or compiled.
    """

    def __init__(self, model: InternLM3ForCausalLM, batch: int, context: int):
        config = model.config
        self.model, self.config, self.context = model, config, context
        shape = (config.num_hidden_layers, 2, batch, config.num_key_value_heads, context + 1, config.head_dim)
        self.kv = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self.token = torch.ones(batch, dtype=torch.int64, device=model.device)
        # Every step writes at the same position, after the context, so that all steps do the same work.
        self.place = torch.tensor([context], device=model.device)
        half = torch.arange(0, config.head_dim, 2, device=model.device) / config.head_dim
        angles = context * torch.cat([config.rope_theta**-half] * 2)
        self.cos, self.sin = angles.cos().to(model.dtype), angles.sin().to(model.dtype)

    def _rotated(self, x: Tensor) -> Tensor:
        low, high = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat((-high, low), dim=-1) * self.sin

    def logits(self) -> Tensor:
        """The logits of the token after `token`, [B, V]."""
        config, decoder = self.config, self.model.model
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        x = F.embedding(self.token, decoder.embed_tokens.weight)
        batch, size = x.shape
        layers: Any = decoder.layers
        for layer, (keys, values) in zip(layers, self.kv, strict=True):
            norm = layer.input_layernorm
            h = F.rms_norm(x, (size,), norm.weight, norm.eps)
            qkv = F.linear(h, layer.self_attn.qkv_proj.weight, layer.self_attn.qkv_proj.bias)
            q, k, v = qkv.view(batch, -1, 1, dim).split([heads, kv_heads, kv_heads], dim=1)
            keys.index_copy_(2, self.place, self._rotated(k))
            values.index_copy_(2, self.place, v)
            out = F.scaled_dot_product_attention(self._rotated(q), keys, values, enable_gqa=True)
            o = layer.self_attn.o_proj
            x = x + F.linear(out.reshape(batch, heads * dim), o.weight, o.bias)
            norm = layer.post_attention_layernorm
            h = F.rms_norm(x, (size,), norm.weight, norm.eps)
            gate, up = F.linear(h, layer.mlp.gate_up_proj.weight, layer.mlp.gate_up_proj.bias).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, layer.mlp.down_proj.weight, layer.mlp.down_proj.bias)
        h = F.rms_norm(x, (size,), decoder.norm.weight, decoder.norm.eps)
        return F.linear(h, self.model.lm_head.weight)

    def step(self) -> None:
        """A greedy step: the next step reads the token that this one chose."""
        self.token.copy_(self.logits().argmax(-1))
