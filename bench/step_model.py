"""Predict the time of a decode step of InternLM3-8B on a GPU that is not present.

    python -m bench.step_model [--device H100 ...] [--batch N ...] [--context N ...] [--record FILE] [--launches]

The launches of a step are compiled as in the audit. What their programs need is read from their machine code
(bench/step_launches.py), and their course is simulated program by program (bench/simulation.py). What that assumes of a
GPU is listed in `H200` with its origin. Two layers are simulated; the others take the time of the second.

`floor` is the time to read the bytes that are in no cache; `share` is the floor's share of the step. With --record the
rate of reads is a record's read ceiling. bench/predictions.md has the predictions, and what a record showed of them.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple, TypeVar

from .cases import DENSE, FORMS
from .record import load
from .simulation import Gpu, ends
from .step_launches import LAYERS, SEARCHES, TARGET, Shape, StepLaunch, launches

T = TypeVar("T")
_CYCLES = 1980.0  # of a multiprocessor in a microsecond, by the stamp of the record
# "fitted": to the launches of batch size 1 in bench/results/2026-11-27-h200.json.
H200 = Gpu(
    read=4.76e6,  # fitted; the data sheet has 4.8, the memory's clock and width give 4.92
    l2=7.2e6,  # published: 5.5 on an H100 PCIe; scaled by multiprocessors and clock
    port=64 * _CYCLES,  # published: 64 bytes a cycle
    issued=3.6 * _CYCLES,  # fitted; at most 4
    issued_by_warp=0.4 * _CYCLES,  # fitted
    trip=1.0,  # fitted; 0.6 published for a single request
    hit=0.1,  # fitted; 0.13 published
    start=0.2,  # fitted
    release=0.75,  # fitted
    barrier=0.035,  # fitted
    matrix=33 / _CYCLES,  # published
    tail=0.1,  # fitted
    scattered=1.1,  # fitted
)
DEVICES = {
    # The same multiprocessors; its memory reads the same share of what its clock and width give.
    "H100": H200._replace(read=H200.read * 3.35 / 4.92),
    "H200": H200,
}


class Step(NamedTuple):
    """The time of a step, and of each of its launches: from its predecessor's end to its own. In microseconds."""

    time: float
    launches: list[float]


def predict(launches: Sequence[StepLaunch], gpu: Gpu) -> Step:
    """launches: those of a step in order, with those of one layer."""
    first = next(i for i, launch in enumerate(launches) if launch.per_layer)
    last = max(i for i, launch in enumerate(launches) if launch.per_layer) + 1
    chain = [*launches[:last], *launches[first:]]
    end = ends([launch.programs for launch in chain], gpu, TARGET)
    times = [after - before for before, after in zip([0.0, *end], end, strict=False)]
    shown = [*times[:first], *times[last:]]
    return Step(end[-1] + (LAYERS - 2) * sum(shown[first:last]), shown)


def from_memory(launches: Sequence[StepLaunch]) -> float:
    """Bytes that a step loads from memory."""
    return sum(
        (launch.programs.early + launch.programs.late) * launch.programs.number * (LAYERS if launch.per_layer else 1)
        for launch in launches
    )


def with_record(devices: dict[str, Gpu], path: str) -> dict[str, Gpu]:
    """The devices, one of them with the read ceiling of its record.

    Raises ValueError for a file that is not a record of bench.ops or bench.gpu, or of another device.
    """
    record = load(path)
    rates = [row.value for row in record.rows if row.about.get("ceiling") == "read"]
    if not rates:
        raise ValueError(f"{path} has no read bandwidth: name a record of bench.ops or bench.gpu")
    device = record.stamp["device"]
    if not any(name in device for name in devices):
        raise ValueError(f"{path} is of {device}; the model knows {' and '.join(devices)}")
    return {name: gpu._replace(read=1e3 * rates[0]) if name in device else gpu for name, gpu in devices.items()}


def _progress(what: str, count: int, results: Iterable[T]) -> Iterator[T]:
    """The results; says on stderr how many there are."""
    for i, result in enumerate(results, 1):
        print(f"{what} {i} of {count} steps", file=sys.stderr, flush=True)
        yield result


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.step_model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", action="append", choices=DEVICES, help="default: all")
    parser.add_argument("--batch", action="append", type=int, help="default: 1, 4, 16, 32 and 64")
    parser.add_argument("--context", action="append", type=int, help="default: 1024 and 32768")
    parser.add_argument("--sampling", choices=SEARCHES, default="recommended")
    parser.add_argument(
        "--weights",
        choices=[DENSE, *FORMS],
        default=DENSE,
        help="of the layers; lm_head's is int8 if they are quantised",
    )
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

    batches, contexts = options.batch or (1, 4, 16, 32, 64), options.context or (1024, 32768)
    shapes = [Shape(batch, context, options.sampling, options.weights) for batch in batches for context in contexts]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        found = dict(zip(shapes, _progress("compiled", len(shapes), pool.map(launches, shapes)), strict=True))
        work = [(name, shape) for name in devices for shape in shapes if found[shape]]
        made = pool.map(predict, [found[shape] for _, shape in work], [devices[name] for name, _ in work])
        steps = [*_progress("simulated", len(work), made)]
    for shape in shapes:
        if not found[shape]:
            print(f"batch {shape.batch}, context {shape.context}: cuBLAS has a part in it, and is not in the model")
    print(f"{'device':8}{'batch':>6}{'context':>9}{'launches':>10}{'GB':>8}{'floor ms':>10}{'step ms':>9}{'share':>7}")
    for (name, shape), step in zip(work, steps, strict=True):
        chain = found[shape]
        count, size = sum(LAYERS if x.per_layer else 1 for x in chain), from_memory(chain)
        floor = size / devices[name].read
        print(
            f"{name:8}{shape.batch:6}{shape.context:9}{count:10}{size / 1e9:8.2f}{floor / 1e3:10.2f}"
            f"{step.time / 1e3:9.2f}{floor / step.time:7.1%}"
        )
        for time, x in zip(step.launches, chain, strict=True) if options.launches else ():
            p, times = x.programs, LAYERS if x.per_layer else 1
            print(
                f"    {x.op:24}{x.kernel:17}{times:3} x {time:7.2f} us of"
                f" {(p.early + p.late) * p.number / devices[name].read:7.2f}  {times * time / step.time:6.1%}"
                f"  programs {p.number}, early {p.early * p.number / 1e6:.1f} MB, trigger {p.trigger}"
            )


if __name__ == "__main__":
    main()
