"""The launches that compile every kernel that a model can need, to be run before it serves.

A kernel is compiled for its model's shapes, for the stages of sampling that a call uses, and for a choice of tiles by
the number of rows. No length, count, page, table width or offset of a view causes a compilation. So a model with a
vocabulary size that is a multiple of 8 has compiled everything once it has run

    one sequence of T tokens, for every T of `token_counts`      (a chunk of a prompt, and its logits)
    a decode step of B rows, for every B of `batch_sizes`, with every set of stages that its sampling can have, and
    every dtype of logits
    a step with drafts of B sequences, for every B that has them, with the same sets of stages; and its `draft`

With another vocabulary size, the alignment of a row of logits decides how wide its loads are.
"""

import torch

from . import linear_quantised
from .launch import is_hopper
from .linear_few_rows import FEW_ROWS, padded_rows
from .paged_attention import tiling
from .rope_and_cache import heads_per_program


def token_counts(most: int, group: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> list[int]:
    """Numbers of tokens for which one sequence compiles everything that any number up to `most` needs.

    `group`: query heads per key/value head.
    """
    firsts: dict[object, int] = {}
    for tokens in range(1, most + 1):
        tiles = tiling(tokens, group, head_dim, dtype, is_hopper(device), alone=False)
        firsts.setdefault((_linear(tokens), heads_per_program(tokens), tiles), tokens)
    return list(firsts.values())


def batch_sizes(most: int) -> list[int]:
    """Batch sizes of decode steps that compile everything that any batch size up to `most` needs."""
    firsts: dict[object, int] = {}
    for rows in range(1, most + 1):
        firsts.setdefault(_linear(rows), rows)
    return list(firsts.values())


def _linear(rows: int) -> tuple[int, int]:
    """What the kernels of linear layers are compiled for: padded numbers of rows, or 0 where torch multiplies."""
    if rows > FEW_ROWS:
        return 0, 0
    return 1 if rows == 1 else padded_rows(rows), linear_quantised.padded_rows(rows)
