"""Other implementations of the ops, to compare with: one small function per library.

To add a peer, write a function that takes an op's name and arguments and returns a call without arguments. Register it
with the ops that it implements. Only the call is timed, not what the function does first. `python -m bench.ops`
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

from .cases import Arguments
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


PEERS: dict[str, Peer] = {}


def peer(
    name: str, *ops: str, module: str = "torch", package: str = "torch", gpu: bool = False
) -> Callable[[Callable[[str, Arguments], Call]], Callable[[str, Arguments], Call]]:
    def register(make: Callable[[str, Arguments], Call]) -> Callable[[str, Arguments], Call]:
        PEERS[name] = Peer(ops, make, module, package, gpu)
        return make

    return register


def make(name: str, op: str, arguments: Arguments, device: torch.device) -> Call:
    """The peer's call. Raises Unfit, or whatever the peer raises."""
    chosen = PEERS[name]
    if importlib.util.find_spec(chosen.module) is None:
        raise Unfit(f"not installed: pip install {chosen.package}")
    if chosen.gpu and device.type != "cuda":
        raise Unfit("needs a GPU")
    return chosen.make(op, arguments)


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


@peer("PyTorch", *EAGER)
def _pytorch(op: str, arguments: Arguments) -> Call:
    return lambda: EAGER[op](**arguments)


@functools.lru_cache(maxsize=1)
def _compile(op: str, *_: Any) -> Callable[..., Any]:
    """Compiles for these shapes and this dtype. Forgets earlier ones: torch.compile keeps only a few per function."""
    torch._dynamo.reset()
    return torch.compile(EAGER[op], dynamic=False, fullgraph=True)


@peer("torch.compile", *EAGER)
def _compiled(op: str, arguments: Arguments) -> Call:
    tensors = (x for x in arguments.values() if isinstance(x, torch.Tensor))
    compiled = _compile(op, *((x.shape, x.dtype) for x in tensors))
    return lambda: compiled(**arguments)


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


@peer("GemLite", "linear", module="gemlite", package="gemlite", gpu=True)
def _gemlite(op: str, arguments: Arguments) -> Call:
    """With 16-bit weights, as ours are; it is made for fewer bits."""
    from gemlite.core import TORCH_TO_DTYPE, GemLiteLinearTriton

    x, weight = arguments["x"], arguments["weight"]
    outputs, inputs = weight.shape
    kind = TORCH_TO_DTYPE[x.dtype]
    layer = GemLiteLinearTriton(
        16, group_size=inputs, in_features=inputs, out_features=outputs, input_dtype=kind, output_dtype=kind
    )
    layer.pack(weight, scales=None, zeros=None, bias=None)
    return lambda: layer(x)
