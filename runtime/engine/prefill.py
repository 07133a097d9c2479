"""Prompts into pages by captured launches: of a short piece the host launches for longer than a GPU computes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..model.model import LanguageModel
from ..model.pages import PAGE, Pages, Sequences
from . import decode
from .graphs import Capture

# A prompt is padded to the least of these, or to a chunk, and each is captured once. Padding is cheap: up to about 256
# tokens a GPU reads weights for longer than it computes.
WIDTHS = (16, 64, 128, 256)


class Filler:
    """Runs prompts alone, each piece of a prompt padded in front.

    Behind other pieces the padding stands on tokens that are there: what it would write goes to the spare page.

    Args:
        slots: how many pages a sequence's table names.
    """

    def __init__(self, model: LanguageModel, pages: Pages, slots: int, capture: Capture):
        config, device = model.config, model.device
        self._model, self._pages, self._capture = model, pages, capture
        self._captured: dict[int, Callable[[], None]] = {}
        self._last: dict[int, Tensor] = {}  # the last row that a captured launch leaves, [1, C]
        # What they read.
        self._tokens = torch.zeros(decode.CHUNK, dtype=torch.int64, device=device)
        self._write_table = torch.zeros(1, slots, dtype=torch.int32, device=device)
        self._seqs = Sequences(
            torch.zeros(1, slots, dtype=torch.int32, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
            torch.zeros(1, config.head_dim // 2, device=device),
            write_table=self._write_table,
        )

    def fill(self, seqs: Sequences, prompt: Tensor, begin: int) -> Tensor:
        """`decode.prefill` of one prompt [T] from token `begin` on, of the row `seqs`: its last row [1, C]."""
        self._seqs.block_table.copy_(seqs.block_table)
        self._seqs.inv_freq.copy_(seqs.inv_freq)
        for start in range(begin, len(prompt), decode.CHUNK):
            piece = prompt[start : start + decode.CHUNK]
            self._write_table.copy_(seqs.block_table)
            self._write_table[:, : start // PAGE] = self._pages.spare
            last = self._run(piece, start + len(piece))
        return last.clone()  # the next launch takes its place

    def warm_up(self, longest: int) -> None:
        """Captures all that prompts of up to `longest` tokens need."""
        for width in sorted({_width(tokens) for tokens in range(1, min(longest, decode.CHUNK) + 1)}):
            self._run(self._tokens[:width].clone(), 0)  # of an idle sequence: no page is written

    def _run(self, piece: Tensor, length: int) -> Tensor:
        """A piece of a sequence that holds `length` tokens with it; its last row [1, C]. Padding stands in front."""
        width = _width(len(piece))
        self._tokens[: width - len(piece)].zero_()
        self._tokens[width - len(piece) : width].copy_(piece)
        self._seqs.seq_lens.fill_(length)
        if width not in self._captured:
            self._captured[width] = self._capture(lambda: self._launch(width))
        self._captured[width]()
        return self._last[width]

    def _launch(self, width: int) -> None:
        model = self._model.model
        x = model.ops.embed(self._tokens[:width], model.embed_tokens.weight)
        self._last[width] = model.run(x, self._seqs, self._pages, last_rows=True)


def _width(tokens: int) -> int:
    return min((width for width in WIDTHS if tokens <= width < decode.CHUNK), default=decode.CHUNK)
