"""Time every op at InternLM3-8B's shapes beside its peers, and beside what this machine's memory allows.

    python bench/kernels.py [--kernel NAME ...] [--rounds 20] [--json FILE]

On an accelerator: the Triton op; PyTorch's own by the name of `kernels.reference`, whose products are cuBLAS's; the
same by torch.compile; for attention SDPA over a cache without pages. A CUDA graph holds many calls, each on inputs of
its own, so that the caches keep little from one replay to the next: "cold". Ops too small for that are marked "warm".
On a CPU: the reference ops alone, at a small model's shapes.

Reported are medians of microseconds over the rounds with their quartiles, the bytes an op must move, and the share that
its speed is of the read floor: the fastest that this machine reads, measured in the same run.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from cases import INTERNLM3_8B, Arguments, Case, Size, cases
from internlm3 import kernels
from internlm3.kernels import reference, sampling_reference
from torch import Tensor

SMALL = Size(hidden=512, intermediate=1280, vocabulary=4096, heads=8, kv_heads=2, head_dim=64)
MOST_CALLS = 512  # in one graph
MOST_BYTES = 8 << 30  # of inputs for one graph
Call = Callable[[], Any]


class Figure(NamedTuple):
    """One op, done by one engine."""

    op: str
    shape: str
    engine: str
    microseconds: float  # median
    quartiles: tuple[float, float]
    bytes: int
    cold: bool

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return self.bytes / self.microseconds * 1e6


class Floor(NamedTuple):
    """What no op can beat, in bytes or operations a second."""

    read: float
    copy: float
    matmul: float


@triton.jit
def _read(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """Read everything once, write next to nothing."""
    program = tl.program_id(0).to(tl.int64)
    tl.store(y_ptr + program, tl.sum(tl.load(x_ptr + program * BLOCK + tl.arange(0, BLOCK)), 0))


def _nbytes(*values: Any) -> int:
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))


def moved(op: str, arguments: Arguments, result: Any) -> int:
    """Bytes that the op must read and write: its arguments and results once, of tables and caches what it touches."""
    results = result if isinstance(result, tuple) else (result,)
    touched = dict(arguments)
    total = _nbytes(*results)
    if op == "embed":
        del touched["table"]
        total *= 2
    elif op in ("rope_and_cache", "rms_norm_qkv_rope_cache"):
        cache = touched.pop("k_cache")
        del touched["v_cache"]
        total += 2 * touched["seq_lens"].numel() * cache.shape[1] * cache.shape[3] * cache.element_size()
    elif op == "advance":
        for table in ("ends", "output_counts", "permitted", "allowed"):
            del touched[table]  # a word each
    return total + _nbytes(*touched.values())


def _reference(op: str) -> Callable[..., Any]:
    return sampling_reference.sample if op == "sample" else getattr(reference, op)


def _sdpa(arguments: Arguments) -> Call:
    """PyTorch's attention over the same keys and values in the order of their tokens."""
    sequences = arguments["seq_lens"].numel()
    q = arguments["q"].view(sequences, -1, *arguments["q"].shape[1:]).transpose(1, 2)
    # [B, N, K, S, D] -> [B, K, N * S, D]
    k, v = (
        arguments[name][arguments["block_table"].long()].transpose(1, 2).flatten(2, 3)
        for name in ("k_cache", "v_cache")
    )
    tokens, length = q.shape[2], k.shape[2]
    mask = None
    if tokens > 1:
        mask = torch.ones(tokens, length, dtype=torch.bool, device=q.device).tril(length - tokens)
    return lambda: F.scaled_dot_product_attention(q, k, v, mask, scale=arguments["scale"], enable_gqa=True)


def engines(op: str, on_gpu: bool) -> dict[str, Callable[[Arguments], Call]]:
    """Name -> how that engine makes a call of the op on these arguments."""
    plain = _reference(op)
    if not on_gpu:
        return {"reference": lambda arguments: lambda: plain(**arguments)}
    ours = getattr(kernels, op)
    found: dict[str, Callable[[Arguments], Call]] = {"triton": lambda arguments: lambda: ours(**arguments)}
    if op == "paged_attention":
        found["SDPA"] = _sdpa
    elif op not in ("rope_and_cache", "rms_norm_qkv_rope_cache", "sample"):  # these ask the device for lengths
        compiled = torch.compile(plain, dynamic=False)
        found["PyTorch"] = lambda arguments: lambda: plain(**arguments)
        found["torch.compile"] = lambda arguments: lambda: compiled(**arguments)
    return found


def _replayed(calls: Sequence[Call]) -> Call:
    """All calls in one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:3]:  # what compiles does it before the capture
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def timed(call: Call, calls: int, rounds: int) -> list[float]:
    """Microseconds of each round's `call()`, divided among the calls that it makes."""
    on_gpu = torch.cuda.is_available()
    times = []
    for _ in range(rounds + 1):
        if on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / calls)
        else:
            started = time.perf_counter()
            call()
            times.append((time.perf_counter() - started) * 1e6 / calls)
    return times[1:]  # the first warms up


class Prepared(NamedTuple):
    engine: str
    call: Call
    calls: int  # that one `call()` makes
    bytes: int
    cold: bool


def prepare(case: Case, device: torch.device) -> Iterator[Prepared]:
    """Each engine's calls of a case, on rotated inputs, in one graph where there is a GPU."""
    on_gpu = device.type == "cuda"
    for engine, make in engines(case.op, on_gpu).items():
        arguments = case.arguments(device)
        size = moved(case.op, arguments, make(arguments)())
        calls, cold = 1, False
        if on_gpu:
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            wanted = max(-(-3 * cache // size), 2)
            calls = min(wanted, MOST_CALLS, max(MOST_BYTES // _nbytes(*arguments.values()), 2))
            cold = calls == wanted
        made = [make(arguments), *(make(case.arguments(device)) for _ in range(calls - 1))]
        yield Prepared(engine, _replayed(made) if on_gpu else made[0], calls, size, cold)


def measure_floor(device: torch.device, rounds: int) -> Floor:
    on_gpu = device.type == "cuda"
    block = 8192
    x = torch.zeros((1 << 29 if on_gpu else 1 << 25) // block * block, device=device)
    y = torch.empty_like(x)
    side = 8192 if on_gpu else 1024
    a = torch.randn(side, side, device=device).to(torch.bfloat16 if on_gpu else torch.float32)
    read: Call = (lambda: _read[(x.numel() // block,)](x, y, block, num_warps=8)) if on_gpu else x.sum
    seconds = [
        statistics.median(timed(call, 1, rounds)) / 1e6 for call in (read, lambda: y.copy_(x), lambda: torch.mm(a, a))
    ]
    return Floor(_nbytes(x) / seconds[0], 2 * _nbytes(x) / seconds[1], 2 * side**3 / seconds[2])


def print_table(figures: Sequence[Figure], floor: Floor) -> None:
    print(f"{'op':24}{'shape':17}{'engine':14}{'us':>12}{'quartiles':>24}{'MB':>10}{'GB/s':>9}{'of floor':>9}  L2")
    for figure in figures:
        low, high = figure.quartiles
        share = f"{figure.rate / floor.read:.1%}" if figure.cold else "-"  # caches are faster than memory
        print(
            f"{figure.op:24}{figure.shape:17}{figure.engine:14}{figure.microseconds:12.2f}{f'{low:.2f}..{high:.2f}':>24}"
            f"{figure.bytes / 1e6:10.2f}{figure.rate / 1e9:9.1f}{share:>9}"
            f"  {'cold' if figure.cold else 'warm'}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", action="append", choices=sorted(kernels.__all__), help="an op's name; default: all")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", help="write the figures to this file, too")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    name = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    print(f"{name}, PyTorch {torch.__version__}, Triton {triton.__version__}")
    if not on_gpu:
        print(
            "no accelerator here: these are the reference ops at a small model's shapes; they say nothing of Triton's"
        )

    floor = measure_floor(device, options.rounds)
    print(
        f"floor: reads {floor.read / 1e9:.1f} GB/s, copies {floor.copy / 1e9:.1f} GB/s (read and written), "
        f"multiplies {floor.matmul / 1e12:.2f} TFLOP/s in {'bfloat16' if on_gpu else 'float32'}"
    )
    figures = []
    for case in cases(INTERNLM3_8B if on_gpu else SMALL):
        if case.op not in (options.kernel or kernels.__all__):
            continue
        for prepared in prepare(case, device):
            times = timed(prepared.call, prepared.calls, options.rounds)
            low, median, high = statistics.quantiles(times, n=4)
            figures.append(Figure(case.op, case.shape, prepared.engine, median, (low, high), *prepared[3:]))
    print_table(figures, floor)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(
                {"device": name, "floor": floor._asdict(), "figures": [x._asdict() for x in figures]}, file, indent=1
            )


if __name__ == "__main__":
    main()
