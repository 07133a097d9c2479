"""What a model can need to be compiled, as a list of launches to make before it serves.

A kernel is compiled for its model's shapes, for the stages of sampling that a call has, and for a choice of tiles by
the number of rows. Nothing else compiles: no length, count, page, width of a table, or place of a view. So a model has
compiled everything once it has run

    one sequence of T tokens, for every T of `token_counts`      (a piece of a prompt, and its logits)
    a decode step of one row, and of two, with every set of stages that its sampling knows, and every dtype of logits

where its vocabulary is a multiple of 8: else where a row of it begins decides how wide it is read.
"""

import torch

from ..reference import FEW_ROWS
from .launch import is_hopper
from .paged_attention import tiling
from .rope_and_cache import heads_of_a_program


def token_counts(most: int, group: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> list[int]:
    """The least numbers of tokens with which a sequence compiles all that any number of them up to `most` needs.

    `group`: query heads for each key/value head.
    """
    firsts: dict[object, int] = {}
    for tokens in range(1, most + 1):
        tiles = tiling(tokens, group, head_dim, dtype, is_hopper(device), alone=True)
        firsts.setdefault((min(tokens, 2), tokens <= FEW_ROWS, heads_of_a_program(tokens), tiles), tokens)
    return list(firsts.values())
