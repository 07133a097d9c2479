"""Time the ops at a model's shapes beside their peers and what this machine allows; check and time your own kernel.

    python bench/kernels.py --list                                  ops, shapes and engines; times nothing
    python bench/kernels.py --quick                                 one row of decode, five rounds
    python bench/kernels.py --op paged_attention --rows 1 4 --context 1024 32768 --dtype float16
    python bench/kernels.py --kernel mine.py                        a file with a function of an op's name, beside ours
    python bench/kernels.py --json run.json --csv run.csv --plot plots
    python bench/kernels.py --compare before.json after.json        what changed, and what of it is noise

On an accelerator "triton" is ours, and a CUDA graph holds many calls, each on inputs of its own, so that the caches
keep little from one replay to the next: "cold". Ops too small for that are "warm". On a CPU the ops are those of
kernels.reference, at a small model's shapes; Triton's are not timed there.

Every engine's result is compared with the reference before it is timed; what fails or is not installed is a row that
says so. Printed are medians and quartiles of microseconds a call, the bytes and operations that the op must do, and the
share of the floor that binds it: what this machine reads, or multiplies, at most, measured in the same run.
"""

import argparse
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from . import checking
from . import user_kernels
from . import peers
import torch
from .cases import INTERNLM3_8B, SMALL, Arguments, Case, Size, cases, read_size
from internlm3 import kernels
from .options import one_of, output, positive
from .record import Figure, Record, compare, load, stamp
from .rows import first_line
from .timing import Call, Floor, measure_floor, name_of, replayed, rounds_of
from .roofline import moved, nbytes, operations

MOST_CALLS = 512  # in one graph
MOST_BYTES = 8 << 30  # of inputs for one graph
DTYPES = {name_of(dtype): dtype for dtype in checking.STEPS}
Make = Callable[[str, Arguments], Call]  # of an op and its arguments, the call
Own = dict[str, dict[str, Callable[..., Any]]]  # by file and op


def ours(device: torch.device) -> tuple[str, Make]:
    """The name of our engine on a device, and its calls."""
    backend = kernels.for_device(device)
    return "triton" if device.type == "cuda" else "reference", lambda op, arguments: partial(
        getattr(backend, op), **arguments
    )


def engines(case: Case, device: torch.device, wanted: Sequence[str], own_ops: Own) -> dict[str, Make]:
    """Those that do a case's op: ours first, then peers, then files of the user's own."""
    name, make = ours(device)
    found = {name: make} if not wanted or name in wanted else {}
    for peer, about in peers.PEERS.items():
        if case.op in about.ops and (not wanted or peer in wanted):
            found[peer] = partial(peers.make, peer, device=device)
    for file, ops in own_ops.items():
        if case.op in ops:
            found[file] = lambda op, arguments, ops=ops: partial(ops[op], **arguments)
    return found


def reason_of(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    if text and "active drivers" in text[0]:
        return "Triton finds no GPU: TRITON_INTERPRET=1 checks a kernel without one, and times the interpreter"
    return text[0] if isinstance(error, peers.Unfit) else first_line(error)


class Prepared(NamedTuple):
    """Calls of one case by one engine, each on inputs of its own, in one graph where there is a GPU."""

    whole: Call
    calls: int  # that `whole` makes
    bytes: int  # and operations: of one
    operations: int
    cold: bool

    def rounds(self) -> Iterator[float]:
        """Microseconds of a call, one round after another, for ever."""
        return rounds_of(self.whole, self.calls)


def prepare(case: Case, make: Make, device: torch.device) -> Prepared:
    arguments = case.arguments(device)
    call = make(case.op, arguments)
    size, work = moved(case.op, arguments, call()), operations(case.op, arguments)
    if device.type != "cuda":
        return Prepared(call, 1, size, work, cold=False)
    wanted = max(-(-3 * torch.cuda.get_device_properties(device).L2_cache_size // size), 2)
    calls = min(wanted, MOST_CALLS, max(MOST_BYTES // nbytes(*arguments.values()), 2))
    made = [call, *(make(case.op, case.arguments(device)) for _ in range(calls - 1))]
    return Prepared(replayed(made), calls, size, work, cold=calls == wanted)


def measure(case: Case, engine: str, make: Make, device: torch.device, rounds: int, strict: bool = False) -> Figure:
    """The engine's figure, or one with a note: it is not here, it fails, or its result is wrong."""
    described = (case.op, case.shape, name_of(case.dtype), case.rows, case.context, engine)
    try:
        with peers.time_limit(peers.SECONDS):
            for _ in range(2 if strict else 1):
                wrong = checking.error_of(
                    case.op, case.arguments(device), lambda given: make(case.op, given)(), own=strict
                )
                if wrong:
                    return Figure(*described, note=f"WRONG, not timed: {wrong}")
            prepared = prepare(case, make, device)
        times = list(islice(prepared.rounds(), rounds))
        return Figure(*described, prepared.bytes, prepared.operations, prepared.cold, times)
    except Exception as error:  # whatever a peer or somebody's kernel raises is its row
        return Figure(*described, note=f"not timed: {reason_of(error)}")


def figures(
    chosen: Sequence[Case], device: torch.device, rounds: int, wanted: Sequence[str], own_ops: Own
) -> Iterator[Figure]:
    """One by one, as they are measured. Why a peer is not here is said once for each op."""
    said = set()
    for case in chosen:
        for engine, make in engines(case, device, wanted, own_ops).items():
            figure = measure(case, engine, make, device, rounds, strict=engine in own_ops)
            if figure.rounds or (case.op, engine, figure.note) not in said:
                said.add((case.op, engine, figure.note))
                yield figure
            if device.type == "cuda" and not figure.rounds and not _answers():
                print("the GPU answers no more behind that row: what was measured before is kept")
                return


def _answers() -> bool:
    """Whether the GPU still does what it is asked, which after a wild access it does not."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


HEADER = (
    f"{'op':24}{'shape':25}{'dtype':10}{'engine':14}{'us':>10}{'quartiles':>20}{'MB':>9}{'GFLOP':>8}{'GB/s':>8}"
    f"{'TFLOP/s':>9}{'of floor':>15}  L2"
)


def line(figure: Figure, floor: Floor) -> str:
    head = f"{figure.op:24}{figure.shape:25}{figure.dtype:10}{figure.engine:14}"
    if not figure.rounds:
        return f"{head}  {figure.note}"
    low, median, high = figure.quartiles
    rate, products = figure.rates
    bound = figure.share(floor)
    spread = "..".join(f"{x:.2f}" if x < 1000 else f"{x:.0f}" for x in (low, high))
    share = f"{bound[1]:.1%} {bound[0]}" if bound else "-"  # caches are faster than memory
    return (
        f"{head}{median:10.2f}{spread:>20}{figure.bytes / 1e6:9.2f}{figure.operations / 1e9:8.2f}"
        f"{rate / 1e9:8.1f}{products / 1e12:9.3f}{share:>15}  {'cold' if figure.cold else 'warm'}"
    )


def floor_line(floor: Floor) -> str:
    products = ", ".join(f"{rate / 1e12:.2f} TFLOP/s in {dtype}" for dtype, rate in floor.matmul.items())
    return (
        f"floor: reads {floor.read / 1e9:.1f} GB/s, copies {floor.copy / 1e9:.1f} GB/s (read and written), "
        f"multiplies {products}"
    )


def show(record: Record) -> None:
    print("; ".join(f"{key} {value}" for key, value in record.stamp.items()))
    print(floor_line(record.floor))
    print(HEADER)
    for figure in record.figures:
        print(line(figure, record.floor))


def parser(our_name: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = made.add_argument
    add("--op", nargs="+", type=one_of("op", kernels.__all__), help="default: all, or those of --kernel")
    add("--rows", nargs="+", type=positive, help="sequences that decode a token each; default: 1 16")
    add("--chunk", nargs="+", type=positive, help="tokens of one prompt that go together; default: 4 512")
    add("--context", nargs="+", type=positive, help="tokens that a sequence holds; default: 1024")
    add("--dtype", nargs="+", type=one_of("dtype", list(DTYPES)), help="default: bfloat16")
    add("--engine", nargs="+", type=one_of("engine", [our_name, *peers.PEERS]), help="default: all that do the op")
    add("--config", metavar="PATH", help="a checkpoint's folder or config.json, for its shapes")
    add("--kernel", metavar="FILE.py", nargs="+", help="functions of ops' names, checked and timed beside ours")
    add("--rounds", type=positive, help="default: 20")
    add("--seed", type=int, help="of the inputs; default: another each time")
    add("--quick", action="store_true", help="one row of decode, five rounds, where nothing else is said")
    add("--list", action="store_true", help="what would be timed; times nothing")
    add("--json", metavar="OUT", type=output, help="write the record: every round, and where and how it was measured")
    add("--csv", metavar="OUT", type=output, help="write the table, too")
    add("--plot", metavar="DIR", help="draw the record (SVG; needs matplotlib)")
    add("--read", metavar="RECORD", help="show, plot or turn into CSV this record; times nothing")
    add("--compare", metavar=("BEFORE", "AFTER"), nargs=2, help="two records; times nothing")
    return made


def outputs(record: Record, options: argparse.Namespace) -> None:
    if options.json:
        record.save(options.json)
    if options.csv:
        record.save_csv(options.csv)
    if options.plot:
        from . import plots

        for path in plots.draw(record, options.plot):
            print(path)


def choose(options: argparse.Namespace, own_ops: Own, device: torch.device) -> tuple[list[Case], dict[str, Any]]:
    """The cases asked for, and whose shapes they have. Raises ValueError, with a sentence, where there is none."""
    on_gpu = device.type == "cuda"
    size: Size = read_size(options.config) if options.config else INTERNLM3_8B if on_gpu else SMALL
    name = options.config or ("InternLM3-8B" if on_gpu else "a small model")
    contexts = options.context or [1024]
    rows = options.rows or ([] if options.chunk else [1] if options.quick else [1, 16])
    chunks = options.chunk or ([] if options.rows or options.quick else [4, 512])
    if options.chunk and max(chunks) > max(contexts):
        raise ValueError(f"--chunk {max(chunks)} is more than the --context {max(contexts)} that holds it")
    dtypes = [DTYPES[name] for name in options.dtype or ["bfloat16"]]
    ops = options.op or [op for op in kernels.__all__ if not own_ops or any(op in found for found in own_ops.values())]
    chosen = [case for case in cases(size, dtypes, rows, chunks, contexts) if case.op in ops]
    if not chosen:
        raise ValueError(f"nothing to time: {', '.join(ops)} is of decode alone; ask for --rows")
    return chosen, {"of": name, **size._asdict()}


def run(options: argparse.Namespace, own_ops: Own, device: torch.device, chosen: list[Case], shapes: Any) -> int:
    """Measure, print and write; the exit code."""
    seed = secrets.randbits(32) if options.seed is None else options.seed
    torch.manual_seed(seed)
    made = {**stamp(), "seed": seed, "shapes": shapes}
    if options.seed is None:
        made["command"] += f" --seed {seed}"
    versions = f"PyTorch {made['torch']}, Triton {made.get('triton')}"
    print(f"{made['device']}, {versions}; shapes of {shapes['of']}; seed {seed}")
    if device.type != "cuda":
        print("no accelerator here: 'reference' is the ops' plain PyTorch, and these figures say nothing of Triton's")
    rounds = options.rounds or (5 if options.quick else 20)
    floor = measure_floor(device, sorted({case.dtype for case in chosen}, key=str), rounds)
    print(floor_line(floor))
    print(HEADER, flush=True)
    done: list[Figure] = []
    interrupted = False
    try:
        for figure in figures(chosen, device, rounds, options.engine or (), own_ops):
            done.append(figure)
            print(line(figure, floor), flush=True)
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted: what was measured is kept")
    outputs(Record(made, floor, done), options)
    wrong = [x for x in done if not x.rounds and x.engine in (*own_ops, ours(device)[0])]
    if wrong:
        print(f"not right, of ours or yours: {len(wrong)} rows; the same inputs again: --seed {seed}")
    return 130 if interrupted else min(len(wrong), 1)


def main(arguments: Sequence[str] | None = None) -> int:
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    parse = parser(ours(device)[0])
    options = parse.parse_args(arguments)
    try:
        if options.plot:
            from . import plots

            plots.check(options.plot)
        if options.compare:
            print("\n".join(compare(*map(load, options.compare))))
            return 0
        if options.read:
            record = load(options.read)
            show(record)
            outputs(record, options)
            return 0
        own_ops = {Path(path).name: own.load(path) for path in options.kernel or ()}
        chosen, shapes = choose(options, own_ops, device)
    except ValueError as error:
        parse.error(str(error))
    if not options.list:
        return run(options, own_ops, device, chosen, shapes)
    for case in chosen:
        names = ", ".join(engines(case, device, options.engine or (), own_ops))
        print(f"{case.op:24}{case.shape:25}{name_of(case.dtype):10}{names}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
