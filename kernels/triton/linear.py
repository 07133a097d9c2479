"""The linear layers of a block, each fused with the ops before and after it.

Up to FEW_ROWS rows take as long as reading the weights takes: `linear_few_rows` reads them once, in one launch. More
rows are bound by arithmetic: torch's linear, which is cuBLAS on a GPU, and a launch for each op before and after it.

Rows of a weight must begin at multiples of 16 bytes, since they are read 16 bytes at a time. With `batch_invariant` a
single row uses the kernel of several, so it is bit-identical alone and among up to FEW_ROWS - 1 other rows.

A quantised weight has kernels of its own (`linear_quantised`); for more than FEW_ROWS rows it becomes a matrix of the
dtype, in memory that is free afterwards, and each of its numbers is rounded to the dtype.

Every op raises TypeError for a wrong dtype and ValueError for a wrong shape, device, stride or alignment.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quantised import QuantisedWeight, Weight
from . import linear_few_rows, linear_quantised
from .dequantise import dequantise
from .launch import check, check_activation
from .linear_few_rows import FEW_ROWS
from .rms_norm import rms_norm
from .rope_and_cache import check_heads, rope_and_cache
from .swiglu import swiglu


def _check(x: Tensor, weight: Weight, bias: Tensor | None, norm: Tensor | None = None) -> None:
    check_activation("x", x, *x.shape)
    if isinstance(weight, QuantisedWeight):
        form, outputs = weight.form, weight.words.shape[0]
        check("weight.words", weight.words, torch.int16, x.device, -1, form.words)
        check("weight.scales", weight.scales, torch.float32, x.device, form.groups, outputs)
        if not weight.words.is_contiguous() or not weight.scales.is_contiguous() or form.columns != x.shape[-1]:
            raise ValueError(
                f"weight has {form.columns} columns, and x {x.shape[-1]}; words and scales must be contiguous"
            )
        if form.minimum != (weight.minimum is not None):
            raise ValueError(f"weight.form says minimum={form.minimum}, and weight.minimum is {weight.minimum}")
        if weight.minimum is not None:
            check("weight.minimum", weight.minimum, torch.float32, x.device, form.groups, outputs)
        if weight.order is not None:
            check("weight.order", weight.order, torch.int64, x.device, form.columns)
    else:
        _check_matrix(x, weight)
    if bias is not None:
        check("bias", bias, x.dtype, x.device, weight.shape[0])
    if norm is not None:
        check("norm", norm, x.dtype, x.device, x.shape[-1])


def _check_matrix(x: Tensor, weight: Tensor) -> None:
    check("weight", weight, x.dtype, x.device, -1, x.shape[-1])
    if weight.data_ptr() % 16 or weight.stride(0) * weight.element_size() % 16:
        raise ValueError(
            f"weight's rows begin {weight.stride(0) * weight.element_size()} bytes apart from address "
            f"{weight.data_ptr():#x} on; both must be multiples of 16: copy or pad it"
        )


def _few(x: Tensor) -> bool:
    return x.shape[:-1].numel() <= FEW_ROWS


def _multiply(y: Tensor, x: Tensor, weight: Weight, bias: Tensor | None, **rest: Any) -> None:
    """The product of few rows, and what is fused with it."""
    if isinstance(weight, QuantisedWeight):
        linear_quantised.multiply(y, x, weight, bias, **rest)
    else:
        linear_few_rows.multiply(y, x, weight, bias, **rest)


def _product(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """The product of many rows. Numbers of a quantised weight are rounded to x's dtype."""
    if isinstance(weight, QuantisedWeight):
        x = x if weight.order is None else x.index_select(-1, weight.order)
        weight = dequantise(weight, x.dtype)
    return F.linear(x, weight, bias)


def _empty(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device)


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None, *, batch_invariant: bool = False) -> Tensor:
    """x @ weight^T (+ bias), accumulated in float32. x [..., C], weight [O, C], bias [O] -> [..., O]."""
    _check(x, weight, bias)
    if not _few(x):
        return _product(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    y = _empty(x, *x.shape[:-1], weight.shape[0])
    _multiply(y, rows, weight, bias, batch_invariant=batch_invariant)
    return y


def linear_add(
    x: Tensor, weight: Weight, residual: Tensor, bias: Tensor | None = None, *, batch_invariant: bool = False
) -> Tensor:
    """residual + linear(x), the product rounded to the dtype before the sum. [R, C], [O, C], [R, O] -> [R, O]."""
    check_activation("x", x, -1, -1)
    _check(x, weight, bias)
    check("residual", residual, x.dtype, x.device, x.shape[0], weight.shape[0])
    if not _few(x):
        return residual + _product(x, weight, bias)
    y = _empty(x, *residual.shape)
    _multiply(y, x, weight, bias, residual=residual, batch_invariant=batch_invariant)
    return y


def rms_norm_linear(
    x: Tensor, norm: Tensor, eps: float, weight: Weight, bias: Tensor | None = None, *, batch_invariant: bool = False
) -> Tensor:
    """linear(rms_norm(x)). x [R, C], norm [C], weight [O, C] -> [R, O]."""
    check_activation("x", x, -1, -1)
    _check(x, weight, bias, norm)
    if not _few(x):
        return _product(rms_norm(x, norm, eps), weight, bias)
    y = _empty(x, x.shape[0], weight.shape[0])
    _multiply(y, x, weight, bias, norm=norm, eps=eps, batch_invariant=batch_invariant)
    return y


def rms_norm_swiglu(
    x: Tensor, norm: Tensor, eps: float, weight: Weight, bias: Tensor | None = None, *, batch_invariant: bool = False
) -> Tensor:
    """swiglu(linear(rms_norm(x))), the first half of an MLP. weight [2I, C], gate rows in front -> [R, I]."""
    check_activation("x", x, -1, -1)
    _check(x, weight, bias, norm)
    half, odd = divmod(weight.shape[0], 2)
    if odd:
        raise ValueError(f"weight has {weight.shape[0]} rows, must have as many gate rows as up rows")
    if not _few(x):
        return swiglu(_product(rms_norm(x, norm, eps), weight, bias))
    y = _empty(x, x.shape[0], half)
    _multiply(y, x, weight, bias, norm=norm, eps=eps, half=half, batch_invariant=batch_invariant)
    return y


def rms_norm_qkv_rope_cache(
    x: Tensor,
    norm: Tensor,
    eps: float,
    weight: Weight,
    bias: Tensor | None,
    inv_freq: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    positions: Tensor | None = None,
    *,
    batch_invariant: bool = False,
) -> Tensor:
    """rope_and_cache(linear(rms_norm(x))), a block up to its attention. weight [(H + 2K) * D, C] -> q [R, H, D]."""
    check_activation("x", x, -1, -1)
    _check(x, weight, bias, norm)
    width = ("rows", weight.shape[0])
    heads = check_heads("weight", x, width, inv_freq, k_cache, v_cache, block_table, seq_lens, positions)
    rows = x.shape[0]
    (pages, kv_heads, page_size, dim), (sequences, slots) = k_cache.shape, block_table.shape
    if not _few(x):
        qkv = _product(rms_norm(x, norm, eps), weight, bias)
        return rope_and_cache(qkv, inv_freq, k_cache, v_cache, block_table, seq_lens, positions)
    q = _empty(x, rows, heads, dim)
    _multiply(
        q, x, weight, bias, norm=norm, eps=eps, half=dim // 2, batch_invariant=batch_invariant,
        inv_freq_ptr=inv_freq, inv_freq_stride=inv_freq.stride(0),
        k_cache_ptr=k_cache, k_page_stride=k_cache.stride(0),
        k_head_stride=k_cache.stride(1), k_token_stride=k_cache.stride(2),
        v_cache_ptr=v_cache, v_page_stride=v_cache.stride(0),
        v_head_stride=v_cache.stride(1), v_token_stride=v_cache.stride(2),
        block_table_ptr=block_table, table_stride=block_table.stride(0), seq_lens_ptr=seq_lens,
        positions_ptr=positions, tokens=rows // sequences, pages=pages, slots=slots, H=heads, K=kv_heads, S=page_size,
    )  # fmt: skip
    return q
