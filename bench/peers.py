"""Other implementations of the ops, to compare with: one small function per library.

To add a peer, write a function that takes an op's name and arguments and returns a call without arguments. Register it
with the ops that it implements, and with the forms of weights that it takes (bench/cases.py: DENSE, FORMS). Only the
call is timed, not what the function does first: it may store a weight in a layout of its own. `python -m bench.ops`
compares its result with the reference before timing it, and shows what it raises in the table: raise `Unfit` with the
reason why it can't run here.
"""

import contextlib
import functools
import importlib.util
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from internlm3.kernels.quantised import BITS, QuantisedWeight

from .cases import DENSE, OWN_FORMS, Arguments, Case
from .timing import Call

SECONDS = 120  # time limit for a peer to get ready, compiling included


class Unfit(Exception):
    """The reason why a peer can't run an op here."""


class Peer(NamedTuple):
    ops: tuple[str, ...]
    make: Callable[[str, Arguments], Call]
    module: str  # what it imports
    package: str  # its name on PyPI
    gpu: bool  # needs a GPU
    weights: tuple[str, ...] = (DENSE,)  # the forms of a weight that it takes

    def takes(self, case: Case) -> bool:
        return case.op in self.ops and case.stored in self.weights


PEERS: dict[str, Peer] = {}


def peer(
    name: str,
    *ops: str,
    module: str = "torch",
    package: str = "torch",
    gpu: bool = False,
    weights: tuple[str, ...] = (DENSE,),
) -> Callable[[Callable[[str, Arguments], Call]], Callable[[str, Arguments], Call]]:
    def register(make: Callable[[str, Arguments], Call]) -> Callable[[str, Arguments], Call]:
        PEERS[name] = Peer(ops, make, module, package, gpu, weights)
        return make

    return register


def unfit(name: str, device: torch.device) -> str:
    """Why a peer can't run here, or ""."""
    chosen = PEERS[name]
    if importlib.util.find_spec(chosen.module) is None:
        return f"not installed: pip install {chosen.package}"
    return "needs a GPU" if chosen.gpu and device.type != "cuda" else ""


def make(name: str, op: str, arguments: Arguments, device: torch.device) -> Call:
    """The peer's call. Raises Unfit, or whatever the peer raises."""
    if why := unfit(name, device):
        raise Unfit(why)
    return PEERS[name].make(op, arguments)


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raises Unfit inside the block after this time. Does nothing outside the main thread or without SIGALRM."""
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: Any) -> None:
        raise Unfit(f"not ready after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# PyTorch as a model's author writes it. Its RMSNorm multiplies by the weight before it rounds: one rounding, ours two.
def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def _swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


EAGER: dict[str, Callable[..., Any]] = {
    "embed": lambda token_ids, table: F.embedding(token_ids, table),
    "rms_norm": _norm,
    "swiglu": _swiglu,
    "linear": F.linear,
    "linear_add": lambda x, weight, residual: residual + F.linear(x, weight),
    "rms_norm_linear": lambda x, norm, eps, weight: F.linear(_norm(x, norm, eps), weight),
    "rms_norm_swiglu": lambda x, norm, eps, weight: _swiglu(F.linear(_norm(x, norm, eps), weight)),
}


@functools.cache
def _dequantised(op: str) -> Callable[..., Any]:
    """The op with the weight (q - zero) * scale, rounded to x's dtype. q [O, G, C / G], scale and zero [O, G, 1]."""

    def call(q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, **arguments: Any) -> Any:
        weight = ((q.float() - zero) * scale).flatten(1).to(arguments["x"].dtype)
        return EAGER[op](weight=weight, **arguments)

    return call


def _eager(op: str, arguments: Arguments) -> tuple[Callable[..., Any], Arguments]:
    """PyTorch's function and its arguments: that of EAGER, or one that dequantises the weight first."""
    weight = arguments.get("weight")
    if not isinstance(weight, QuantisedWeight):
        return EAGER[op], arguments
    q, scale, zero = weight.unpacked()
    q = q.to(torch.int8) if weight.form.kind == "int4" else q
    stored = {"q": q.unflatten(1, (scale.shape[1], -1)), "scale": scale[:, :, None], "zero": zero[:, :, None]}
    rest = {name: x for name, x in arguments.items() if name != "weight"}
    return _dequantised(op), rest | stored


@peer("PyTorch", *EAGER, weights=(DENSE, *OWN_FORMS))
def _pytorch(op: str, arguments: Arguments) -> Call:
    function, given = _eager(op, arguments)
    return lambda: function(**given)


@functools.lru_cache(maxsize=1)
def _compile(function: Callable[..., Any], *_: Any) -> Callable[..., Any]:
    """Compiles for these shapes and dtypes. Forgets earlier ones: torch.compile keeps only a few per function."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, fullgraph=True)


@peer("torch.compile", *EAGER, weights=(DENSE, *OWN_FORMS))
def _compiled(op: str, arguments: Arguments) -> Call:
    function, given = _eager(op, arguments)
    tensors = (x for x in given.values() if isinstance(x, torch.Tensor))
    compiled = _compile(function, *((x.shape, x.dtype) for x in tensors))
    return lambda: compiled(**given)


@peer("cuBLAS", "linear", "linear_add", gpu=True)
def _cublas(op: str, arguments: Arguments) -> Call:
    """Through torch: the product, or product and sum with one rounding."""
    x, weight = arguments["x"], arguments["weight"].t()
    if op == "linear":
        return lambda: torch.mm(x, weight)
    return lambda: torch.addmm(arguments["residual"], x, weight)


@peer("SDPA", "paged_attention")
def _sdpa(op: str, arguments: Arguments) -> Call:
    """PyTorch's attention over the same keys and values, contiguous instead of paged."""
    sequences, length = arguments["seq_lens"].numel(), int(arguments["seq_lens"][0])
    q = arguments["q"].view(sequences, -1, *arguments["q"].shape[1:]).transpose(1, 2)
    # [B, N, K, S, D] -> [B, K, N * S, D]
    k, v = (
        arguments[name][arguments["block_table"].long()].transpose(1, 2).flatten(2, 3)[:, :, :length].contiguous()
        for name in ("k_cache", "v_cache")
    )
    tokens = q.shape[2]
    mask = None
    if tokens > 1:
        mask = torch.ones(tokens, length, dtype=torch.bool, device=q.device).tril(length - tokens)

    def call() -> torch.Tensor:
        out = F.scaled_dot_product_attention(q, k, v, mask, scale=arguments["scale"], enable_gqa=True)
        return out.transpose(1, 2)

    return call


@peer(
    "FlashInfer",
    *("rms_norm", "swiglu", "paged_attention"),
    module="flashinfer",
    package="flashinfer-python",
    gpu=True,
)
def _flashinfer(op: str, arguments: Arguments) -> Call:
    import flashinfer

    if op == "rms_norm":
        return lambda: flashinfer.norm.rmsnorm(arguments["x"], arguments["weight"], arguments["eps"])
    if op == "swiglu":
        return lambda: flashinfer.activation.silu_and_mul(arguments["gate_up"])
    q, k, v, table = (arguments[name] for name in ("q", "k_cache", "v_cache", "block_table"))
    (rows, heads, dim), (_, kv_heads, page, _) = q.shape, k.shape
    sequences, slots = table.shape
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=q.device)
    starts = torch.arange(sequences + 1, dtype=torch.int32, device=q.device)
    last = (arguments["seq_lens"] - 1) % page + 1
    kinds = {"q_data_type": q.dtype, "kv_data_type": k.dtype, "sm_scale": arguments["scale"]}
    if rows == sequences:
        decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
        decode.plan(starts * slots, table.flatten(), last, heads, kv_heads, dim, page, **kinds)
        return lambda: decode.run(q, (k, v))
    prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
    places = (starts * (rows // sequences), starts * slots, table.flatten(), last)
    prefill.plan(*places, heads, kv_heads, dim, page, causal=True, **kinds)
    return lambda: prefill.run(q, (k, v))


@peer("liger-kernel", "rms_norm", "swiglu", module="liger_kernel", package="liger-kernel", gpu=True)
def _liger(op: str, arguments: Arguments) -> Call:
    from liger_kernel.transformers import functional

    if op == "rms_norm":
        return lambda: functional.liger_rms_norm(arguments["x"], arguments["weight"], arguments["eps"])
    gate, up = (half.contiguous() for half in arguments["gate_up"].chunk(2, dim=-1))
    return lambda: functional.liger_swiglu(gate, up)


def _with_residual(arguments: Arguments, product: Call) -> Call:
    """linear or, with a residual, linear_add."""
    if "residual" not in arguments:
        return product
    return lambda: arguments["residual"] + product()


@peer("torch packed", "linear", "linear_add", weights=("int4", "int8"))
def _packed(op: str, arguments: Arguments) -> Call:
    """PyTorch's own kernels for weights of 4 and 8 bits. Those of a GPU have not been run."""
    x, weight = arguments["x"], arguments["weight"]
    q, scale, zero = weight.unpacked()
    if weight.form.kind == "int8":
        per_row = scale.flatten().to(x.dtype)
        return _with_residual(arguments, lambda: torch._weight_int8pack_mm(x, q, per_row))
    group = q.shape[1] // scale.shape[1]
    # (q - 8) * scale + the second of each pair
    pairs = torch.stack([scale, (8 - zero) * scale], -1).transpose(0, 1).to(x.dtype).contiguous()
    if x.is_cuda:
        bytes_ = (q[:, ::2] << 4 | q[:, 1::2]).to(torch.uint8)
        words = torch._convert_weight_to_int4pack(bytes_, 8)
        return _with_residual(arguments, lambda: torch._weight_int4pack_mm(x, words, group, pairs))
    words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 1)
    return _with_residual(arguments, lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, words, group, pairs))


@peer(
    "GemLite", "linear", "linear_add", module="gemlite", package="gemlite", gpu=True, weights=(DENSE, "int4", "int8")
)  # fmt: skip
def _gemlite(op: str, arguments: Arguments) -> Call:
    """Not run yet with quantised weights, which it is made for."""
    from gemlite.core import TORCH_TO_DTYPE, GemLiteLinearTriton

    x, weight = arguments["x"], arguments["weight"]
    outputs, inputs = weight.shape
    dtype = TORCH_TO_DTYPE[x.dtype]
    sizes = {"in_features": inputs, "out_features": outputs, "input_dtype": dtype, "output_dtype": dtype}
    if not isinstance(weight, QuantisedWeight):
        layer = GemLiteLinearTriton(16, group_size=inputs, **sizes)
        layer.pack(weight, scales=None, zeros=None, bias=None)
    else:
        q, scale, zero = weight.unpacked()
        layer = GemLiteLinearTriton(BITS[weight.form.kind], group_size=inputs // scale.shape[1], **sizes)
        if weight.form.kind == "int4":
            layer.pack(q.to(torch.uint8), scales=scale.to(x.dtype), zeros=zero.to(x.dtype), bias=None)
        else:
            layer.pack(q.contiguous(), scales=scale.to(x.dtype), zeros=None, bias=None)
    return _with_residual(arguments, lambda: layer(x))
