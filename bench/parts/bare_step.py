"""Steps of a model with random weights, without the engine: this module fills the slots itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor

from internlm3 import InternLM3Config, InternLM3ForCausalLM
from internlm3.runtime.engine import decode, prefill
from internlm3.runtime.engine.draft_rows import MOST_SEQUENCES, DraftRows
from internlm3.runtime.engine.layout import state_layout
from internlm3.runtime.engine.state import DecodeState, Tier
from internlm3.runtime.model import model as runtime_model
from internlm3.runtime.model.kv_cache import PagedKVCache, pages_of
from internlm3.runtime.model.rope import inverse_frequencies

from ..models import INTERNLM3, MODELS, Size

TOY = Size(hidden=64, intermediate=96, vocabulary=320, heads=4, kv_heads=2, head_dim=16)


def device_of(small: bool) -> torch.device:
    return torch.device("cpu") if small else torch.device("cuda", 0)


def config_of(name: str, small: bool = False) -> InternLM3Config:
    """The configuration of a model in MODELS; for a dry run, of a toy with its rotary embedding."""
    model = MODELS[name]
    size = TOY if small else model.size
    return InternLM3Config(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=2 if small else model.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        max_position_embeddings=32 if small else model.window,
        **model.rope,
    )


def random_model(
    small: bool, name: str = INTERNLM3, *, layers: int | None = None, dtype: torch.dtype | None = None
) -> InternLM3ForCausalLM:
    """Shapes of a model in MODELS, in bfloat16; for a dry run a toy's in float16, which the interpreter supports.

    layers: the most that it has.
    """
    config = config_of(name, small)
    config.num_hidden_layers = min(layers or config.num_hidden_layers, config.num_hidden_layers)
    torch.manual_seed(1)
    dtype = dtype or (torch.float16 if small else torch.bfloat16)
    model = InternLM3ForCausalLM(config, dtype=dtype, device=device_of(small))
    for weight in model.parameters():
        if weight.dim() == 2:  # scaled so that activations keep their size from layer to layer
            weight.copy_(torch.randn_like(weight) * weight.shape[1] ** -0.5)
    return model


@contextlib.contextmanager
def on_ops(ops: ModuleType) -> Iterator[None]:
    """Makes models run on these ops, whatever their device, and never batch prompts."""
    with (
        mock.patch.object(runtime_model, "for_device", lambda device: ops),
        mock.patch.object(ops, "ROW_COUNT_CHANGES_BITS", True, create=True),
    ):
        yield


class Steps:
    """A batch of sequences of up to `tokens` tokens each, with pages of their own.

    Keys and values are random: uninitialized memory may contain a NaN, which ends a sequence, and its later steps would
    do less. Steps of few sequences end with their drafts, as the engine's do on a GPU. Raises
    torch.cuda.OutOfMemoryError, or MemoryError on a CPU, if the pages don't fit.
    """

    def __init__(self, model: InternLM3ForCausalLM, batch: int, tokens: int):
        config, device = model.config, model.device
        self.model = model
        pages = pages_of(tokens)
        self.kv_cache = PagedKVCache(config, batch * pages, model.dtype, device)
        for layer in self.kv_cache.layers:
            layer.normal_()
        layout = state_layout(pages, config.vocab_size, config.head_dim)
        self.state = DecodeState.of(layout, torch.zeros(batch * layout.words, dtype=torch.int32, device=device))
        self.rows = DraftRows.like(self.state).of(batch) if batch <= MOST_SEQUENCES else None
        self.state.max_len.fill_(2**30)
        self.state.allowed.fill_(-1)
        self.state.permitted.fill_(-1)
        for row in range(batch):
            self.state.batch.block_table[row] = torch.arange(row * pages, (row + 1) * pages, dtype=torch.int32)
            self.state.batch.inv_freq[row] = inverse_frequencies(config, tokens, device)

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int], row: int = 0) -> Tensor:
        """Prefills slot `row` with a prompt. Returns the logits [1, V] of its last token."""
        prompt = torch.tensor(ids, device=self.model.device)
        last = prefill.run_chunks(self.model, self.kv_cache, self.state.slots(row, row + 1).batch, [prompt], [0])
        self.state.batch.seq_lens[row] = len(ids)
        return self.model.head(last)

    @torch.inference_mode()
    def follow(self, token: int) -> Tensor:
        """Appends a token to slot 0. Returns its logits [1, V]."""
        state = self.state.slots(0, 1)
        state.token[0] = token
        state.batch.seq_lens[0] += 1
        return decode.forward(self.model, self.kv_cache, state)

    def set_context(self, tokens: int) -> None:
        """Sets the context length of all sequences; their keys and values stay what they are."""
        self.state.batch.seq_lens.fill_(tokens)

    @torch.inference_mode()
    def step(self, tier: Tier = Tier.USUAL) -> None:
        decode.step(self.model, self.kv_cache, self.state, tier)
        if self.rows is not None:
            decode.draft(self.model.model.ops, self.state, self.rows)
