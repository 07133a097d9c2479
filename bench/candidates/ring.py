"""Gluon: 1 to 128 rows times a weight matrix, with weights in flight before the launch that computes x has ended.

    y = x W^T      x [R, C], W [O, C]; y as float32 parts, or rounded, or SwiGLU of it

A program owns BO rows of W and one of PARTS equal parts of the columns. It walks its part in chunks of BC columns,
through two rings in shared memory: WS chunks of W [BO, BC] and XS chunks of x [BR, BC].

    before the wait    copy chunks 0 .. WS-1 of W
    after the wait     copy chunks 0 .. XS-1 of x
    at chunk i         wait for the copies of chunk i;  y += W x^T;  copy chunk i + WS of W and chunk i + XS of x

Copies are asynchronous and complete group by group, in order. Before chunk i is multiplied, all groups but the newest
XS - 1 are complete. That includes chunk i of W, since WS >= XS.

W is the first factor, of which a tensor core of sm_90 takes 64 rows at a time, so x is padded to 8 rows at least, not
to 64. The order of sums is that of `parts` in kernels/triton/linear_few_rows.py: within a part the tensor core's steps
of 16 columns in ascending order, for any BO, BC and BR; `sum_and_norm` adds the parts in ascending order.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from internlm3.kernels.triton.launch import next_power_of_2

from .settings import Ring

# Triton 3.8 renamed it, 3.9 removed the old name.
_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.jit
def _trigger():
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _wait():
    gl.inline_asm_elementwise("griddepcontrol.wait; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _silu(x):
    return x / (1.0 + gl.exp(-x))


@gluon.jit(do_not_specialize=["R"])
def _ring(
    w_ptr, x_ptr, x_stride, y_ptr, R,
    OUT: gl.constexpr, C: gl.constexpr, PARTS: gl.constexpr, SWIGLU: gl.constexpr,
    BO: gl.constexpr, BC: gl.constexpr, BR: gl.constexpr, WS: gl.constexpr, XS: gl.constexpr,
):  # fmt: skip
    """Grid (OUT / BO, PARTS). Several parts write float32 [PARTS, R, OUT], one part y [R, OUT] in y's dtype.

    With SWIGLU W is interleaved, and the program writes BO / 2 columns of [R, OUT / 2].
    """
    _trigger()
    dtype: gl.constexpr = w_ptr.dtype.element_ty
    WARPS: gl.constexpr = gl.num_warps()
    CHUNKS: gl.constexpr = C // PARTS // BC
    gl.static_assert(OUT % BO == 0 and C % (PARTS * BC) == 0 and BC <= 256 and WS >= XS)
    # A thread copies 16 bytes at a time, and BC / 8 threads a row of a chunk.
    copied: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BC, BC // 8], [WARPS, 1], [1, 0])
    w_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BO, BC], dtype)
    x_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BR, BC], dtype)
    w_ring = gl.allocate_shared_memory(dtype, [WS, BO, BC], w_layout)
    x_ring = gl.allocate_shared_memory(dtype, [XS, BR, BC], x_layout)
    part = gl.program_id(1)
    columns = part * (C // PARTS) + gl.arange(0, BC, gl.SliceLayout(0, copied))
    w_row = gl.program_id(0) * BO + gl.arange(0, BO, gl.SliceLayout(1, copied))
    w_chunk = w_ptr + w_row[:, None] * C + columns[None, :]
    for i in gl.static_range(WS):
        if i < CHUNKS:
            _load(w_ring.index(i), w_chunk + i * BC)
        async_copy.commit_group()
    _wait()

    x_row = gl.arange(0, BR, gl.SliceLayout(1, copied))
    x_chunk = x_ptr + x_row[:, None] * x_stride + columns[None, :]
    inside = (x_row < R)[:, None]
    for i in gl.static_range(XS):
        if i < CHUNKS:
            _load(x_ring.index(i), x_chunk + i * BC, mask=inside)
        async_copy.commit_group()
    summed: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BR, 16])
    y = gl.zeros([BO, BR], gl.float32, summed)
    for i in range(CHUNKS):
        async_copy.wait_group(XS - 1)
        fence_async_shared()
        y = warpgroup_mma(w_ring.index(i % WS), x_ring.index(i % XS).permute((1, 0)), y, is_async=True)
        y = warpgroup_mma_wait(0, deps=[y])
        if i + WS < CHUNKS:
            _load(w_ring.index(i % WS), w_chunk + (i + WS) * BC)
        if i + XS < CHUNKS:
            _load(x_ring.index(i % XS), x_chunk + (i + XS) * BC, mask=inside)
        async_copy.commit_group()

    if SWIGLU:
        # A thread has rows g and g + 8 of each 16: a gate and its up.
        gate, up = y.to(dtype).to(gl.float32).reshape([BO // 16, 2, 8, BR]).permute((0, 2, 3, 1)).split()
        product = (_silu(gate).to(dtype).to(gl.float32) * up).to(dtype).reshape([BO // 2, BR])
        stored: gl.constexpr = gl.BlockedLayout([4, 1], [8, 4], [WARPS, 1], [0, 1])
        product = gl.convert_layout(product, stored)
        column = gl.program_id(0) * (BO // 2) + gl.arange(0, BO // 2, gl.SliceLayout(1, stored))
        row = gl.arange(0, BR, gl.SliceLayout(0, stored))
        gl.store(y_ptr + row[None, :] * (OUT // 2) + column[:, None], product, mask=(row < R)[None, :])
    else:
        column = gl.program_id(0) * BO + gl.arange(0, BO, gl.SliceLayout(1, summed))
        row = gl.arange(0, BR, gl.SliceLayout(0, summed))
        places = y_ptr + (part * R + row)[None, :] * OUT + column[:, None]
        gl.store(places, y.to(y_ptr.dtype.element_ty), mask=(row < R)[None, :])


def _launch(x: Tensor, weight: Tensor, y: Tensor, parts: int, ring: Ring, swiglu: bool = False) -> Tensor:
    rows, columns = x.shape
    _ring[(weight.shape[0] // ring.rows, parts)](
        weight, x, x.stride(0), y, rows,
        OUT=weight.shape[0], C=columns, PARTS=parts, SWIGLU=swiglu,
        BO=ring.rows, BC=ring.columns, BR=max(next_power_of_2(rows), 8), WS=ring.w_slots, XS=ring.x_slots,
        num_warps=ring.warps, launch_pdl=True, enable_fp_fusion=False,
    )  # fmt: skip
    return y


def partial_products(x: Tensor, weight: Tensor, parts: int, ring: Ring) -> Tensor:
    """What `reference.partial_products` computes. weight is contiguous, in a 16-bit dtype."""
    return _launch(x, weight, _empty(x, parts, x.shape[0], weight.shape[0], dtype=torch.float32), parts, ring)


def linear(x: Tensor, weight: Tensor, ring: Ring) -> Tensor:
    """What `reference.linear` computes."""
    return _launch(x, weight, _empty(x, x.shape[0], weight.shape[0], dtype=x.dtype), 1, ring)


def linear_swiglu(x: Tensor, weight: Tensor, ring: Ring) -> Tensor:
    """What `reference.linear_swiglu` computes."""
    y = _empty(x, x.shape[0], weight.shape[0] // 2, dtype=x.dtype)
    return _launch(x, weight, y, 1, ring, swiglu=True)


def _empty(x: Tensor, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=x.device)
