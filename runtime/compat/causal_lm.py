"""InternLM3ForCausalLM: the model with its language-model head, as transformers has it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.checks import as_int, check_batch_ids
from ..common.neutral import FORWARD, without_neutral
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
