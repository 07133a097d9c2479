"""InternLM3 as its paper would write it: a block is attention and a gated MLP, each behind a norm and a residual sum.

This is the plain forward pass: any batch, any mask, any length, in PyTorch ops alone. Weights carry no gradients: this
runtime runs models and does not train them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import reference as ops
from .cache import KVCache
from .checkpoint import load_pretrained, save_pretrained
from .config import InternLM3Config
from .generation import generate
from .layers import Embedding, Linear, PartNames, RMSNorm, StackedLinear
from .rope import inverse_frequencies


@dataclass
class ModelOutput:
    """last_hidden_state [B, T, C]; hidden_states: the embeddings and each block's output, the last one normed."""

    last_hidden_state: Tensor
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class CausalLMOutput:
    """logits [B, kept T, V] in the model's dtype; loss, a float32 scalar, where labels were given."""

    logits: Tensor
    loss: Tensor | None = None
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


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


class InternLM3Model(nn.Module):
    """The decoder without its head: token ids in, hidden states out.

    Args:
        config: the model's shape; weights are random (normal, config.initializer_range) until they are loaded.
        device, dtype: where the weights lie and what they are; PyTorch's defaults by default.
    """

    def __init__(self, config: InternLM3Config, **factory: Any):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, **factory)
        self.layers = nn.ModuleList(Block(config, layer, **factory) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, **factory)
        _initialise(self, config)

    @classmethod
    def from_pretrained(cls, id_or_path: str | os.PathLike[str], **kwargs: Any) -> InternLM3Model:
        """The decoder of a checkpoint; arguments and errors of InternLM3ForCausalLM.from_pretrained."""
        return InternLM3ForCausalLM.from_pretrained(id_or_path, **kwargs).model

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
    ) -> ModelOutput:
        """One pass over T new tokens of each of B sequences.

        Args:
            input_ids: [B, T] integers, or else
            inputs_embeds: [B, T, C].
            attention_mask: [B, T] or, with a cache, [B, past + T]; zero marks padding, on either side or in between.
                Hidden states of padding mean nothing.
            position_ids: [B, T], [1, T] or [T]; by default they count on from the columns in the cache, padding
                included, as in transformers.
            past_key_values: the cache that an earlier call returned; it is extended in place. A row's rotary
                frequencies are fixed by the length with which it begins (dynamic NTK; see runtime/rope.py).
            use_cache: return a cache; by default what the configuration says.

        Raises:
            ValueError: arguments that contradict each other, a wrong shape, an id outside the vocabulary.
        """
        x = self._embed(input_ids, inputs_embeds)
        batch, tokens, _ = x.shape
        cache = past_key_values
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = KVCache(self.config, batch, x.dtype, x.device)
        if cache is not None and len(cache.lengths) != batch:
            raise ValueError(f"past_key_values holds {len(cache.lengths)} sequences, and the input {batch}")
        past = cache.columns if cache is not None else 0
        live = _live_tokens(attention_mask, batch, tokens, past)
        if position_ids is None:
            position_ids = torch.arange(past, past + tokens)
        try:
            positions = position_ids.to(x.device).expand(batch, tokens)
        except RuntimeError:
            raise ValueError(
                f"position_ids has shape {list(position_ids.shape)}, must be [{batch}, {tokens}]"
            ) from None
        cos, sin = ops.rope_tables(positions, self._inv_freq(positions, cache), x.dtype)
        rows = Rows(cos, sin, live)
        if cache is not None:
            cache.reserve(tokens)

        states = [x]
        for block in self.layers:
            x = block(x, rows, cache)
            states.append(x)
        x = self.norm(x)

        if cache is not None:
            cache.advance([tokens if index is None else len(index) for index in live], tokens)
        return ModelOutput(x, cache, (*states[:-1], x) if output_hidden_states else None)

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if inputs_embeds is not None and input_ids is None:
            size = self.config.hidden_size
            if inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != size or inputs_embeds.numel() == 0:
                raise ValueError(f"inputs_embeds has shape {list(inputs_embeds.shape)}, must be [B, T, {size}], filled")
            return inputs_embeds.to(self.device, self.dtype)
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("give either input_ids or inputs_embeds, and not both")
        check_ids("input_ids", input_ids, self.config.vocab_size)
        return self.embed_tokens(input_ids.to(self.device))

    def _inv_freq(self, positions: Tensor, cache: KVCache | None) -> Tensor:
        """[B, 1, D/2]: what the cache fixed when its rows began, or else by the length that each row has here."""
        if cache is not None and cache.inv_freq is not None:
            return cache.inv_freq[:, None]
        lengths = (positions.amax(dim=1) + 1).tolist()
        inv_freq = torch.stack([inverse_frequencies(self.config, length, positions.device) for length in lengths])
        if cache is not None:
            cache.inv_freq = inv_freq
        return inv_freq[:, None]


class InternLM3ForCausalLM(nn.Module):
    """InternLM3 with its language-model head. Arguments as InternLM3Model."""

    generate = generate
    save_pretrained = save_pretrained

    def __init__(self, config: InternLM3Config, **factory: Any):
        super().__init__()
        self.config = config
        self.model = InternLM3Model(config, **factory)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, False, **factory)
        self.tie_weights()
        # generation_config.json of the checkpoint as read: where `generate` starts from.
        self.generation_config: dict[str, Any] = {}
        if not config.tie_word_embeddings:
            _initialise(self.lm_head, config)

    def tie_weights(self) -> None:
        """Makes the head use the embedding's weight where the configuration says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @classmethod
    def from_pretrained(cls, id_or_path: str | os.PathLike[str], **kwargs: Any) -> InternLM3ForCausalLM:
        """A checkpoint's model, from a local folder or the hub; see runtime/checkpoint.py's `load_pretrained`."""
        return load_pretrained(cls, id_or_path, **kwargs)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
        logits_to_keep: int | Tensor = 0,
    ) -> CausalLMOutput:
        """Logits of the next token at every position; arguments as InternLM3Model.forward, and

        labels: [B, T] int64, as input_ids, -100 where there is none: adds the mean cross-entropy of each label given
            the tokens before it, in float32.
        logits_to_keep: only the last so many positions (0: all), or the positions in a 1-d tensor.
        """
        out = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, output_hidden_states
        )
        x = out.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(x[:, kept])
        loss = None
        if labels is not None:
            if labels.shape != x.shape[:2] or logits.shape[1] != x.shape[1]:
                raise ValueError(
                    f"labels has shape {list(labels.shape)} and logits_to_keep is {logits_to_keep}: "
                    f"a loss needs labels {list(x.shape[:2])} and all logits"
                )
            check_ids("labels", labels.masked_fill(labels == -100, 0), self.config.vocab_size)
            targets = labels[:, 1:].to(logits.device)
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten())
        return CausalLMOutput(logits, loss, out.past_key_values, out.hidden_states)


def check_ids(name: str, ids: Tensor, vocab_size: int) -> None:
    """Raises ValueError unless `ids` is a filled [B, T] tensor of ids of the vocabulary."""
    if ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool or ids.numel() == 0:
        raise ValueError(f"{name} must be integers [B, T] and not empty; it is {list(ids.shape)} of {ids.dtype}")
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"{name} holds {low if low < 0 else high}, which is outside the vocabulary of {vocab_size}")


def _live_tokens(mask: Tensor | None, batch: int, tokens: int, past: int) -> list[Tensor | None]:
    """For each row the indices of its real tokens among the last T columns, None where all of them are."""
    if mask is None:
        return [None] * batch
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] not in (tokens, past + tokens):
        raise ValueError(f"attention_mask has shape {list(mask.shape)}, must be [{batch}, {past + tokens}]")
    real = mask[:, -tokens:].bool()
    return [None if row.all() else row.nonzero()[:, 0] for row in real]


def _initialise(module: nn.Module, config: InternLM3Config) -> None:
    """Random matrices, zero biases; norms are ones already."""
    for parameter in module.parameters():
        if parameter.dim() == 2 and not parameter.is_meta:
            nn.init.normal_(parameter, std=config.initializer_range)
