"""Time the ops at a model's shapes, next to their peers and to this machine's limits; check and time your own kernel.

    python -m bench.ops --list                                  ops, shapes and engines; times nothing
    python -m bench.ops --quick                                 batch size 1, five rounds
    python -m bench.ops --op paged_attention --batch 1 4 --context 1024 32768 --dtype float16
    python -m bench.ops --kernel mine.py                        your functions named like ops, next to ours
    python -m bench.ops --json run.json                         a record, for python -m bench.report

On a GPU the engine "triton" is ours. A CUDA graph makes many calls, each on inputs of its own, so that caches keep
little from one replay to the next ("cold"); an op too small for that is "warm". On a CPU the ops are those of the CPU
backend, at a small model's shapes; Triton's are not timed there.

Each engine's result is compared with kernels.reference before it is timed. An engine that is wrong, fails or is not
installed is a row that says so. The columns are explained in bench/README.md.
"""

import argparse
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from internlm3 import kernels

from . import peers, roofline, strict, tables, user_kernels, verify
from .cases import DENSE, INTERNLM3_8B, SIZES, SMALL, Arguments, Case, Size, cases, read_size
from .integrity import Watch
from .models import INTERNLM3, title_of
from .options import one_of, output, positive
from .record import Part, Record, Row, first_line, stamp
from .timing import FLOOR, Call, cold_calls, name_of, replayed, rounds_of

DTYPES = {name_of(dtype): dtype for dtype in verify.STEPS}
PART = Part("ops")
Make = Callable[[str, Arguments], Call]  # from an op's name and arguments, its call
UserOps = dict[str, user_kernels.UserFile]  # by the file's name


def ours(device: torch.device) -> tuple[str, Make]:
    """The name of our engine on a device, and what makes its calls."""
    backend = kernels.for_device(device)
    name = "triton" if device.type == "cuda" else "cpu"
    return name, lambda op, arguments: partial(getattr(backend, op), **arguments)


def engines(case: Case, device: torch.device, wanted: Sequence[str], user_ops: UserOps) -> dict[str, Make]:
    """The engines that implement a case's op: ours, then peers, then the user's files."""
    name, make = ours(device)
    found = {name: make} if not wanted or name in wanted else {}
    for peer, about in peers.PEERS.items():
        if about.takes(case) and (not wanted or peer in wanted):
            found[peer] = partial(peers.make, peer, device=device)
    for name, file in user_ops.items():
        if case.op in file.ops and (case.stored == DENSE or user_kernels.takes_quantised(file.ops[case.op])):
            found[name] = partial(_user_call, file.ops)
    return found


def _user_call(ops: dict[str, Callable[..., Any]], op: str, arguments: Arguments) -> Call:
    return partial(ops[op], **arguments)


def reason_of(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    if text and "active drivers" in text[0]:
        return "Triton finds no GPU: TRITON_INTERPRET=1 checks a kernel without one, and times the interpreter"
    return text[0] if isinstance(error, peers.Unfit) else first_line(error)


class Prepared(NamedTuple):
    """Calls of one case by one engine, each on inputs of its own; on a GPU in one CUDA graph."""

    whole: Call
    calls: int  # made by `whole`
    bytes: int  # of one call
    flops: int  # of one call
    cold: bool
    kept: Sequence[
        strict.Kept
    ] = ()  # the calls, if the results that they return while they are timed are to be checked

    def rounds(self) -> Iterator[float]:
        """Microseconds of one call, round after round without end."""
        return rounds_of(self.whole, self.calls)


def prepare(case: Case, make: Make, device: torch.device, keep: bool = False) -> Prepared:
    """keep: each call keeps its arguments and its newest results, for `strict.checked_rounds`."""
    kept: list[strict.Kept] = []

    def new(arguments: Arguments) -> Call:
        call = make(case.op, arguments)
        if not keep:
            return call
        kept.append(strict.Kept(call, arguments))
        return kept[-1]

    arguments = case.arguments(device)
    size, flops = 0, roofline.flops(case.op, arguments)
    first = new(arguments)
    result = first()
    size = roofline.bytes_moved(case.op, arguments, kept[0].results if keep else result)
    if device.type != "cuda":
        return Prepared(first, 1, size, flops, False, kept)
    calls, cold = cold_calls(device, size, roofline.nbytes(*arguments.values()))
    made = [first, *(new(case.arguments(device)) for _ in range(calls - 1))]
    return Prepared(replayed(made), calls, size, flops, cold, kept)


def measure(
    case: Case, engine: str, make: Make, device: torch.device, rounds: int, watching: strict.Watching | None = None
) -> Row:
    """The row of an engine: its times; or a note if it is not installed, fails, or computes something else.

    watching: of a user's file, whose kernels are checked strictly.
    """
    dtype = name_of(case.dtype)
    name = f"{case.op}, {case.shape}, {dtype}, {engine}"
    described = {"op": case.op, "shape": case.shape, "dtype": dtype, "tokens": case.tokens, "context": case.context}
    described["engine"] = engine

    def failed(note: str) -> Row:
        if watching or engine == ours(device)[0]:
            return PART.check(name, note, **described)
        return PART.missing(name, note, **described)

    def result(given: Arguments) -> Any:
        return make(case.op, given)()

    draw = partial(case.arguments, device)
    try:
        with peers.time_limit(peers.SECONDS):
            if watching:
                error = strict.error_of(case.op, draw, result, watching)
            else:
                error = verify.error_of(case.op, draw(), result)
            if error:
                return failed(f"WRONG, not timed: {error}")
            prepared = prepare(case, make, device, keep=watching is not None)
        if watching:
            times = [*strict.checked_rounds(case.op, prepared.rounds(), rounds, prepared.kept, draw, watching)]
        else:
            times = [*islice(prepared.rounds(), rounds)]
    except strict.Refused as refused:
        return failed(f"REFUSED: {refused}")
    except Exception as error:  # whatever a peer or a user's kernel raises belongs in its row
        return failed(f"not timed: {reason_of(error)}")
    if min(times) < FLOOR:
        return failed(f"REFUSED: a round took {min(times):.3g} us per call, and no call takes less than {FLOOR} us")
    return timed(name, times, prepared, described)


def timed(name: str, times: list[float], prepared: Prepared, described: dict[str, Any]) -> Row:
    """A measured row; `about` gets what follows from the times."""
    row = PART.figure(name, times, "us", **described, bytes=prepared.bytes, flops=prepared.flops, cold=prepared.cold)
    row.about["GB/s"] = prepared.bytes / row.value / 1e3
    row.about["TFLOP/s"] = prepared.flops / row.value / 1e6
    return row


def measured(
    chosen: Sequence[Case],
    device: torch.device,
    rounds: int,
    wanted: Sequence[str] = (),
    user_ops: UserOps | None = None,
) -> Iterator[Row]:
    """The rows of these cases, each as soon as it is measured. Why a peer is missing is reported once per op."""
    user_ops = user_ops or {}
    reported = set()
    for case in chosen:
        for engine, make in engines(case, device, wanted, user_ops).items():
            watching = user_ops[engine].watching if engine in user_ops else None
            row = measure(case, engine, make, device, rounds, watching)
            if row.rounds or (case.op, engine, row.note) not in reported:
                reported.add((case.op, engine, row.note))
                yield row
            if device.type == "cuda" and not row.rounds and not _gpu_works():
                print("the GPU failed during that row and no longer responds: earlier rows are kept")
                return


def _gpu_works() -> bool:
    """False after an illegal memory access, which no later call of this process survives."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def parser(our_name: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = made.add_argument
    add("--op", nargs="+", type=one_of("op", kernels.__all__), help="default: all, or those of --kernel")
    add("--batch", nargs="+", type=positive, help="batch sizes of a decode step; default: 1 16")
    add("--chunk", nargs="+", type=positive, help="numbers of tokens of a prompt's chunk; default: 4 512")
    add("--context", nargs="+", type=positive, help="context lengths; default: 1024")
    add("--dtype", nargs="+", type=one_of("dtype", list(DTYPES)), help="default: bfloat16")
    add("--engine", nargs="+", type=one_of("engine", [our_name, *peers.PEERS]), help="default: all that have the op")
    add("--config", metavar="PATH", help=f"a checkpoint's folder or config.json, for its shapes; or {', '.join(SIZES)}")
    add("--kernel", metavar="FILE.py", nargs="+", help="functions named like ops, checked and timed next to ours")
    add("--rounds", type=positive, help="default: 20")
    add("--seed", type=int, help="seed of the inputs; default: a new one each time")
    add("--quick", action="store_true", help="batch size 1 and five rounds, unless set otherwise")
    add("--list", action="store_true", help="show what would be timed")
    add("--json", metavar="OUT", type=output, help="write the record: every round, the machine and the versions")
    return made


def choose(options: argparse.Namespace, user_ops: UserOps, device: torch.device) -> tuple[list[Case], dict[str, Any]]:
    """The cases asked for, and the shapes that they have. Raises ValueError if there are none."""
    on_gpu = device.type == "cuda"
    size: Size = read_size(options.config) if options.config else INTERNLM3_8B if on_gpu else SMALL
    name = title_of(options.config or INTERNLM3 if on_gpu or options.config else "a small model")
    contexts = options.context or [1024]
    batches = options.batch or ([] if options.chunk else [1] if options.quick else [1, 16])
    chunks = options.chunk or ([] if options.batch or options.quick else [4, 512])
    if options.chunk and max(chunks) > max(contexts):
        raise ValueError(f"--chunk {max(chunks)} is longer than the --context {max(contexts)} that includes it")
    dtypes = [DTYPES[name] for name in options.dtype or ["bfloat16"]]
    users = {op for file in user_ops.values() for op in file.ops}
    ops = options.op or [op for op in kernels.__all__ if not users or op in users]
    chosen = [case for case in cases(size, dtypes, batches, chunks, contexts) if case.op in ops]
    if not chosen:
        raise ValueError(f"nothing to time: {', '.join(ops)} runs in decode steps only; pass --batch")
    return chosen, {"of": name, **size._asdict()}


def run(options: argparse.Namespace, user_ops: UserOps, device: torch.device, chosen: list[Case], shapes: Any) -> int:
    """Measures, prints and writes; returns the exit code."""
    seed = secrets.randbits(32) if options.seed is None else options.seed
    torch.manual_seed(seed)
    made = {**stamp(), "seed": seed, "shapes": shapes}
    if options.seed is None:
        made["command"] += f" --seed {seed}"
    versions = f"PyTorch {made['torch']}, Triton {made.get('triton')}"
    print(f"{made['device']}, {versions}; shapes of {shapes['of']}; seed {seed}")
    if device.type != "cuda":
        print("no GPU here: 'cpu' is the ops' PyTorch backend, and these figures say nothing about Triton's kernels")
    rounds = options.rounds or (5 if options.quick else 20)
    ceilings = roofline.measure(device, sorted({case.dtype for case in chosen}, key=str), rounds)
    done = [*ceilings.rows()]
    print(tables.ceilings(done))
    print(tables.OPS_HEADER, flush=True)
    interrupted = False
    try:
        for row in map(ceilings.with_share, measured(chosen, device, rounds, options.engine or (), user_ops)):
            done.append(row)
            print(tables.op_line(row), flush=True)
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted: the rows so far are kept")
    if options.json:
        Record(made, done).save(options.json)
    wrong = sum(row.state == "FAIL" for row in done)
    if wrong:
        print(f"{wrong} rows of ours or yours are wrong or fail; run the same inputs again with --seed {seed}")
    return 130 if interrupted else min(wrong, 1)


def main(arguments: Sequence[str] | None = None) -> int:
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    parse = parser(ours(device)[0])
    options = parse.parse_args(arguments)
    try:
        watch = Watch() if options.kernel else None
        user_ops = {Path(path).name: user_kernels.watched(path, watch) for path in options.kernel or () if watch}
        chosen, shapes = choose(options, user_ops, device)
    except ValueError as error:
        parse.error(str(error))
    if not options.list:
        return run(options, user_ops, device, chosen, shapes)
    for case in chosen:
        names = ", ".join(engines(case, device, options.engine or (), user_ops))
        print(f"{case.op:24}{case.shape:29}{name_of(case.dtype):10}{names}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
