"""Predict the time of a decode step of InternLM3-8B on a GPU that is not present.

    python -m bench.step_model [--device H100 ...] [--batch N ...] [--context N ...] [--record FILE] [--launches]

The launches of a step are compiled as in the audit; registers, bytes in flight, waits and instructions are read from
their machine code. Everything else is assumed and listed in `Assumed` with its origin; the read bandwidth comes from a
record of bench.ops or bench.gpu, if given. A launch takes

    max(latency, first wave - idle time before)  +  max(memory, L2, instructions) of the rest
    latency = gap + waits * trip         waits: those in sequence, loops included

Loads that a launch issues before it waits for its predecessor use the memory while the predecessor leaves it idle.
`floor` is the time to read the bytes that are in no cache; `share` is the floor's share of the step.
bench/predictions.md logs the predictions before and after each change of a kernel.
"""

import argparse
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

os.environ.pop("TRITON_INTERPRET", None)

import torch

from internlm3 import kernels
from internlm3.kernels.triton.sample_search import PASSES, TOP_K, TOP_P, TYPICAL_P

from .audit import FACTS, Facts, kernel_name
from .cases import INTERNLM3_8B as SIZE
from .cases import Arguments, Case, cases
from .machine_code.launches import Launch, compile_launches
from .machine_code.reader import MachineCode, read
from .machine_code.sass import Access
from .machine_code.targets import TARGETS
from .record import load

LAYERS = 48
TARGET = TARGETS["sm_90"]


class Assumed(NamedTuple):
    """What the model assumes of a GPU. Rates in bytes per second, times in microseconds."""

    read: float  # without a record 91% (H100) and 94% (H200) of the data sheet
    l2: float = 5.5e12  # from the L2 cache to the multiprocessors; from published microbenchmarks, not measured here
    gap: float = 0.5  # from the predecessor's last store to the first load after the wait
    trip: float = 0.7  # one wait for a load, from memory or cache
    clock: float = 1.755e9  # Hz under load
    # Instructions per cycle: of the four that a multiprocessor can issue, what dependences leave; of one warp.
    issued: float = 0.9 * 4
    issued_by_warp: float = 0.4


DEVICES = {"H100": Assumed(3.05e12), "H200": Assumed(4.5e12, l2=5.5e12)}


class Search(NamedTuple):
    """What the sampling kernels search with the settings of a request."""

    candidates: int  # tokens that may be at a filter's threshold
    filters: tuple[int, ...]  # filters that are used; programs of the others exit at once


SEARCHES = {
    "greedy": Search(0, ()),
    "recommended": Search(128, (TOP_K.value, TOP_P.value)),
    "top_p only": Search(8192, (TOP_P.value,)),
    "typical_p only": Search(SIZE.vocabulary, (TYPICAL_P.value,)),
}


class Cost(NamedTuple):
    """What one launch needs, on any GPU."""

    op: str
    kernel: str
    launches: int  # in a step
    memory: int  # bytes that are in no cache
    loaded: int  # bytes loaded through the L2 cache
    early: int  # bytes that the resident programs request before the wait
    instructions: int  # of all warps
    programs: int
    warps: int  # of a program
    resident: int  # programs on a multiprocessor
    flight: int  # outstanding bytes of a program, at most
    waits: int


def bulk(x: Arguments, launch: Launch) -> int:
    """Bytes that the launch must load from memory, because a step leaves them in no cache."""
    if launch.kernel == "_linear_few_rows":
        return x["weight"].numel() * x["weight"].element_size()
    if launch.kernel == "_attend":
        return 2 * x["block_table"].numel() * x["k_cache"][0].numel() * x["k_cache"].element_size()
    if launch.kernel == "_embed":
        return x["token_ids"].numel() * SIZE.hidden * 2
    if launch.kernel == "_penalize":
        return sum(x[name].numel() * 4 for name in ("prompt_counts", "output_counts", "logit_bias") if name in x)
    return 0


def cost(case: Case, count: int, launch: Launch, code: MachineCode, search: Search) -> Cost:
    facts = FACTS.get(kernel_name(launch), Facts())
    arguments = case.arguments(torch.device("meta"))
    metadata, memory = launch.compiled.metadata, bulk(arguments, launch)
    threads, programs = 32 * metadata.num_warps, launch.programs
    if launch.kernel in ("_narrow", "_weigh"):  # programs with nothing to search exit
        if launch.constants.get("SEARCH", TYPICAL_P.value) not in search.filters:
            waits = code.first_exit.round_trips
            return Cost(case.op, launch.kernel, count, 0, 0, 0, 0, programs, metadata.num_warps, programs, 0, waits)
        chunk = launch.constants["CHUNK"]
        programs = programs * -(-search.candidates // chunk) // -(-SIZE.vocabulary // chunk)
    loads = [access for access in code.accesses if access.is_load]

    def runs(loop: str) -> float:
        """How often the instructions of a loop run: to load all of the bulk, or to search all candidates."""
        streamed = sum(x.bytes for x in loads if x.loop == loop and x.pointers & set(facts.bulk))
        if launch.kernel == "_narrow_few" and loop:  # an outer loop, and one over all chunks but the first
            return PASSES * (-(-search.candidates // launch.constants["CHUNK"]) - 1 if streamed else 1)
        return max(memory / programs / threads / streamed, 1) if loop and streamed else 1

    def programs_at_l2(x: Access) -> float:
        """The programs that load from L2: one per multiprocessor; the others hit L1, unless they copy."""
        if "LDGSTS" not in x.instruction:
            return min(programs, TARGET.multiprocessors)
        # Rows of a tile of x beyond the batch are not read.
        return programs * (len(arguments["x"]) / launch.constants["BR"] if x.pointers == {"x_ptr"} else 1)

    others = [x for x in loads if not x.pointers & set(facts.bulk)]
    resident = TARGET.resident_blocks(metadata.num_warps, code.registers, metadata.shared)
    early = sum(x.bytes for x in loads if not x.may_have_waited and x.pointers & set(facts.bulk)) * threads
    if launch.kernel == "_linear_few_rows" and launch.constants["BR"] > 1:  # prefetches into L2, which are not loads
        early += launch.constants["BO"] * launch.constants["AHEAD"] * 128
    # A loop without outstanding loads waits in every iteration.
    serial = {x.loop for x in loads if x.loop} - {x.loop for x in loads if "LDGSTS" in x.instruction}
    return Cost(
        case.op,
        launch.kernel,
        count,
        memory,
        memory + round(sum(x.bytes * runs(x.loop) * threads * programs_at_l2(x) for x in others)),
        min(early * min(programs, resident * TARGET.multiprocessors), memory),
        round(sum(number * runs(loop) for loop, number in code.instructions.items()) * metadata.num_warps * programs),
        programs,
        metadata.num_warps,
        resident,
        code.flight.bytes * threads,
        code.flight.round_trips + round(sum(runs(loop) - 1 for loop in serial)),
    )


def step(batch: int, context: int, sampling: str) -> Iterator[tuple[Case, int]]:
    """The ops of a step in order, and how often each runs."""
    ops = {
        "embed": 1,
        "rms_norm_qkv_rope_cache": LAYERS,
        "paged_attention": LAYERS,
        "linear_add, o_proj": LAYERS,
        "rms_norm_swiglu": LAYERS,
        "linear_add, down_proj": LAYERS,
        "rms_norm_linear": 1,
        f"sample, {sampling}": 1,
        "advance": 1,
    }
    known = [*cases(SIZE, batches=[batch], chunks=[], contexts=[context])]
    for name, count in ops.items():
        op, _, part = name.partition(", ")
        yield next(case for case in known if case.op == op and part in ["", *case.shape.split(", ")]), count


def costs(shape: tuple[int, int, str]) -> list[Cost]:
    found = []
    for case, count in step(*shape):
        for launch in compile_launches(getattr(kernels, case.op), case.arguments, TARGET):
            code = read(launch, TARGET)
            found.append(cost(case, count, launch, code, SEARCHES[shape[2]]))
    return found


def microseconds(costs: list[Cost], gpu: Assumed) -> list[float]:
    """The time of each launch."""
    times, idle = [], 0.0
    for x in costs:
        working = min(x.programs, TARGET.multiprocessors)
        together = min(x.resident, -(-x.programs // TARGET.multiprocessors))
        rate = min(gpu.read, working * together * x.flight / gpu.trip * 1e6) if x.flight else gpu.read
        issued = working * min(gpu.issued, together * x.warps * gpu.issued_by_warp) * gpu.clock
        busy = 1e6 * max(x.memory / rate, x.loaded / gpu.l2, x.instructions / issued)
        latency = gpu.gap + x.waits * gpu.trip
        first = 1e6 * x.early / gpu.read
        left = max(first - idle, 0.0)  # of the first wave, still to load
        times.append(max(latency, left) + max(busy - first, 0.0))
        # The successor starts when the last program has started.
        idle = max(latency - left, 0.0) if x.programs <= x.resident * TARGET.multiprocessors else 0.0
    return times


def with_record(devices: dict[str, Assumed], path: str) -> dict[str, Assumed]:
    """The devices, one of them with the read bandwidth of its record.

    Raises ValueError for a file that is not a record of bench.ops or bench.gpu, or of another device.
    """
    record = load(path)
    rates = [row.value for row in record.rows if row.about.get("ceiling") == "read"]
    if not rates:
        raise ValueError(f"{path} has no read bandwidth: name a record of bench.ops or bench.gpu")
    device = record.stamp["device"]
    if not any(name in device for name in devices):
        raise ValueError(f"{path} is of {device}; the model knows {' and '.join(devices)}")
    return {name: gpu._replace(read=1e9 * rates[0]) if name in device else gpu for name, gpu in devices.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.step_model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", action="append", choices=DEVICES, help="default: all")
    parser.add_argument("--batch", action="append", type=int, help="default: 1, 4 and 16")
    parser.add_argument("--context", action="append", type=int, help="default: 1024 and 32768")
    parser.add_argument("--sampling", choices=SEARCHES, default="recommended")
    parser.add_argument(
        "--record", action="append", default=[], help="of bench.ops or bench.gpu, for its read bandwidth"
    )
    parser.add_argument("--launches", action="store_true", help="print a line for each launch as well")
    options = parser.parse_args()
    devices = {name: DEVICES[name] for name in options.device or DEVICES}
    try:
        for path in options.record:
            devices = with_record(devices, path)
    except ValueError as error:
        parser.error(str(error))
    for name, gpu in devices.items():
        print(f"{name}: {', '.join(f'{key} {value:g}' for key, value in gpu._asdict().items())}")

    shapes = [(r, c, options.sampling) for r in options.batch or (1, 4, 16) for c in options.context or (1024, 32768)]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        found = dict(zip(shapes, pool.map(costs, shapes), strict=True))
    print(f"{'device':8}{'batch':>6}{'context':>9}{'launches':>10}{'GB':>8}{'floor ms':>10}{'step ms':>9}{'share':>7}")
    for name, gpu in devices.items():
        for (batch, context, _), launches in found.items():
            times = microseconds(launches, gpu)
            total = sum(time * x.launches for time, x in zip(times, launches, strict=True)) / 1e3
            memory = sum(x.memory * x.launches for x in launches)
            floor = memory / gpu.read * 1e3
            print(
                f"{name:8}{batch:6}{context:9}{sum(x.launches for x in launches):10}{memory / 1e9:8.2f}{floor:10.2f}"
                f"{total:9.2f}{floor / total:7.1%}"
            )
            if options.launches:
                for time, x in zip(times, launches, strict=True):
                    print(
                        f"    {x.op:24}{x.kernel:12}{x.launches:4} x {time:8.2f} us of {x.memory / gpu.read * 1e6:7.2f}"
                        f"  {x.launches * time / total / 1e3:6.1%}  waits {x.waits}, programs {x.programs}"
                    )


if __name__ == "__main__":
    main()
