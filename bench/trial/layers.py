"""Layers of a decode step. Each has weights and a cache of its own, so the L2 cache never has what is read next."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from internlm3 import kernels
from internlm3.kernels.triton import linear_few_rows

from .. import candidates
from ..candidates.reference import APART, interleaved, sum_of
from ..candidates.settings import Ring
from ..candidates.sum_and_norm import sum_and_norm
from ..cases import Inputs

EPS = 1e-5


class Weights(NamedTuple):
    """The weights of one layer."""

    norm: Tensor
    qkv: Tensor
    o: Tensor
    post_norm: Tensor
    gate_up: Tensor  # [2I, C], gate rows in front
    interleaved: Tensor  # the same rows: see candidates/reference.py
    down: Tensor


def weights(make: Inputs, layers: int) -> list[Weights]:
    size = make.size
    found = []
    for _ in range(layers):
        gate_up = make.weight(2 * size.intermediate, size.hidden)
        found.append(
            Weights(
                make.random(size.hidden),
                make.weight(size.qkv, size.hidden),
                make.weight(size.hidden, size.hidden),
                make.random(size.hidden),
                gate_up,
                interleaved(gate_up),
                make.weight(size.hidden, size.intermediate),
            )
        )
    return found


class Batch:
    """Sequences of one context length at all layers, and the hidden states that enter the first."""

    def __init__(self, make: Inputs, layers: list[Weights], sequences: int, context: int):
        self.make, self.layers, self.sequences, self.context = make, layers, sequences, context
        self.x = make.random(sequences, make.size.hidden)
        self.rope = [make.rope(sequences, context) for _ in layers]

    @property
    def shape(self) -> str:
        return f"batch {self.sequences}, context {self.context}"

    def qkv(self, layer: int, x: Tensor) -> Tensor:
        """q [R, H, D] of a layer's hidden states; k and v are in the cache."""
        w = self.layers[layer]
        return kernels.rms_norm_qkv_rope_cache(x, w.norm, EPS, w.qkv, None, **self.rope[layer])

    def attend(self, layer: int, q: Tensor, decode_step: bool = True) -> Tensor:
        rope = self.rope[layer]
        cache = {name: rope[name] for name in ("k_cache", "v_cache", "block_table", "seq_lens")}
        return kernels.paged_attention(q, **cache, scale=q.shape[-1] ** -0.5, decode_step=decode_step)


def as_built(batch: Batch, layer: int, x: Tensor, decode_step: bool = True) -> Tensor:
    """A layer as the runtime runs it."""
    w = batch.layers[layer]
    x = kernels.linear_add(batch.attend(layer, batch.qkv(layer, x), decode_step), w.o, x)
    return kernels.linear_add(kernels.rms_norm_swiglu(x, w.post_norm, EPS, w.gate_up), w.down, x)


def swiglu_of_interleaved(x: Tensor, norm: Tensor, weight: Tensor) -> Tensor:
    """`rms_norm_swiglu` of a weight whose pairs of rows are 8 apart. The bits are the same."""
    y = torch.empty(x.shape[0], weight.shape[0] // 2, dtype=x.dtype, device=x.device)
    linear_few_rows.multiply(y, x, weight, None, batch_invariant=False, norm=norm, eps=EPS, half=APART)
    return y


def with_interleaved(batch: Batch, layer: int, x: Tensor) -> Tensor:
    """A layer whose gate and up rows are 8 apart."""
    w = batch.layers[layer]
    x = kernels.linear_add(batch.attend(layer, batch.qkv(layer, x)), w.o, x)
    return kernels.linear_add(swiglu_of_interleaved(x, w.post_norm, w.interleaved), w.down, x)


class Attention(NamedTuple):
    """Settings of a decode step's attention. None: as built."""

    keys: int | None = None  # of a tile
    warps: int | None = None
    stages: int | None = None
    trigger: int | None = None  # where the successor may start: see `_attend`
    early: bool = True  # False: nothing is loaded before the wait


@contextlib.contextmanager
def attention_with(settings: Attention, alone: bool) -> Iterator[None]:
    """Within it, attention of a decode step is launched with these settings. alone: of a single sequence."""
    changes = {name: x for name in ("keys", "warps", "stages") if (x := getattr(settings, name)) is not None}
    file: Any = sys.modules[kernels.paged_attention.__module__]
    tiling = file.tiling

    def other(*shape: Any) -> Any:
        *given, _ = shape  # without `early` the op would say that it is not alone
        return tiling(*given, alone)._replace(**changes)

    trigger = file._TRIGGER if settings.trigger is None else settings.trigger
    with mock.patch.multiple(file, tiling=other, _TRIGGER=trigger):
        yield


def with_attention(batch: Batch, layer: int, x: Tensor, settings: Attention) -> Tensor:
    """A layer as built, but for attention's settings."""
    with attention_with(settings, batch.sequences == 1):
        return as_built(batch, layer, x, decode_step=settings.early)


def with_few_rows(batch: Batch, layer: int, x: Tensor, limit: int) -> Tensor:
    """A layer as built, but with cuBLAS for more than `limit` rows."""
    with mock.patch.object(sys.modules[kernels.linear.__module__], "FEW_ROWS", limit):
        return as_built(batch, layer, x)


def with_late_weights(batch: Batch, layer: int, x: Tensor, stages: int | None = None) -> Tensor:
    """A layer whose kernels of several rows load nothing of W before the wait. stages: of their pipelines, if given."""
    changes = {"early": 0} if stages is None else {"early": 0, "stages": stages}
    tiles: dict[str, Any] = {
        name: {rows: tile._replace(**changes) for rows, tile in getattr(linear_few_rows, name).items()}
        for name in ("HOPPER", "HOPPER_WIDE")
    }
    with mock.patch.multiple(linear_few_rows, **tiles):
        return as_built(batch, layer, x)


class Rings(NamedTuple):
    """How the candidates run a layer: the rings of its products, and the parts of o's and down's sums."""

    qkv: Ring
    o_down: Ring
    gate_up: Ring
    parts: int


class Unsummed(NamedTuple):
    """The hidden states after a layer of candidates: the next launch adds the residual and down's parts."""

    residual: Tensor
    parts: Tensor

    def summed(self) -> Tensor:
        return self.residual + sum_of(self.parts, self.residual.dtype)


def with_rings(batch: Batch, layer: int, state: Tensor | Unsummed, rings: Rings, rotated: bool = True) -> Unsummed:
    """A layer of candidates. rotated: with the launch that rotates q and k and fills the cache.

    Without it the values are wrong: its time is what a rotation inside the product's launch could reach.
    """
    w, rope, size = batch.layers[layer], batch.rope[layer], batch.make.size
    ops = candidates.for_device(batch.make.device)
    if isinstance(state, Unsummed):
        x, y = sum_and_norm(state.parts, state.residual, w.norm, EPS)
    else:
        x, y = state, kernels.rms_norm(state, w.norm, EPS)
    qkv = ops.linear(y, w.qkv, rings.qkv)
    if rotated:
        q = kernels.rope_and_cache(qkv, **rope)
    else:
        q = qkv.unflatten(1, (-1, size.head_dim))[:, : size.heads]
    parts = ops.partial_products(batch.attend(layer, q), w.o, rings.parts, rings.o_down)
    x, y = sum_and_norm(parts, x, w.post_norm, EPS)
    h = ops.linear_swiglu(y, w.interleaved, rings.gate_up)
    return Unsummed(x, ops.partial_products(h, w.down, rings.parts, rings.o_down))
