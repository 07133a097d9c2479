"""What a model predicts at every token of a text, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..model.kv_cache import BatchMetadata, PagedKVCache, pages_of
from ..model.model import LanguageModel
from ..model.rope import inverse_frequencies

_CHUNK = 512  # tokens of a launch: logits of 512 tokens are 0.26 GB in float32 for InternLM3's vocabulary


def prompt_logits(
    model: LanguageModel, kv_cache: PagedKVCache, ids: Sequence[int], first: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each chunk the logits [N, V] that predict tokens of a text from those before, and these tokens, int64 [N].

    All chunks together predict the tokens from `first` on, which is at least 1. Each is computed when it is asked for.

    Args:
        kv_cache: one that nobody else uses, with room for the text. What it has is overwritten.
    """
    device, pages = model.device, pages_of(len(ids))
    tokens = torch.tensor(ids, dtype=torch.int64, device=device)
    batch = BatchMetadata(
        torch.arange(pages, dtype=torch.int32, device=device)[None],
        torch.zeros(1, dtype=torch.int32, device=device),
        inverse_frequencies(model.config, len(ids), device)[None],
    )
    for begin in range(0, len(ids), _CHUNK):
        chunk = tokens[begin : begin + _CHUNK]
        batch.seq_lens.fill_(begin + len(chunk))
        x = model.model.ops.embed(chunk, model.model.embed_tokens.weight)
        x = model.model.run(x, batch, kv_cache)
        # Row i predicts token begin + i + 1.
        rows = x[max(first - 1 - begin, 0) : len(ids) - 1 - begin]
        targets = tokens[max(first, begin + 1) : begin + len(chunk) + 1]
        if len(rows):
            yield model.head(rows.contiguous()), targets
