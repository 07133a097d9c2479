"""The types of tensors in GGUF files: blocks of numbers, each of a few bytes.

Definitions: ggml's repository (ggml-common.h and ggml-quants.c). A block's bytes are, in this order:

    Q4_0   scale fp16, 16 bytes            w = (q - 8) d; byte j has numbers j (low) and j + 16 (high)
    Q4_1   d, m fp16, 16 bytes             w = q d + m
    Q5_0   d fp16, 4 bytes, 16 bytes       the fifth bits of all 32 in a word; w = (q - 16) d
    Q5_1   d, m fp16, 4 bytes, 16 bytes    w = q d + m
    Q8_0   d fp16, 32 int8                 w = q d
    Q4_K   d, m fp16, 12 bytes, 128 bytes          eight groups of 32: w = d s q - m t, with 6 bits of s and t each
    Q5_K   d, m fp16, 12 bytes, 32 bytes, 128      likewise, with fifth bits
    Q6_K   128 bytes, 64 bytes, 16 int8, d fp16    sixteen groups of 16: w = d s (q - 32)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..quantised.integers import Integers


class Numbers(NamedTuple):
    """What N blocks hold: w = (q - zero) * scale + minimum.

    Attributes:
        q: [N, size] uint8, of `bits`, or int8.
        scale, minimum: [N, groups] float32; minimum is None where there is none.
    """

    q: Tensor
    scale: Tensor
    minimum: Tensor | None = None
    zero: int = 0
    bits: int = 8


class Block(NamedTuple):
    """A type: numbers and bytes of a block, and what reads blocks [N, bytes] uint8, as [N, size] float32 if they are
    floats.
    """

    name: str
    size: int
    bytes: int
    read: Callable[[Tensor], Numbers | Tensor]


def _as(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, n] uint8 -> [N, n / itemsize] of another dtype, in float32."""
    return blocks.contiguous().view(dtype).float()


def _halves(data: Tensor) -> Tensor:
    """[..., n] bytes -> [..., 2 n]: the low four bits of all, then the high ones."""
    return torch.cat([data & 15, data >> 4], -1)


def _bits(words: Tensor, count: int) -> Tensor:
    """[N, count / 8] bytes -> [N, count]: their bits, the lowest first."""
    shifts = torch.arange(8, dtype=torch.uint8, device=words.device)
    return ((words[:, :, None] >> shifts) & 1).flatten(1)[:, :count]


def _q4_0(x: Tensor) -> Numbers:
    return Numbers(_halves(x[:, 2:]), _as(x[:, :2], torch.float16), zero=8, bits=4)


def _q4_1(x: Tensor) -> Numbers:
    return Numbers(_halves(x[:, 4:]), _as(x[:, :2], torch.float16), _as(x[:, 2:4], torch.float16), bits=4)


def _q5_0(x: Tensor) -> Numbers:
    q = _halves(x[:, 6:]) | _bits(x[:, 2:6], 32) << 4
    return Numbers(q.to(torch.int8) - 16, _as(x[:, :2], torch.float16))


def _q5_1(x: Tensor) -> Numbers:
    q = _halves(x[:, 8:]) | _bits(x[:, 4:8], 32) << 4
    return Numbers(q.to(torch.int8), _as(x[:, :2], torch.float16), _as(x[:, 2:4], torch.float16))


def _q8_0(x: Tensor) -> Numbers:
    return Numbers(x[:, 2:].contiguous().view(torch.int8), _as(x[:, :2], torch.float16))


def _scales_and_minima(x: Tensor) -> tuple[Tensor, Tensor]:
    """The scales d s and minima -m t of a Q4_K or Q5_K block's eight groups, [N, 8] each.

    Of the 12 bytes the first four have s, the next four t of groups 0 to 3 in their low six bits. The last four have
    the low four bits of s and t of groups 4 to 7, whose high two bits are on top of the first eight bytes.
    """
    d, m = _as(x[:, :2], torch.float16), _as(x[:, 2:4], torch.float16)
    s, t, rest = x[:, 4:8], x[:, 8:12], x[:, 12:16]
    scales = torch.cat([s & 63, (rest & 15) | s >> 6 << 4], 1)
    minima = torch.cat([t & 63, rest >> 4 | t >> 6 << 4], 1)
    return d * scales.float(), -(m * minima.float())


def _q4_k(x: Tensor) -> Numbers:
    return Numbers(_halves(x[:, 16:].unflatten(1, (4, 32))).flatten(1), *_scales_and_minima(x), bits=4)


def _q5_k(x: Tensor) -> Numbers:
    groups = torch.arange(8, dtype=torch.uint8, device=x.device)[:, None]
    fifth = (x[:, None, 16:48] >> groups) & 1  # bit g of byte i belongs to number i of group g
    q = _halves(x[:, 48:].unflatten(1, (4, 32))).reshape(-1, 8, 32) | fifth << 4
    return Numbers(q.flatten(1).to(torch.int8), *_scales_and_minima(x))


def _q6_k(x: Tensor) -> Numbers:
    low = _halves(x[:, :128].unflatten(1, (2, 64))).flatten(1)  # of each half 64 numbers low, then 64 high
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=x.device)[:, None]
    high = ((x[:, 128:192].unflatten(1, (2, 1, 32)) >> shifts) & 3).flatten(1)
    q = (low | high << 4).to(torch.int8) - 32
    return Numbers(q, _as(x[:, 208:210], torch.float16) * _as(x[:, 192:208], torch.int8))


# By the numbers of the types in a file.
BLOCKS = {
    0: Block("F32", 1, 4, lambda x: _as(x, torch.float32)),
    1: Block("F16", 1, 2, lambda x: _as(x, torch.float16)),
    30: Block("BF16", 1, 2, lambda x: _as(x, torch.bfloat16)),
    2: Block("Q4_0", 32, 18, _q4_0),
    3: Block("Q4_1", 32, 20, _q4_1),
    6: Block("Q5_0", 32, 22, _q5_0),
    7: Block("Q5_1", 32, 24, _q5_1),
    8: Block("Q8_0", 32, 34, _q8_0),
    12: Block("Q4_K", 256, 144, _q4_k),
    13: Block("Q5_K", 256, 176, _q5_k),
    14: Block("Q6_K", 256, 210, _q6_k),
}


def numbers(kind: int, data: Tensor, shape: tuple[int, ...]) -> Integers | Tensor:
    """What a tensor holds: integers, if it is a matrix of them, else float32.

    Args:
        kind: a key of BLOCKS.
        data: its bytes, uint8.
        shape: its shape.
    """
    block = BLOCKS[kind]
    found = block.read(data.view(-1, block.bytes))
    if isinstance(found, Tensor):
        return found.view(shape)
    q = found.q.view(-1, shape[-1])
    minimum = None if found.minimum is None else found.minimum.view(len(q), -1)
    integers = Integers(q, found.scale.view(len(q), -1), found.zero, found.bits, minimum)
    return integers if len(shape) == 2 else integers.weight().view(shape)
