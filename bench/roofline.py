"""The roofline of an op: the bytes and operations that it needs at least, and what this machine can do of each.

No call can be faster than its bytes at the speed at which this machine reads memory, or its operations at the speed at
which it multiplies matrices. The slower of the two bounds the op.
"""

import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cases import Arguments
from .record import Part, Row
from .timing import Call, name_of, rounds_of


def nbytes(*values: Any) -> int:
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))


def bytes_moved(op: str, arguments: Arguments, result: Any) -> int:
    """Bytes that the op must read and write: arguments and results once; of tables and caches, what it touches."""
    results = result if isinstance(result, tuple) else (result,)
    touched = dict(arguments)
    total = nbytes(*results)
    if op == "embed":
        del touched["table"]
        total *= 2
    elif op in ("rope_and_cache", "rms_norm_qkv_rope_cache"):
        cache = touched.pop("k_cache")
        del touched["v_cache"]
        tokens = touched["qkv" if op == "rope_and_cache" else "x"].shape[0]
        total += 2 * tokens * cache.shape[1] * cache.shape[3] * cache.element_size()
    elif op == "advance":
        for table in ("end_mask", "output_counts", "permitted", "allowed"):
            del touched[table]  # one word of each
    return total + nbytes(*touched.values())


def flops(op: str, arguments: Arguments) -> int:
    """Multiplications and additions of the op's matrix products. The rest of an op never bounds it."""
    if op == "paged_attention":
        rows, heads, dim = arguments["q"].shape
        context, sequences = int(arguments["seq_lens"][0]), arguments["seq_lens"].numel()
        tokens = rows // sequences
        # The last token attends to the whole context, each token before it to one less.
        attended = sequences * (tokens * context - tokens * (tokens - 1) // 2)
        return 4 * heads * dim * attended
    if "weight" in arguments and arguments["weight"].dim() == 2:
        return 2 * arguments["x"].shape[0] * arguments["weight"].numel()
    return 0


class Roofline(NamedTuple):
    """What this machine reaches at most, per second."""

    read: float  # bytes
    copy: float  # bytes, read and written
    matmul: dict[str, float]  # floating-point operations, by dtype

    def share(self, dtype: str, nbytes: int, flops: int, microseconds: float) -> tuple[str, float]:
        """What bounds such a call, "read" or "matmul", and the share of that ceiling which it reached."""
        reading, multiplying = nbytes / self.read, flops / self.matmul[dtype]
        bound = "read" if reading >= multiplying else "matmul"
        return bound, max(reading, multiplying) * 1e6 / microseconds

    def rows(self) -> Iterator[Row]:
        part = Part("ceilings")
        yield part.figure("read", [self.read / 1e9], "GB/s", ceiling="read")
        yield part.figure("copy, read and written", [self.copy / 1e9], "GB/s", ceiling="copy")
        for dtype, rate in self.matmul.items():
            yield part.figure(f"matmul, {dtype}", [rate / 1e12], "TFLOP/s", ceiling="matmul", dtype=dtype)


def measure(device: torch.device, dtypes: Sequence[torch.dtype], rounds: int) -> Roofline:
    """The fastest reads, copies and square matrix products, each at the median round."""
    on_gpu = device.type == "cuda"
    x = torch.zeros(1 << 29 if on_gpu else 1 << 25, device=device)
    y = torch.empty_like(x)
    read: Call = x.sum
    if on_gpu:
        from .read_bandwidth import read_all

        read = partial(read_all, x, y)

    def rate(amount: int, call: Call) -> float:
        return amount / statistics.median(islice(rounds_of(call, 1), rounds)) * 1e6

    side = 8192 if on_gpu else 1024
    matmul = {}
    for dtype in dtypes:
        a = torch.randn(side, side, device=device).to(dtype)
        matmul[name_of(dtype)] = rate(2 * side**3, partial(torch.mm, a, a))
    return Roofline(rate(nbytes(x), read), rate(2 * nbytes(x), lambda: y.copy_(x)), matmul)
