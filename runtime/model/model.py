"""InternLM3's decoder: each block is attention and a gated MLP, both with a norm before and a residual sum after.

A launch runs T tokens of each of B sequences as flat rows x [B * T, C] (see `BatchMetadata`). Decoding, prefill and
transformers' `forward` use the same blocks. Weights carry no gradients: this runtime does not train.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import for_device
from ...kernels.reference import FEW_ROWS
from .config import InternLM3Config
from .kv_cache import BatchMetadata, PagedKVCache
from .layers import Embedding, Linear, PartNames, RMSNorm, StackedLinear


def invariant_rows(device: torch.device) -> int:
    """The largest batch size for which `batch_invariant` holds on this device."""
    return int(for_device(device).INVARIANT_ROWS)


class Attention(PartNames):
    """Projections of grouped-query attention."""

    def __init__(self, config: InternLM3Config, **factory: Any):
        super().__init__()
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        parts = {"q_proj": q, "k_proj": kv, "v_proj": kv}
        self.qkv_proj = StackedLinear(config.hidden_size, parts, config.qkv_bias, **factory)
        self.o_proj = Linear(q, config.hidden_size, config.bias, **factory)


class MLP(PartNames):
    """Projections of down(silu(gate(x)) * up(x))."""

    def __init__(self, config: InternLM3Config, **factory: Any):
        super().__init__()
        parts = {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size}
        self.gate_up_proj = StackedLinear(config.hidden_size, parts, config.bias, **factory)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, config.bias, **factory)


class Block(nn.Module):
    """x + attention(norm(x)), then the same with the MLP."""

    def __init__(self, config: InternLM3Config, **factory: Any):
        super().__init__()
        self.scale = config.head_dim**-0.5
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, **factory)
        self.self_attn = Attention(config, **factory)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, **factory)
        self.mlp = MLP(config, **factory)

    def forward(
        self,
        ops: ModuleType,
        x: Tensor,
        batch: BatchMetadata,
        k: Tensor,
        v: Tensor,
        batch_invariant: bool,
        last_rows: bool,
        decode_step: bool,
    ) -> Tensor:
        """x [B * T, C] -> [B * T, C], or with `last_rows` only the last row of each sequence, [B, C].

        Writes the keys and values of all rows to their pages in k and v [P, K, S, D].
        """
        alike = {"batch_invariant": batch_invariant}
        norm, qkv, o = self.input_layernorm, self.self_attn.qkv_proj, self.self_attn.o_proj
        written = batch.block_table if batch.write_table is None else batch.write_table
        q = ops.rms_norm_qkv_rope_cache(
            x, norm.weight, norm.eps, qkv.weight, qkv.bias,
            batch.inv_freq, k, v, written, batch.seq_lens, batch.positions, **alike,
        )  # fmt: skip
        if last_rows:
            tokens = len(x) // len(batch.seq_lens)
            q, x = (rows[tokens - 1 :: tokens].contiguous() for rows in (q, x))
        seen = ops.paged_attention(
            q, k, v, batch.block_table, batch.seq_lens, self.scale, **alike, decode_step=decode_step
        )
        x = ops.linear_add(seen, o.weight, x, o.bias, **alike)

        norm, gate_up, down = self.post_attention_layernorm, self.mlp.gate_up_proj, self.mlp.down_proj
        h = ops.rms_norm_swiglu(x, norm.weight, norm.eps, gate_up.weight, gate_up.bias, **alike)
        return ops.linear_add(h, down.weight, x, down.bias, **alike)


class Decoder(nn.Module):
    """The embedding, the blocks and the last norm.

    Weights are random (normal, config.initializer_range) until they are loaded. `factory`: device and dtype of the
    weights, by default PyTorch's.

    batch_invariant: on a GPU, results of one row are bit-identical alone and with others, up to `invariant_rows`
    together; decoding alone is slower then. Set it before the first step, which a graph captures.
    """

    batch_invariant = False

    @torch.inference_mode(False)  # weights are ordinary tensors, which can be loaded and changed later in any mode
    def __init__(self, config: InternLM3Config, **factory: Any):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, **factory)
        self.layers = nn.ModuleList(Block(config, **factory) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, **factory)
        _initialise(self, config)

    @property
    def ops(self) -> ModuleType:
        """The backend of the device that the weights are on now."""
        return for_device(self.device)

    def can_batch_prompts(self, tokens: int) -> bool:
        """Whether prompts of this length may be batched.

        False where results are promised to be bit-identical, as on a CPU and with `batch_invariant`, and the number of
        rows may change rounding.
        """
        promised = self.batch_invariant or self.device.type == "cpu"
        return tokens > FEW_ROWS and not (promised and self.ops.ROW_COUNT_CHANGES_BITS)

    def run(
        self,
        x: Tensor,
        batch: BatchMetadata,
        kv_cache: PagedKVCache,
        states: list[Tensor] | None = None,
        *,
        last_rows: bool = False,
        decode_step: bool = False,
    ) -> Tensor:
        """Runs x [B * T, C] through all blocks, without the last norm; appends each block's output to `states`.

        With `last_rows` the last block computes only the last row of each sequence, [B, C]: a prompt needs no others.
        `decode_step`: `embed` made x, one token of each sequence, and nothing has written to `batch` since.
        """
        ops, last = self.ops, len(self.layers) - 1
        for layer, block in enumerate(self.layers):
            only_last = last_rows and layer == last
            x = block(ops, x, batch, *kv_cache.layer(layer), self.batch_invariant, only_last, decode_step)
            if states is not None:
                states.append(x)
        return x

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype


class LanguageModel(nn.Module):
    """A decoder with its language-model head, whose weight is the embedding's if the configuration ties them.

    Arguments as Decoder. `decoder_class`: what a subclass makes its decoder of.
    """

    decoder_class: type[Decoder] = Decoder

    @torch.inference_mode(False)
    def __init__(self, config: InternLM3Config, **factory: Any):
        super().__init__()
        self.config = config
        self.model = self.decoder_class(config, **factory)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, False, **factory)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        else:
            _initialise(self.lm_head, config)

    def head(self, x: Tensor) -> Tensor:
        """Logits [R, V] of the last block's output [R, C]."""
        norm, ops = self.model.norm, self.model.ops
        alike = self.model.batch_invariant
        return ops.rms_norm_linear(x, norm.weight, norm.eps, self.lm_head.weight, batch_invariant=alike)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype


def _initialise(module: nn.Module, config: InternLM3Config) -> None:
    """Random matrices; biases are zeros and norms ones already."""
    for parameter in module.parameters():
        if parameter.dim() == 2 and not parameter.is_meta:
            nn.init.normal_(parameter, std=config.initializer_range)
