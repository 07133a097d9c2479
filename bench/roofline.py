"""The roofline of an op: the bytes and operations that it needs at least, and what this machine can do of each.

No call can be faster than its bytes at the speed at which this machine reads memory, or its operations at the speed at
which it multiplies matrices. The slower of the two bounds the op. A record has one such pair of ceilings, and all its
shares are of these.
"""

import dataclasses
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from internlm3 import kernels

from .cases import INTERNLM3_8B, Arguments
from .record import Part, Row
from .timing import Call, name_of, replayed, rounds_of

LARGEST = 64 << 10  # bytes; reads divide a tensor into blocks of at most this size
COPY = "copy, read and written"  # the name of its row


def nbytes(*values: Any) -> int:
    """Of tensors, and of tuples such as a quantised weight."""
    return sum(x.numel() * x.element_size() for x in tree_leaves(values) if isinstance(x, Tensor))


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
        total += _keys_and_values(cache, tokens)
    elif op == "paged_attention":
        cache = touched.pop("k_cache")
        del touched["v_cache"]
        total += _keys_and_values(cache, int(touched["seq_lens"].sum()))
    elif op == "advance":
        for table in ("history", "end_mask", "output_counts", "permitted", "allowed"):
            del touched[table]  # one word of each
    elif op == "store_row":
        touched["rows"] = touched["row"]
    return total + nbytes(*touched.values())


def _keys_and_values(cache: Tensor, tokens: int) -> int:
    """Bytes of the keys and values of this number of tokens in a layer's two caches [P, K, S, D]."""
    return 2 * tokens * cache.shape[1] * cache.shape[3] * cache.element_size()


def flops(op: str, arguments: Arguments) -> int:
    """Multiplications and additions of the op's matrix products. The rest of an op never bounds it."""
    if op == "paged_attention":
        rows, heads, dim = arguments["q"].shape
        context, sequences = int(arguments["seq_lens"][0]), arguments["seq_lens"].numel()
        tokens = rows // sequences
        # The last token attends to the whole context, each token before it to one less.
        attended = sequences * (tokens * context - tokens * (tokens - 1) // 2)
        return 4 * heads * dim * attended
    if "weight" in arguments and len(arguments["weight"].shape) == 2:
        return 2 * arguments["x"].shape[0] * arguments["weight"].shape.numel()
    return 0


MICROSECONDS = {"us": 1.0, "ms": 1e3}  # of a row's unit


class Roofline(NamedTuple):
    """What this machine reaches at most, per second."""

    read: float  # bytes
    copy: float  # bytes, read and written
    matmul: dict[str, float]  # floating-point operations, by dtype
    rounds: Mapping[str, Sequence[float]] = {}  # by the name of a row, in its unit; `read` is the best "read, ..."

    def share(self, dtype: str, nbytes: int, flops: int, microseconds: float) -> tuple[str, float]:
        """What bounds such a call, "read" or "matmul", and the share of that ceiling which it reached."""
        reading, multiplying = nbytes / self.read, flops / self.matmul[dtype]
        bound = "read" if reading >= multiplying else "matmul"
        return bound, max(reading, multiplying) * 1e6 / microseconds

    def with_share(self, row: Row) -> Row:
        """The row with `bound` and `share` in its `about`, if that has the bytes and flops of what was timed.

        Reads that a cache may have served are not compared with memory: such a row gets no share. Nor does a call that
        is faster than its ceiling, which is no limit then.
        """
        about = {key: x for key, x in row.about.items() if key not in ("bound", "share")}
        if not row.rounds or not {"bytes", "flops"} <= about.keys() or about.get("dtype") not in self.matmul:
            return row
        microseconds = row.value * MICROSECONDS[row.unit]
        bound, share = self.share(about["dtype"], about["bytes"], about["flops"], microseconds)
        if share <= 1 and (about.get("cold", True) or bound == "matmul"):
            about.update(bound=bound, share=share)
        return dataclasses.replace(row, about=about)

    def rows(self) -> Iterator[Row]:
        part = Part("ceilings")

        def ceiling(name: str, value: float, unit: str, note: str = "", **about: Any) -> Row:
            return part.figure(name, self.rounds.get(note or name, [value]), unit, note, **about)

        reads = {name: rounds for name, rounds in self.rounds.items() if name.startswith("read, ")}
        best = max(reads, key=lambda name: statistics.median(reads[name]), default="")
        yield ceiling("read", self.read / 1e9, "GB/s", best, ceiling="read")
        yield ceiling(COPY, self.copy / 1e9, "GB/s", ceiling="copy")
        for dtype, rate in self.matmul.items():
            yield ceiling(f"matmul, {dtype}", rate / 1e12, "TFLOP/s", ceiling="matmul", dtype=dtype)
        for name, rounds in reads.items():
            yield part.figure(name, rounds, "GB/s")

    @classmethod
    def of(cls, rows: Iterable[Row]) -> "Roofline | None":
        """The ceilings of a record, or None if it lacks one of them."""
        known = [row for row in rows if "ceiling" in row.about]
        rates = {row.about["ceiling"]: row.value for row in known}
        if not {"read", "copy", "matmul"} <= rates.keys():
            return None
        matmul = {row.about["dtype"]: row.value * 1e12 for row in known if row.about["ceiling"] == "matmul"}
        return cls(rates["read"] * 1e9, rates["copy"] * 1e9, matmul)


def measure(device: torch.device, dtypes: Sequence[torch.dtype], rounds: int) -> Roofline:
    """The fastest reads, copies and square matrix products, each at the median round.

    Measure before a model is allocated: on a GPU this takes 8 GiB, or half of the free memory if that is less, so that
    a cache holds a negligible part of it. What is timed there are replays of CUDA graphs, without the host's work.
    """
    on_gpu = device.type == "cuda"
    size = min(1 << 33, torch.cuda.mem_get_info(device)[0] // 2) if on_gpu else 1 << 27
    x = torch.empty(size // LARGEST * LARGEST // 2, dtype=torch.bfloat16, device=device).normal_()
    found = {}

    def rate(name: str, amount: int, unit: float, *calls: Call) -> float:
        run = replayed(calls) if on_gpu else lambda: [call() for call in calls]
        found[name] = [amount / microseconds * 1e6 / unit for microseconds in islice(rounds_of(run, 1), rounds)]
        return statistics.median(found[name]) * unit

    read = max(rate(f"read, {name}", amount, 1e9, *calls) for name, (amount, calls) in reads(x).items())
    half = x.numel() // 2
    copy = rate(COPY, nbytes(x), 1e9, lambda: x[:half].copy_(x[half:]))
    side = 8192 if on_gpu else 512
    matmul = {}
    wide = torch.randn(side, side, device=device)
    for dtype in dtypes:
        a, name = wide.to(dtype), name_of(dtype)
        products: list[Call] = [partial(torch.mm, a, a)]
        if not on_gpu and dtype != torch.float32:  # many CPUs multiply widened numbers several times as fast
            products.append(partial(_widened_product, a))
        tried = [(rate(f"matmul, {name}", 2 * side**3, 1e12, call), found[f"matmul, {name}"]) for call in products]
        matmul[name], found[f"matmul, {name}"] = max(tried)
    return Roofline(read, copy, matmul, found)


def _widened_product(a: Tensor) -> Tensor:
    return torch.mm(a.float(), a.float()).to(a.dtype)


def reads(x: Tensor) -> dict[str, tuple[int, list[Call]]]:
    """Ways to read x, a vector in bfloat16, once: the bytes read and the calls.

    One is the kernel that reads most of a decode step: one row times matrices of InternLM3-8B's head.
    """
    matrices = x.view(-1, INTERNLM3_8B.hidden).split(INTERNLM3_8B.vocabulary)
    matrices = [w for w in matrices if w.shape == matrices[0].shape]
    row = matrices[0][:1].clone()
    ways: dict[str, list[Call]] = {"sum": [x.view(torch.float32).sum]}
    if x.is_cuda:
        from .read_bandwidth import variants

        ways = variants(x.view(torch.float32))
    whole = {name: (nbytes(x), calls) for name, calls in ways.items()}
    linear = kernels.for_device(x.device).linear
    return {**whole, "lm_head of one row": (nbytes(*matrices), [partial(linear, row, w) for w in matrices])}
