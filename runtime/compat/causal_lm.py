"""InternLM3ForCausalLM: the model with its language-model head, as transformers has it."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.checks import as_int, check_batch_ids
from ..common.neutral import FORWARD, without_neutral
from ..model.layers import Embedding
from ..model.model import LanguageModel
from .cache import KVCache
from .decoder import InternLM3Model, check_tensors, own_dtypes
from .generation import Generation
from .model_outputs import CausalLMOutput


class InternLM3ForCausalLM(Generation):
    """InternLM3 with its language-model head.

    Args:
        config: the model's shape; weights are random (normal, config.initializer_range) until they are loaded.
        device, dtype: of the weights; PyTorch's defaults by default.
    """

    decoder_class = InternLM3Model
    model: InternLM3Model

    def get_input_embeddings(self) -> Embedding:
        """The embedding: called with ids [B, T] it returns the inputs_embeds [B, T, C] of `forward`."""
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        """The head, whose weight is [vocab_size, hidden_size]."""
        return self.lm_head

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """The number of parameters, tied ones once and quantised ones as what they stand for. None is trainable."""
        if only_trainable:
            return 0
        plain = LanguageModel(self.config, device="meta")
        embedding = plain.model.embed_tokens.weight.numel() if exclude_embeddings else 0
        return sum(parameter.numel() for parameter in plain.parameters()) - embedding

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """The bytes of the weights as they are in memory."""
        tensors = itertools.chain(self.parameters(), self.buffers() if return_buffers else ())
        return sum(tensor.nbytes for tensor in tensors)

    @own_dtypes
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
        """Logits of the next token at every position. Arguments and errors as InternLM3Model.forward, and:

        Args:
            labels: [B, T] int64, usually input_ids; -100 is ignored. Returns the loss too: the mean cross-entropy of
                each label given the tokens before it, in float32.
            logits_to_keep: return the logits of this many last positions only (0: of all), or of the positions in a 1-d
                tensor.
        """
        if unknown:
            known = [*inspect.signature(InternLM3ForCausalLM.forward).parameters][1:-1]  # not self, **unknown
            without_neutral("forward", unknown, FORWARD, known=known)
        check_tensors(labels=labels)
        positions = isinstance(logits_to_keep, Tensor) and logits_to_keep.dim() > 0  # a tensor [1] is one position
        count = None if positions else as_int(logits_to_keep)
        if count is None:
            check_tensors(logits_to_keep=logits_to_keep)
        out = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_hidden_states,
        )
        x = out.last_hidden_state
        kept = logits_to_keep if count is None else slice(-count, None)
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
