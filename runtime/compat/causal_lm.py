"""transformers' two classes: `forward` with its arguments, `from_pretrained`, `save_pretrained`."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoint.load import load_model, resolve_device, resolve_dtype
from ..checkpoint.save import save_weights
from ..common.checks import check_batch_ids
from ..common.hub import locate
from ..common.neutral import FORWARD, LOAD_MODEL, SAVE, without_neutral
from ..model.config import InternLM3Config
from ..model.kv_cache import PagedKVCache, pages_of
from ..model.model import Decoder
from ..model.rope import inverse_frequencies
from ..sampling.generation_config import GENERATION_CONFIG, read_generation_config
from .cache import KVCache
from .generation import Generation
from .model_outputs import Output


@dataclass
class ModelOutput(Output):
    """last_hidden_state [B, T, C]; hidden_states: the embeddings and each block's output, the last one normed."""

    order = ("last_hidden_state", "past_key_values", "hidden_states")
    last_hidden_state: Tensor
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class CausalLMOutput(Output):
    """logits [B, kept T, V] in the model's dtype; loss, a float32 scalar, where labels were given."""

    order = ("loss", "logits", "past_key_values", "hidden_states")
    logits: Tensor
    loss: Tensor | None = None
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class InternLM3Model(Decoder):
    """The decoder without its head: token ids in, hidden states out.

    Args:
        config: the model's shape; weights are random (normal, config.initializer_range) until they are loaded.
        device, dtype: where the weights lie and what they are; PyTorch's defaults by default.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> InternLM3Model:
        """The decoder of a checkpoint; arguments and errors of InternLM3ForCausalLM.from_pretrained."""
        return InternLM3ForCausalLM.from_pretrained(pretrained_model_name_or_path, **kwargs).model

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
        """One pass over T new tokens of each of B sequences.

        Args:
            input_ids: [B, T] integers, or else
            inputs_embeds: [B, T, C].
            attention_mask: [B, past + T], T alone without a cache; zero marks padding, on either side or in between.
                Hidden states of padding mean nothing. Padding is not cached, so the columns of the past stay what they
                were when they entered.
            position_ids: [B, T], [1, T] or [T]; by default they count on from the columns in the cache, padding
                included, as in transformers.
            past_key_values: the cache that an earlier call returned; it is extended in place. A row's rotary
                frequencies are fixed by the length with which it begins (dynamic NTK; see runtime/model/rope.py).
            use_cache: return a cache; by default what the configuration says.

        Raises:
            ValueError: arguments that contradict each other, a wrong shape, an id outside the vocabulary, a cache of
                other sequences or of a model that was moved since, a mask that changes what is cached.
        """
        if unknown:
            known = inspect.signature(InternLM3ForCausalLM.forward).parameters
            without_neutral("forward", unknown, FORWARD, known=known)
        x = self._embed(input_ids, inputs_embeds)
        batch, tokens, _ = x.shape
        keep = past_key_values is not None or (self.config.use_cache if use_cache is None else use_cache)
        cache = past_key_values or self._new_cache(batch, tokens, scratch=not keep)
        _check_cache(cache, x)
        real = _real(attention_mask, batch, tokens, cache.real)
        live = [None if row.all() else row.nonzero()[:, 0].to(x.device) for row in real]
        # Without padding, now or before, a token's position is its place in the cache, and the ops know that.
        placed = position_ids is None and all(length == cache.columns for length in cache.lengths)
        if position_ids is None:
            position_ids = torch.arange(cache.columns, cache.columns + tokens)
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
        if all(columns is None for columns in live):
            launch = cache.batch(range(batch), tokens, None if placed else positions)
            x = self.run(x.flatten(0, 1), launch, cache.kv_cache, states).view(x.shape)
        else:
            x = self._run_ragged(x, positions, live, cache, states)
        x = self.ops.rms_norm(x, self.norm.weight, self.norm.eps)

        cache.advance(real)
        hidden_states = None if states is None else (*(state.view(x.shape) for state in states[:-1]), x)
        return ModelOutput(x, cache if keep else None, hidden_states)

    def _run_ragged(
        self,
        x: Tensor,
        positions: Tensor,
        live: list[Tensor | None],
        cache: KVCache,
        states: list[Tensor] | None,
    ) -> Tensor:
        """Each row by itself, over exactly its own tokens: no padding enters, and no row sees another's length."""
        out = torch.zeros_like(x)
        of_layers = [] if states is None else [torch.zeros_like(x) for _ in self.layers]
        for row, columns in enumerate(live):
            columns = torch.arange(x.shape[1], device=x.device) if columns is None else columns
            if len(columns):
                own: list[Tensor] = []
                launch = cache.batch([row], len(columns), positions[row, columns])
                out[row, columns] = self.run(x[row, columns], launch, cache.kv_cache, own if of_layers else None)
                for state, mine in zip(of_layers, own, strict=True):
                    state[row, columns] = mine
        if states is not None:
            states += of_layers
        return out

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if inputs_embeds is not None and input_ids is None:
            size = self.config.hidden_size
            if inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != size or inputs_embeds.numel() == 0:
                raise ValueError(f"inputs_embeds has shape {list(inputs_embeds.shape)}, must be [B, T, {size}], filled")
            return inputs_embeds.to(self.device, self.dtype).contiguous()
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("give either input_ids or inputs_embeds, and not both")
        check_batch_ids("input_ids", input_ids, self.config.vocab_size)
        ids = input_ids.to(self.device)
        return self.ops.embed(ids.flatten().contiguous(), self.embed_tokens.weight).view(*ids.shape, -1)

    def _new_cache(self, batch: int, tokens: int, *, scratch: bool) -> KVCache:
        each = pages_of(tokens)
        kv_cache = PagedKVCache(self.config, batch * each, self.dtype, self.device, scratch=scratch)
        return KVCache(kv_cache, [list(range(first, first + each)) for first in range(0, batch * each, each)])


class InternLM3ForCausalLM(Generation):
    """InternLM3 with its language-model head. Arguments as InternLM3Model."""

    decoder_class = InternLM3Model
    model: InternLM3Model

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        config: InternLM3Config | None = None,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        device_map: str | Mapping[str, Any] | None = None,
        device: str | torch.device | None = None,
        use_safetensors: bool | None = None,
        batch_invariant: bool = False,
        progress: bool = True,
        **unknown: Any,
    ) -> InternLM3ForCausalLM:
        """Loads a model from a local folder or the hub.

        Host memory stays under the model's size plus one shard.

        Args:
            pretrained_model_name_or_path: a folder with config.json and weights, or a hub repository "owner/name".
            config: use this configuration instead of the checkpoint's.
            revision, token, cache_dir, local_files_only: as in huggingface_hub.
            dtype (or torch_dtype): "auto" (the default: what the checkpoint says), "bfloat16", "float16" or "float32".
            device_map: "auto" (the default: the GPU if there is one), or a device; this runtime runs on one device.
            device: the same as device_map.
            use_safetensors: True refuses pickled weights, which else are read where there is nothing else.
            batch_invariant: on a GPU, a prompt's answer is the same to the last bit whatever else is decoded with it;
                decoding alone is slower.
            progress: show progress bars of download and load.

        Raises:
            FileNotFoundError: a file that the checkpoint should have is missing.
            ValueError: files that are damaged or disagree with each other or with config.json; the message names them.
            TypeError: an unknown keyword.
            MemoryError: the weights don't fit into the device's free memory.
        """
        known = InternLM3ForCausalLM.from_pretrained.__kwdefaults__ or ()
        without_neutral("from_pretrained", unknown, LOAD_MODEL, known=known)
        if use_safetensors not in (None, True):
            raise ValueError(f"use_safetensors={use_safetensors!r} is not supported; it can only be True here")
        where = resolve_device(_agreed(device=device, device_map=device_map))
        wanted = _agreed(dtype=resolve_dtype(dtype), torch_dtype=resolve_dtype(torch_dtype))
        folder = locate(
            pretrained_model_name_or_path,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            progress=progress,
        )
        generation_config = read_generation_config(folder)  # before the weights: small files with errors come first
        model = load_model(
            cls,
            folder,
            config=config,
            dtype=wanted,
            device=where,
            batch_invariant=batch_invariant,
            use_safetensors=bool(use_safetensors),
            progress=progress,
        )
        model.generation_config = generation_config
        return model

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *, max_shard_size: int | str = "5GB", **unknown: Any
    ) -> None:
        """Writes config.json, generation_config.json and safetensors shards with their index, in the hub's format.

        All files are written before the first of them takes its place: after an error the folder is as it was. Shards
        that an earlier save left, and that this one does not name, are removed.

        Raises:
            ValueError: a max_shard_size that is no size. OSError: the disk is full, or the folder cannot be written.
        """
        without_neutral("save_pretrained", unknown, SAVE, known=("save_directory", "max_shard_size"))
        self.config.dtype = str(self.dtype).removeprefix("torch.")
        folder = Path(save_directory)
        notes = {"config.json": self.config.to_dict()}
        if self.generation_config or (folder / GENERATION_CONFIG).is_file():
            notes[GENERATION_CONFIG] = self.generation_config
        save_weights(self, folder, notes, max_shard_size=max_shard_size)

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
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **unknown: Any,
    ) -> CausalLMOutput:
        """Logits of the next token at every position; arguments as InternLM3Model.forward, and

        labels: [B, T] int64, as input_ids, -100 where there is none: adds the mean cross-entropy of each label given
            the tokens before it, in float32.
        logits_to_keep: only the last so many positions (0: all), or the positions in a 1-d tensor.
        """
        out = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_hidden_states,
            **unknown,
        )
        x = out.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.ops.linear(x[:, kept], self.lm_head.weight)
        loss = None
        if labels is not None:
            if labels.shape != x.shape[:2] or logits.shape[1] != x.shape[1]:
                raise ValueError(
                    f"labels has shape {list(labels.shape)} and logits_to_keep is {logits_to_keep}: "
                    f"a loss needs labels {list(x.shape[:2])} and all logits"
                )
            check_batch_ids("labels", labels.masked_fill(labels == -100, 0), self.config.vocab_size)
            targets = labels[:, 1:].to(logits.device)
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten())
        return CausalLMOutput(logits, loss, out.past_key_values, out.hidden_states)


def _check_cache(cache: KVCache, x: Tensor) -> None:
    """Raises ValueError unless the cache can be continued by x [B, T, C]."""
    if len(cache.pages) != len(x):
        raise ValueError(f"past_key_values holds {len(cache.pages)} sequences, and the input {len(x)}")
    kv = cache.kv_cache
    if (kv.device, kv.dtype) != (x.device, x.dtype):
        raise ValueError(
            f"past_key_values lies on {kv.device} as {kv.dtype}, and the model is on {x.device} as {x.dtype}: "
            "a model that was moved begins without the cache that it had"
        )


def _real(mask: Tensor | None, batch: int, tokens: int, past: Tensor) -> Tensor:
    """[B, T] bool on the host: which of the last T columns are no padding. past: the same of those in the cache.

    Raises ValueError for a wrong shape, or where the mask says of the past what it was not.
    """
    columns = past.shape[1] + tokens
    if mask is None:
        mask = torch.ones(batch, columns, dtype=torch.bool)
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


def _agreed(**spellings: Any) -> Any:
    """The value given under one of two names, None where neither is. Raises ValueError where both are and differ."""
    given = {name: value for name, value in spellings.items() if value is not None}
    value = next(iter(given.values()), None)
    if any(other != value for other in given.values()):
        raise ValueError(f"{' and '.join(f'{name}={other!r}' for name, other in given.items())}: give one of them")
    return value
