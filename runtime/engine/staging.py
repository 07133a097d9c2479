"""The way of a request to the device: the host packs its state and its prompt into one buffer, which is copied once."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..model.config import InternLM3Config
from ..model.kv_cache import PAGE
from ..model.rope import inverse_frequencies, rope_base
from ..sampling.settings import STATE
from ..sampling.token_masks import holding, packed, permitted
from .layout import Field, Layout, number, vector
from .request import Request
from .state import DecodeState, Slot

_INT32_MAX = 2**31 - 1
# Copies that may be under way while the host packs the next one: chunks of a long prompt follow each other at once.
_HOST_BUFFERS = 2


class Staging:
    """One request's state, before it is stored in a slot of the batch, and what else its first launches read.

    Both are in one buffer on the device, at fixed addresses, so that captured launches can read them. The host packs
    them with NumPy, without an operation of PyTorch, and leaves out the long fields: the op `count_prompt` makes those
    from the prompt and the biases.

    Args:
        layout, rows: of the batch's state, and its buffer.
        spare: a page that belongs to no sequence.
        chunk: tokens of a chunk of a prompt.

    Attributes:
        state: a state of one slot.
        batch: its metadata for the launch of a chunk, with a write table.
        tokens: [chunk] int64, the tokens of the chunk, on the left.
    """

    def __init__(self, config: InternLM3Config, layout: Layout, rows: Tensor, spare: int, chunk: int):
        self._config, self._layout, self._rows, self._spare = config, layout, rows, spare
        (pages,) = layout.fields["block_table"].shape
        inputs_layout = Layout(
            {
                "tokens": vector(chunk, torch.int64),
                "write_table": vector(pages),
                "index": number(torch.int32),
                "lengths": vector(2),
                # The longest prompt, and a bias for every token.
                "request": vector(pages * PAGE + 2 * config.vocab_size),
            }
        )
        # Both layouts in one buffer. The host writes all but the fields that `count_prompt` writes, which come first.
        inputs_start = -(-layout.words // 4) * 4
        places = [(layout, 0), (inputs_layout, inputs_start)]
        of_all = {name: (start + at, field) for each, at in places for name, start, field in each}
        self._first, self._request_start = of_all["block_table"][0], of_all["request"][0]
        self._buffer = torch.zeros(inputs_start + inputs_layout.words, dtype=torch.int32, device=rows.device)
        self._row = self._buffer[: layout.words]
        inputs = inputs_layout.views(self._buffer[inputs_start:])
        self._index, self._lengths, self._request = inputs["index"], inputs["lengths"][0], inputs["request"][0]
        self._starts = torch.tensor(layout.starts, dtype=torch.int32, device=rows.device)
        self._hosts = deque(_HostBuffer(of_all, self._first, self._buffer) for _ in range(_HOST_BUFFERS))
        self._frequencies: tuple[float, list[float]] | None = None
        self.state = DecodeState.of(layout, self._row)
        self.batch = replace(self.state.batch, write_table=inputs["write_table"])
        self.tokens = inputs["tokens"][0]

    def copy(self, slot: Slot, begin: int, width: int) -> None:
        """Packs and copies a request, and the chunk of its prompt that begins at token `begin`.

        The chunk has up to `width` tokens, and is padded to that on the left. Its end is the sequence's length.
        """
        host = self._next_host()
        ids, pages = slot.request.prompt_ids, slot.pages
        chunk = ids[begin : begin + width]
        host["tokens"][:width] = [0] * (width - len(chunk)) + chunk
        host["seq_lens"][0] = begin + len(chunk)
        host["block_table"][: len(pages)] = pages
        # Where the padding coincides with cached tokens, what it would write goes to the spare page.
        cached = begin // PAGE
        host["write_table"][: len(pages)] = [self._spare] * cached + pages[cached:]
        host["inv_freq"][: self._config.head_dim // 2] = self._inv_freq(len(ids))
        host["index"][0] = slot.index
        _pack_settings(host, slot.request)
        used = _pack_prompt(host, slot.request)
        host.copy_to(self._buffer[self._first : self._request_start + used])

    def _inv_freq(self, prompt_tokens: int) -> list[float]:
        """The rotary frequencies of a sequence, which are the same for every prompt within the trained window."""
        base = rope_base(self._config, prompt_tokens)
        if self._frequencies is None or self._frequencies[0] != base:
            self._frequencies = base, inverse_frequencies(self._config, prompt_tokens).tolist()
        return self._frequencies[1]

    def _next_host(self) -> _HostBuffer:
        """A host buffer whose last copy has been made."""
        self._hosts.rotate(1)
        self._hosts[0].wait()
        return self._hosts[0]

    def count_prompt(self, ops: ModuleType) -> None:
        """Writes the fields that the host does not pack."""
        names = ("history", "prompt_counts", "output_counts", "logit_bias")
        ops.count_prompt(self._request, self._lengths, **{name: getattr(self.state, name)[0] for name in names})

    def store(self, ops: ModuleType) -> None:
        """Stores the state in its slot of the batch."""
        ops.store_row(self._row, self._rows, self._starts, self._index)

    def clear(self) -> None:
        """Makes the state idle: no launch writes to a page then."""
        self._buffer.zero_()


class _HostBuffer:
    """Host memory for the fields of a device buffer from word `first` on, and an event that fires once it is copied."""

    def __init__(self, places: Mapping[str, tuple[int, Field]], first: int, buffer: Tensor):
        on_gpu = buffer.is_cuda
        self._words = torch.zeros(len(buffer) - first, dtype=torch.int32, device="cpu", pin_memory=on_gpu)
        self._copied: Any = torch.cuda.Event() if on_gpu else None
        words = self._words.numpy()
        self._fields = {
            name: words[start - first :][: field.words].view(str(field.dtype).removeprefix("torch."))
            for name, (start, field) in places.items()
            if start >= first
        }

    def __getitem__(self, name: str) -> Any:
        return self._fields[name]

    def copy_to(self, device: Tensor) -> None:
        """Copies the first words to the device, at once on a CPU."""
        device.copy_(self._words[: len(device)], non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def wait(self) -> None:
        """Waits until what was packed last has been copied."""
        if self._copied is not None:
            self._copied.synchronize()


def _pack_settings(host: _HostBuffer, request: Request) -> None:
    p, length = request.params, len(request.prompt_ids)
    host["max_len"][0] = length + request.max_tokens
    host["min_len"][0] = min(length + p.min_tokens, _INT32_MAX)  # never, beyond any context
    host["most_drafts"][0] = _INT32_MAX if p.speculation else 0
    host["seed"][0], host["stream"][0] = request.seed, request.answer
    for name in STATE:
        value = getattr(p, name)
        # A top_k of -1 is off; one beyond the vocabulary may be any number.
        host[name][0] = min(max(value, 0), _INT32_MAX) if name == "top_k" else value
    tokens = 8 * host["end_mask"].nbytes  # the vocabulary, and some more for whole words
    ends, all_permitted = holding(request.ends, tokens), permitted(p, tokens)
    allowed = all_permitted & ~ends if p.min_tokens else all_permitted
    for name, mask in (("end_mask", ends), ("permitted", all_permitted), ("allowed", allowed)):
        host[name].view("uint32")[:] = packed(mask)
    if request.constraint is not None:
        words = request.constraint.allowed(())
        host["allowed"].view("uint32")[: len(words)] = words


def _pack_prompt(host: _HostBuffer, request: Request) -> int:
    """Packs what the op `count_prompt` reads. Returns the number of words of its `request`."""
    biases = request.params.logit_bias or {}
    words = [*request.prompt_ids, *biases]
    end = len(words) + len(biases)
    host["lengths"][:2] = len(request.prompt_ids), len(biases)
    host["request"][: len(words)] = words
    host["request"][len(words) : end].view("float32")[:] = [*biases.values()]
    return end
