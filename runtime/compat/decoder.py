"""InternLM3Model: the decoder without its head, with transformers' `forward`."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..common.checks import check_batch_ids
from ..common.neutral import FORWARD, without_neutral
from ..model.config import InternLM3Config
from ..model.kv_cache import PagedKVCache, pages_of
from ..model.model import Decoder
from ..model.rope import inverse_frequencies
from .cache import KVCache
from .model_outputs import ModelOutput
from .pretrained import Pretrained

Call = TypeVar("Call", bound=Callable[..., Any])


def own_dtypes(forward: Call) -> Call:
    """Makes `forward` compute in the model's own dtypes inside of torch.autocast too, which changes ops of a CPU."""

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return forward(*args, **kwargs)

    return call  # type: ignore[return-value]


class InternLM3Model(Decoder):
    """The decoder without its head: token ids in, hidden states out.

    Args:
        config: the model's shape; weights are random (normal, config.initializer_range) until they are loaded.
        device, dtype: of the weights; PyTorch's defaults by default.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> InternLM3Model:
        """The decoder of a checkpoint. Arguments and errors as InternLM3ForCausalLM.from_pretrained."""

        class Checkpoint(Pretrained):
            decoder_class = cls
            model: InternLM3Model

            def __init__(self, config: InternLM3Config, **factory: Any):
                super().__init__(config, **factory)
                del self.lm_head  # a base model's checkpoint need not contain one

        return Checkpoint.from_pretrained(pretrained_model_name_or_path, **kwargs).model

    @own_dtypes
    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **unknown: Any,
    ) -> ModelOutput:
        """Runs T new tokens of each of B sequences through the decoder.

        Args:
            input_ids: [B, T] integers. Exactly one of input_ids and inputs_embeds is given.
            attention_mask: [B, past + T], or [B, T] without a cache; zero marks padding, at either end or in between.
                Hidden states of padding are meaningless. Padding is not cached, so the mask of the past must be the one
                that the tokens were cached with.
            position_ids: [B, T], [1, T] or [T]; by default they continue from the columns in the cache, padding
                included, as in transformers.
            past_key_values: the cache that an earlier call returned; it is extended in place. A row's rotary
                frequencies are fixed by its first length (dynamic NTK; see runtime/model/rope.py).
            inputs_embeds: [B, T, C] floats.
            use_cache: return a cache; by default config.use_cache.
            output_hidden_states: return the hidden states of every layer.

        Raises:
            ValueError: arguments that contradict each other, a wrong shape, an id outside the vocabulary, a cache of
                other sequences or of a model that was moved since, a mask that contradicts the cached columns.
            TypeError: an unknown keyword, or an argument that is no tensor.
        """
        if unknown:
            known = [*inspect.signature(InternLM3Model.forward).parameters][1:-1]  # not self, **unknown
            without_neutral("forward", unknown, FORWARD, known=known)
        check_tensors(attention_mask=attention_mask, position_ids=position_ids)
        x = self._embed(input_ids, inputs_embeds)
        batch, tokens, _ = x.shape
        keep = past_key_values is not None or (self.config.use_cache if use_cache is None else use_cache)
        cache = self._new_cache(batch, tokens, scratch=not keep) if past_key_values is None else past_key_values
        _check_cache(cache, x)
        real = _real(attention_mask, batch, tokens, cache.real)
        real_columns = [None if row.all() else row.nonzero()[:, 0].to(x.device) for row in real]
        # Without padding, now or before, a token's position is its index in the cache, which is the ops' default.
        default_positions = position_ids is None and all(length == cache.columns for length in cache.lengths)
        if position_ids is None:
            position_ids = torch.arange(cache.columns, cache.columns + tokens, dtype=torch.int64, device="cpu")
        try:
            positions = position_ids.to(x.device).expand(batch, tokens)
        except RuntimeError:
            raise ValueError(
                f"position_ids has shape {list(position_ids.shape)}, must be [{batch}, {tokens}]"
            ) from None
        if cache.inv_freq is None:
            lengths = (positions.amax(dim=1) + 1).tolist()
            cache.inv_freq = torch.stack([inverse_frequencies(self.config, length, x.device) for length in lengths])
        cache.reserve(tokens)

        states: list[Tensor] | None = [x] if output_hidden_states else None
        if all(columns is None for columns in real_columns):
            launch = cache.batch(range(batch), tokens, None if default_positions else positions)
            x = self.run(x.flatten(0, 1), launch, cache.kv_cache, states).view(x.shape)
        else:
            x = self._run_ragged(x, positions, real_columns, cache, states)
        x = self.ops.rms_norm(x, self.norm.weight, self.norm.eps)

        cache.advance(real)
        hidden_states = None if states is None else (*(state.view(x.shape) for state in states[:-1]), x)
        return ModelOutput(x, cache if keep else None, hidden_states)

    def _run_ragged(
        self,
        x: Tensor,
        positions: Tensor,
        real_columns: list[Tensor | None],
        cache: KVCache,
        states: list[Tensor] | None,
    ) -> Tensor:
        """Runs each row by itself, without its padding; padding gets zeros. `states` gets every layer's output."""
        out = torch.zeros_like(x)
        layer_outputs = [] if states is None else [torch.zeros_like(x) for _ in self.layers]
        for row, columns in enumerate(real_columns):
            columns = torch.arange(x.shape[1], dtype=torch.int64, device=x.device) if columns is None else columns
            if len(columns):
                row_states: list[Tensor] = []
                launch = cache.batch([row], len(columns), positions[row, columns])
                out[row, columns] = self.run(
                    x[row, columns], launch, cache.kv_cache, row_states if layer_outputs else None
                )
                for state, row_state in zip(layer_outputs, row_states, strict=True):
                    state[row, columns] = row_state
        if states is not None:
            states += layer_outputs
        return out

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        check_tensors(input_ids=input_ids, inputs_embeds=inputs_embeds)
        if inputs_embeds is not None and input_ids is None:
            size = self.config.hidden_size
            if inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != size or inputs_embeds.numel() == 0:
                raise ValueError(
                    f"inputs_embeds has shape {list(inputs_embeds.shape)}, must be [B, T, {size}] and not empty"
                )
            return inputs_embeds.to(self.device, self.dtype).contiguous()
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("give either input_ids or inputs_embeds, and not both")
        check_batch_ids("input_ids", input_ids, self.config.vocab_size)
        ids = input_ids.to(self.device)
        return self.ops.embed(ids.flatten().contiguous(), self.embed_tokens.weight).view(*ids.shape, -1)

    @torch.inference_mode(False)
    def _new_cache(self, batch: int, tokens: int, *, scratch: bool) -> KVCache:
        """An empty cache, of tensors that later calls can write to in any mode, whatever this call's is."""
        each = pages_of(tokens)
        kv_cache = PagedKVCache(self.config, batch * each, self.dtype, self.device, scratch=scratch)
        return KVCache(kv_cache, [list(range(first, first + each)) for first in range(0, batch * each, each)])


def check_tensors(**arguments: Any) -> None:
    """Raises TypeError for an argument of `forward` that is given and no tensor."""
    for name, value in arguments.items():
        if value is not None and not isinstance(value, Tensor):
            kind = type(value).__name__
            raise TypeError(f"forward: {name} must be a tensor, and it is a {kind}: torch.as_tensor makes one")


def _check_cache(cache: KVCache, x: Tensor) -> None:
    """Raises ValueError unless the cache can be continued by x [B, T, C], TypeError if it is none."""
    if not isinstance(cache, KVCache):
        kind = type(cache).__name__
        raise TypeError(f"forward: past_key_values must be what an earlier call returned, and it is a {kind}")
    if len(cache.pages) != len(x):
        raise ValueError(f"past_key_values has {len(cache.pages)} sequences, and the input {len(x)}")
    kv = cache.kv_cache
    if (kv.device, kv.dtype) != (x.device, x.dtype):
        raise ValueError(
            f"past_key_values is on {kv.device} as {kv.dtype}, and the model is on {x.device} as {x.dtype}: "
            "a model that was moved begins without the cache that it had"
        )


def _real(mask: Tensor | None, batch: int, tokens: int, past: Tensor) -> Tensor:
    """[B, T] bool on the host: False where the last T columns are padding. past: the same for the cached columns.

    Raises ValueError for a wrong shape, or a mask that contradicts `past`.
    """
    columns = past.shape[1] + tokens
    if mask is None:
        mask = torch.ones(batch, columns, dtype=torch.bool, device="cpu")
    elif mask.dim() != 2 or mask.shape != (batch, columns):
        raise ValueError(
            f"attention_mask has shape {list(mask.shape)}, must be [{batch}, {columns}], the past included"
        )
    mask = mask.bool().cpu()
    if not mask[:, : past.shape[1]].equal(past):
        row, column = (mask[:, : past.shape[1]] != past).nonzero()[0].tolist()
        was, now = ("a token", "padding") if past[row, column] else ("padding", "a token")
        raise ValueError(
            f"attention_mask makes column {column} of row {row} {now}, and it entered the cache as {was}: "
            "repeat the mask that it had, or begin without past_key_values"
        )
    return mask[:, past.shape[1] :]
