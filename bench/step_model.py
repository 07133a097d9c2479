"""What a decode step of InternLM3-8B should take on a GPU that is not here: a prediction, to be compared and corrected.

    python bench/step_model.py [--device H100 ...] [--rows N ...] [--context N ...] [--record FILE] [--launches]

The launches are the step's own, compiled as the audit compiles them; their registers, bytes in flight, waits and
instructions are read from the machine code. Everything else is assumed, and stands in `Assumed` with its origin; the
read rate comes from a record of bench/kernels.py or bench/gpu.py where one is given. A launch takes

    max(latency, first wave - what came before)  +  max(memory, L2, instructions) of the rest
    latency = gap + waits * trip         waits: those one behind another, loops included

and what it loads before it waits for its predecessor flows while that one leaves memory idle. `floor` is the bytes that
have to come from memory over the speed at which it reads; `of it` is the share of the step that the floor is.
bench/predictions.md logs what this printed before and after each change of a kernel.
"""

import argparse
import json
import os
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

os.environ.pop("TRITON_INTERPRET", None)

import torch
from .audit import FACTS, Facts, kernel_name
from .cases import INTERNLM3_8B as SIZE
from .cases import Arguments, Case, cases
from internlm3 import kernels
from internlm3.kernels.sampling_search import PASSES, TOP_K, TOP_P, TYPICAL_P
from .machine_code.launches import Launch, compile_launches
from .machine_code.reader import MachineCode, read
from .machine_code.sass import Access
from .machine_code.targets import TARGETS

LAYERS = 48
TARGET = TARGETS["sm_90"]


class Assumed(NamedTuple):
    """A GPU, as far as the model knows it. Rates in bytes a second, times in microseconds."""

    read: float  # without a record 91% (H100) and 94% (H200) of the data sheet
    l2: float = 5.5e12  # from the L2 cache into the multiprocessors; microbenchmarks of others, to be measured
    gap: float = 0.5  # from the predecessor's last store to the first load behind the wait
    trip: float = 0.7  # one wait for a load, from wherever it comes
    clock: float = 1.755e9  # Hz under load
    # Of the four instructions a cycle that a multiprocessor can issue, what dependences leave; a warp's own share.
    issued: float = 0.9 * 4
    issued_by_warp: float = 0.4


DEVICES = {"H100": Assumed(3.05e12), "H200": Assumed(4.5e12, l2=5.5e12)}


class Search(NamedTuple):
    """What the settings of a request leave to search."""

    candidates: int  # tokens among which a threshold lies
    filters: tuple[int, ...]  # that have one; the others' programs leave at once


SEARCHES = {
    "greedy": Search(0, ()),
    "recommended": Search(128, (TOP_K.value, TOP_P.value)),
    "top_p alone": Search(8192, (TOP_P.value,)),
    "typical_p alone": Search(SIZE.vocabulary, (TYPICAL_P.value,)),
}


class Cost(NamedTuple):
    """What one launch asks of a GPU, before it is known which."""

    op: str
    kernel: str
    count: int  # launches in a step
    memory: int  # bytes that are in no cache
    loaded: int  # bytes that come through the L2 cache
    early: int  # bytes of the programs that fit at once, on their way before the wait
    instructions: int  # of all warps
    programs: int
    warps: int  # of a program
    resident: int  # programs on a multiprocessor
    flight: int  # bytes that a program has on its way at most
    waits: int


def bulk(x: Arguments, launch: Launch) -> int:
    """Bytes that the launch must bring from memory: what a step leaves in no cache."""
    if launch.kernel == "_skinny":
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
    if launch.kernel in ("_narrow", "_weigh"):  # programs that have nothing to search leave
        if launch.constants.get("SEARCH", TYPICAL_P.value) not in search.filters:
            waits = code.way_out.round_trips
            return Cost(case.op, launch.kernel, count, 0, 0, 0, 0, programs, metadata.num_warps, programs, 0, waits)
        chunk = launch.constants["CHUNK"]
        programs = programs * -(-search.candidates // chunk) // -(-SIZE.vocabulary // chunk)
    loads = [access for access in code.accesses if access.is_load]

    def runs(loop: str) -> float:
        """How often the instructions of a loop run: to bring all of the bulk, or over what is searched."""
        streamed = sum(x.bytes for x in loads if x.loop == loop and x.pointers & set(facts.bulk))
        if launch.kernel == "_narrow_few" and loop:  # an outer loop, and one over what the first chunk does not hold
            return PASSES * (-(-search.candidates // launch.constants["CHUNK"]) - 1 if streamed else 1)
        return max(memory / programs / threads / streamed, 1) if loop and streamed else 1

    def programs_at_l2(x: Access) -> float:
        """The first of a multiprocessor brings into its L1 cache what all of them read; copies pass by that cache."""
        if "LDGSTS" not in x.instruction:
            return min(programs, TARGET.multiprocessors)
        # Of a tile of x, rows that are not there are not read.
        return programs * (len(arguments["x"]) / launch.constants["BR"] if x.pointers == {"x_ptr"} else 1)

    others = [x for x in loads if not x.pointers & set(facts.bulk)]
    resident = TARGET.resident_blocks(metadata.num_warps, code.registers, metadata.shared)
    early = sum(x.bytes for x in loads if not x.may_have_waited and x.pointers & set(facts.bulk)) * threads
    if launch.kernel == "_skinny" and launch.constants["BR"] > 1:  # a request into the L2 cache is no load
        early = launch.constants["BO"] * launch.constants["AHEAD"] * 128
    # A loop that keeps nothing on its way waits in every round.
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


def step(rows: int, context: int, sampling: str) -> Iterator[tuple[Case, int]]:
    """A step's ops in their order, and how often each runs."""
    ops = {
        "embed": 1,
        "rms_norm_qkv_rope_cache": LAYERS,
        "paged_attention": LAYERS,
        "linear_add, o": LAYERS,
        "rms_norm_swiglu": LAYERS,
        "linear_add, down": LAYERS,
        "rms_norm_linear": 1,
        f"sample, {sampling}": 1,
        "advance": 1,
    }
    known = [*cases(SIZE, rows=[rows], chunks=[], contexts=[context])]
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
    """What each launch takes, once."""
    times, idle = [], 0.0
    for x in costs:
        working = min(x.programs, TARGET.multiprocessors)
        together = min(x.resident, -(-x.programs // TARGET.multiprocessors))
        rate = min(gpu.read, working * together * x.flight / gpu.trip * 1e6) if x.flight else gpu.read
        issued = working * min(gpu.issued, together * x.warps * gpu.issued_by_warp) * gpu.clock
        busy = 1e6 * max(x.memory / rate, x.loaded / gpu.l2, x.instructions / issued)
        latency = gpu.gap + x.waits * gpu.trip
        first = 1e6 * x.early / gpu.read
        left = max(first - idle, 0.0)  # of the first wave
        times.append(max(latency, left) + max(busy - first, 0.0))
        # The successor begins when the last program has begun.
        idle = max(latency - left, 0.0) if x.programs <= x.resident * TARGET.multiprocessors else 0.0
    return times


def read_rate(path: str) -> tuple[str, float]:
    """The device of a record of bench/kernels.py or bench/gpu.py, and the bytes a second that it read.

    Raises ValueError, with a sentence, for any other file.
    """
    try:
        record = json.loads(Path(path).read_text("utf-8"))
        if "floor" in record:
            return record["stamp"]["device"], float(record["floor"]["read"])
        rounds = [rate for row in record["rows"] if row["about"].get("ceiling") == "read" for rate in row["rounds"]]
        return record["stamp"]["device"], 1e9 * statistics.median(rounds)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} has no read rate: name a record of bench/kernels.py or bench/gpu.py") from None


def with_record(devices: dict[str, Assumed], path: str) -> dict[str, Assumed]:
    """The devices with what a record of one of them has measured. Raises ValueError where it is of none."""
    measured, rate = read_rate(path)
    if not any(name in measured for name in devices):
        raise ValueError(f"{path} is of {measured}, and the model is of {' and '.join(devices)}")
    return {name: gpu._replace(read=rate) if name in measured else gpu for name, gpu in devices.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", action="append", choices=DEVICES, help="default: all")
    parser.add_argument("--rows", action="append", type=int, help="default: 1, 4 and 16")
    parser.add_argument("--context", action="append", type=int, help="default: 1024 and 32768")
    parser.add_argument("--sampling", choices=SEARCHES, default="recommended")
    parser.add_argument("--record", action="append", default=[], help="of bench/kernels.py or bench/gpu.py")
    parser.add_argument("--launches", action="store_true", help="a line for each launch, too")
    options = parser.parse_args()
    devices = {name: DEVICES[name] for name in options.device or DEVICES}
    try:
        for path in options.record:
            devices = with_record(devices, path)
    except ValueError as error:
        parser.error(str(error))
    for name, gpu in devices.items():
        print(f"{name}: {', '.join(f'{key} {value:g}' for key, value in gpu._asdict().items())}")

    shapes = [(r, c, options.sampling) for r in options.rows or (1, 4, 16) for c in options.context or (1024, 32768)]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        found = dict(zip(shapes, pool.map(costs, shapes), strict=True))
    print(f"{'device':8}{'rows':>5}{'context':>9}{'launches':>10}{'GB':>8}{'floor ms':>10}{'step ms':>9}{'of it':>7}")
    for name, gpu in devices.items():
        for (rows, context, _), launches in found.items():
            times = microseconds(launches, gpu)
            total = sum(time * x.count for time, x in zip(times, launches, strict=True)) / 1e3
            memory = sum(x.memory * x.count for x in launches)
            floor = memory / gpu.read * 1e3
            print(
                f"{name:8}{rows:5}{context:9}{sum(x.count for x in launches):10}{memory / 1e9:8.2f}{floor:10.2f}"
                f"{total:9.2f}{floor / total:7.1%}"
            )
            if options.launches:
                for time, x in zip(times, launches, strict=True):
                    print(
                        f"    {x.op:24}{x.kernel:12}{x.count:4} x {time:8.2f} us of {x.memory / gpu.read * 1e6:7.2f}"
                        f"  {x.count * time / total / 1e3:6.1%}  waits {x.waits}, programs {x.programs}"
                    )


if __name__ == "__main__":
    main()
