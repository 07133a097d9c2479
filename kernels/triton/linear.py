"""The linear layers of a block, each fused with the ops before and after it.

Up to FEW_ROWS rows take as long as reading the weights takes: `linear_few_rows` reads them once, in one launch. More
rows are bound by arithmetic: torch's linear, which is cuBLAS on a GPU, and a launch for each op before and after it.

Rows of a weight must begin at multiples of 16 bytes, since they are read 16 bytes at a time. With `batch_invariant` a
single row uses the kernel of several, so it is bit-identical alone and among up to FEW_ROWS - 1 other rows.

Every op raises TypeError for a wrong dtype and ValueError for a wrong shape, device, stride or alignment.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .launch import check, check_activation
from .linear_few_rows import FEW_ROWS, multiply
from .rms_norm import rms_norm
from .rope_and_cache import check_heads, rope_and_cache
from .swiglu import swiglu


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor | None = None) -> None:
    check_activation("x", x, *x.shape)
    check("weight", weight, x.dtype, x.device, -1, x.shape[-1])
    if weight.data_ptr() % 16 or weight.stride(0) * weight.element_size() % 16:
        raise ValueError(
            f"weight's rows begin {weight.stride(0) * weight.element_size()} bytes apart from address "
            f"{weight.data_ptr():#x} on; both must be multiples of 16: copy or pad it"
        )
    if bias is not None:
        check("bias", bias, x.dtype, x.device, weight.shape[0])
    if norm is not None:
        check("norm", norm, x.dtype, x.device, x.shape[-1])


def _few(x: Tensor) -> bool:
    return x.shape[:-1].numel() <= FEW_ROWS


def _empty(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, batch_invariant: bool = False) -> Tensor:
    """x @ weight^T (+ bias), accumulated in float32. x [..., C], weight [O, C], bias [O] -> [..., O]."""
    _check(x, weight, bias)
    if not _few(x):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    y = _empty(x, *x.shape[:-1], weight.shape[0])
    multiply(y, rows, weight, bias, batch_invariant=batch_invariant)
    return y


def linear_add(
    x: Tensor, weight: Tensor, residual: Tensor, bias: Tensor | None = None, *, batch_invariant: bool = False
) -> Tensor:
    """residual + linear(x), the product rounded to the dtype before the sum. [R, C], [O, C], [R, O] -> [R, O]."""
    check_activation("x", x, -1, -1)
    _check(x, weight, bias)
    check("residual", residual, x.dtype, x.device, x.shape[0], weight.shape[0])
    if not _few(x):
        return residual + F.linear(x, weight, bias)
    y = _empty(x, *residual.shape)
    multiply(y, x, weight, bias, residual=residual, batch_invariant=batch_invariant)
    return y


def rms_norm_linear(
    x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None, *, batch_invariant: bool = False
) -> Tensor:
    """linear(rms_norm(x)). x [R, C], norm [C], weight [O, C] -> [R, O]."""
    check_activation("x", x, -1, -1)
    _check(x, weight, bias, norm)
    if not _few(x):
        return F.linear(rms_norm(x, norm, eps), weight, bias)
    y = _empty(x, x.shape[0], weight.shape[0])
    multiply(y, x, weight, bias, norm=norm, eps=eps, batch_invariant=batch_invariant)
    return y


def rms_norm_swiglu(
    x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None, *, batch_invariant: bool = False
) -> Tensor:
    """swiglu(linear(rms_norm(x))), the first half of an MLP. weight [2I, C], gate rows in front -> [R, I]."""
    check_activation("x", x, -1, -1)
    _check(x, weight, bias, norm)
    half, odd = divmod(weight.shape[0], 2)
    if odd:
        raise ValueError(f"weight has {weight.shape[0]} rows, must have as many gate rows as up rows")
    if not _few(x):
        return swiglu(F.linear(rms_norm(x, norm, eps), weight, bias))
    y = _empty(x, x.shape[0], half)
    multiply(y, x, weight, bias, norm=norm, eps=eps, half=half, batch_invariant=batch_invariant)
    return y


def rms_norm_qkv_rope_cache(
    x: Tensor,
    norm: Tensor,
    eps: float,
    weight: Tensor,
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
        qkv = F.linear(rms_norm(x, norm, eps), weight, bias)
        return rope_and_cache(qkv, inv_freq, k_cache, v_cache, block_table, seq_lens, positions)
    q = _empty(x, rows, heads, dim)
    multiply(
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
