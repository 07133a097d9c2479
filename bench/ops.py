"""Time the ops at a model's shapes, next to their peers and to this machine's limits; check and time your own kernel.

    python -m bench.ops --list                                  ops, shapes and engines; times nothing
    python -m bench.ops --quick                                 batch size 1, five rounds
    python -m bench.ops --op paged_attention --batch 1 4 --context 1024 32768 --dtype float16
    python -m bench.ops --kernel mine.py                        your functions named like ops, next to ours
    python -m bench.ops --json run.json                         a record, for python -m bench.report

On a GPU the engine "triton" is ours. A CUDA graph makes many calls, each on inputs of its own, so that caches keep
little from one replay to the next ("cold"); an op too small for that is "warm". On a CPU the ops are those of the CPU
backend, at a small model's shapes; Triton's are not timed there.

Each engine runs in a process of its own. Its result is compared with kernels.reference before it is timed. An engine
that is wrong, fails, ends its process or is not installed is a row that says so. The columns are explained in
bench/README.md.
"""

import argparse
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from internlm3 import kernels

from . import peers, roofline, tables, user_kernels, verify
from .cases import INTERNLM3_8B, SIZES, SMALL, Case, Size, cases, read_size
from .engines import EngineProcess, UserProcess, answers
from .measure import engines_of, ours, reported_once
from .models import INTERNLM3, title_of
from .options import one_of, output, positive
from .record import Record, Row, stamp
from .timing import name_of
from .workers import serve

DTYPES = {name_of(dtype): dtype for dtype in verify.STEPS}


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
    add("--worker", help=argparse.SUPPRESS)  # the engine of this process
    return made


def size_of(options: argparse.Namespace, device: torch.device) -> tuple[Size, str]:
    """The shapes asked for, and their model's title. Raises ValueError if there are none."""
    if options.config:
        return read_size(options.config), title_of(options.config)
    return (INTERNLM3_8B, title_of(INTERNLM3)) if device.type == "cuda" else (SMALL, "a small model")


def all_cases(options: argparse.Namespace, device: torch.device) -> list[Case]:
    """Every op at the shapes and in the dtypes asked for. Raises ValueError."""
    contexts = options.context or [1024]
    batches = options.batch or ([] if options.chunk else [1] if options.quick else [1, 16])
    chunks = options.chunk or ([] if options.batch or options.quick else [4, 512])
    if options.chunk and max(chunks) > max(contexts):
        raise ValueError(f"--chunk {max(chunks)} is longer than the --context {max(contexts)} that includes it")
    dtypes = [DTYPES[name] for name in options.dtype or ["bfloat16"]]
    return [*cases(size_of(options, device)[0], dtypes, batches, chunks, contexts)]


def choose(options: argparse.Namespace, every: Sequence[Case], users: Sequence[UserProcess]) -> list[Case]:
    """The cases of the ops asked for. Raises ValueError if there are none."""
    ops = options.op or [op for op in kernels.__all__ if not users or any(op in user.ops for user in users)]
    chosen = [case for case in every if case.op in ops]
    if not chosen:
        raise ValueError(f"nothing to time: {', '.join(ops)} runs in decode steps only; pass --batch")
    return chosen


def measured(
    chosen: Sequence[Case], users: Sequence[UserProcess], wanted: Sequence[str], device: torch.device, shared: list[str]
) -> Iterator[Row]:
    """The rows of these cases, by ours and the peers, of those that are wanted, and by the user's files.

    shared: the arguments of every engine's process.
    """
    engines: dict[str, EngineProcess] = {user.name: user for user in users}
    with ExitStack() as stack:
        for case in chosen:
            for name in names_of(case, users, wanted, device):
                if name not in engines:
                    engines[name] = EngineProcess(name, device, shared)
                    stack.callback(engines[name].end)
                yield engines[name].row(case)


def names_of(case: Case, users: Sequence[UserProcess], wanted: Sequence[str], device: torch.device) -> list[str]:
    """The engines that have a row at a case."""
    known = [name for name in engines_of(case, device) if not wanted or name in wanted]
    return known + [user.name for user in users if user.takes(case)]


def run(options: argparse.Namespace, rows: Iterator[Row], device: torch.device, dtypes: set[torch.dtype]) -> int:
    """Measures, prints and writes; returns the exit code."""
    size, title = size_of(options, device)
    made = {**stamp(), "seed": options.seed, "shapes": {"of": title, **size._asdict()}}
    if "--seed" not in made["command"]:
        made["command"] += f" --seed {options.seed}"
    versions = f"PyTorch {made['torch']}, Triton {made.get('triton')}"
    print(f"{made['device']}, {versions}; shapes of {title}; seed {options.seed}")
    if device.type != "cuda":
        print("no GPU here: 'cpu' is the ops' PyTorch backend, and these figures say nothing about Triton's kernels")
    torch.manual_seed(options.seed)
    ceilings = roofline.measure(device, sorted(dtypes, key=str), rounds_of(options))
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the engines have processes of their own
    done = [*ceilings.rows()]
    print(tables.ceilings(done))
    print(tables.OPS_HEADER, flush=True)
    interrupted = False
    try:
        for row in map(ceilings.with_share, reported_once(rows)):
            done.append(row)
            print(tables.op_line(row), flush=True)
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted: the rows so far are kept")
    if options.json:
        Record(made, done).save(options.json)
    wrong = sum(row.state == "FAIL" for row in done)
    if wrong:
        print(f"{wrong} rows of ours or yours are wrong or fail; run the same inputs again with --seed {options.seed}")
    return 130 if interrupted else min(wrong, 1)


def rounds_of(options: argparse.Namespace) -> int:
    return options.rounds or (5 if options.quick else 20)


def answering(options: argparse.Namespace, device: torch.device) -> Callable[[Any], Any]:
    """What the process of the engine `options.worker` answers."""
    return answers(options.worker, all_cases(options, device), device, rounds_of(options), options.seed)


def main(arguments: Sequence[str] | None = None) -> int:
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    parse, shared = parser(ours(device)[0]), [*(sys.argv[1:] if arguments is None else arguments)]
    options = parse.parse_args(shared)
    if options.worker:
        serve(answering(options, device))
        return 0
    if options.seed is None:
        shared += ["--seed", str(secrets.randbits(32))]
        options = parse.parse_args(shared)
    with ExitStack() as stack:
        users: list[UserProcess] = []
        try:
            every = all_cases(options, device)
            for path in options.kernel or ():
                users.append(UserProcess(path, device, shared))
                stack.callback(users[-1].end)
                user_kernels.check_ops(path, users[-1].ops, options.op or ())
            names = [user.name for user in users]
            if len({*names}) < len(names):
                raise ValueError(f"--kernel: two files have one name, and so would their rows: {', '.join(names)}")
            chosen = choose(options, every, users)
        except ValueError as error:
            parse.error(str(error))
        if not options.list:
            rows = measured(chosen, users, options.engine or (), device, shared)
            return run(options, rows, device, {case.dtype for case in chosen})
        for case in chosen:
            engines = ", ".join(names_of(case, users, options.engine or (), device))
            print(tables.columns(case.op, case.shape, name_of(case.dtype)) + engines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
