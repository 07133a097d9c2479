"""Run kernels that are written in the common form of FlashInfer-Bench and SOL-ExecBench, and write this model's.

    python -m bench.common_form run DEFINITION.json WORKLOADS.jsonl SOLUTION.json --trace OUT.jsonl
    python -m bench.common_form export FOLDER

`run` executes the code of the definition and of the solution: run no files that you don't trust.
"""

import argparse
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ..integrity import Watch
from ..options import output
from . import definition, solution, trace, workload
from .check import Verdict, verdict
from .export import export
from .fields import read_text


def run(
    of: definition.Definition, workloads: str, given: solution.Solution, device: torch.device
) -> tuple[list[str], bool]:
    """Prints a line for each workload; returns the traces, and whether every workload passed."""
    meaning = definition.Reference(of)
    watch = Watch()  # after the reference, so that it notices if the solution replaces it
    traces, passed = [], True
    lines = [(f"{workloads}:{i}", line) for i, line in enumerate(read_text(workloads).splitlines(), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{workloads} has no workloads")

    def each(loaded: solution.Loaded | str) -> None:
        nonlocal passed
        for place, line in lines:
            try:
                work = workload.read(line, place, of)
                if isinstance(loaded, str):
                    found = Verdict("COMPILE_ERROR", loaded)
                else:
                    found = verdict(work, meaning, loaded, device)
            except (ValueError, definition.Unable) as error:
                print(f"{'not run':20}{error}", flush=True)
                passed = False
                continue
            passed &= found.status == "PASSED"
            traces.append(trace.trace(of, work, given, found))
            print(f"{found.status:20}{work.name:30}{_words(found)}", flush=True)

    try:
        with solution.loaded(given, of, watch) as loaded:
            each(loaded)
    except solution.CompileError as error:
        each(str(error))
    return traces, passed


def _words(found: Verdict) -> str:
    if found.times is None:
        return found.log
    own, reference = found.times
    return f"{own:.4g} ms, the reference {reference:.4g} ms"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = made.add_subparsers(dest="command", required=True)
    add = commands.add_parser("run", help="check and time a solution").add_argument
    add("definition", metavar="DEFINITION.json")
    add("workloads", metavar="WORKLOADS.jsonl")
    add("solution", metavar="SOLUTION.json")
    add("--trace", metavar="OUT.jsonl", type=output, help="write a trace for each workload")
    add("--seed", type=int, help="seed of the inputs; default: a new one each time")
    add = commands.add_parser("export", help="write InternLM3-8B's ops").add_argument
    add("folder", type=Path, metavar="FOLDER")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    parse = parser()
    options = parse.parse_args(arguments)
    try:
        if options.command == "export":
            files = export(options.folder)
            print(f"{len(files) // 3} definitions, with workloads and solutions, in {options.folder}")
            return 0
        of = definition.read(options.definition)
        given = solution.read(options.solution, of)
        seed = secrets.randbits(32) if options.seed is None else options.seed
        torch.manual_seed(seed)
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        traces, passed = run(of, options.workloads, given, device)
    except (ValueError, OSError) as error:
        parse.error(str(error))
    if options.trace:
        Path(options.trace).write_text("".join(f"{line}\n" for line in traces), "utf-8")
    if not passed:
        print(f"not every workload passed; run the same inputs again with --seed {seed}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
