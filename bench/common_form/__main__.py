"""Run kernels that are written in the common form of FlashInfer-Bench and SOL-ExecBench, and write this model's.

    python -m bench.common_form run DEFINITION.json WORKLOADS.jsonl SOLUTION.json --trace OUT.jsonl
    python -m bench.common_form export FOLDER

`run` executes the code of the definition and of the solution, in a process of its own: run no files that you don't
trust.
"""

import argparse
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..integrity import Watch
from ..options import output
from ..workers import Ended, Restarted, Worker, serve
from . import definition, solution, trace, workload
from .check import Verdict, verdict
from .export import export
from .fields import read_text


def run(
    of: definition.Definition, workloads: str, given: solution.Solution, arguments: Sequence[str]
) -> tuple[list[str], bool]:
    """Prints a line for each workload; returns the traces, and whether every workload passed.

    The code of the files runs in a process of its own, which has these arguments.
    """
    traces, passed = [], True
    lines = [(f"{workloads}:{i}", line) for i, line in enumerate(read_text(workloads).splitlines(), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{workloads} has no workloads")
    process = Restarted(partial(Worker, "bench.common_form", *arguments, "--worker"))
    try:
        bad = _loads(process)
        for place, line in lines:
            try:
                work = workload.read(line, place, of)
                found = bad or _asked(process, place, line)
            except (ValueError, definition.Unable) as error:
                print(f"{'not run':20}{error}", flush=True)
                passed = False
                continue
            passed &= found.status == "PASSED"
            traces.append(trace.trace(of, work, given, found))
            print(f"{found.status:20}{work.name:30}{_words(found)}", flush=True)
    finally:
        process.end()
    return traces, passed


def _loads(process: Restarted) -> Verdict | None:
    """The verdict on a solution whose files can't be loaded. Raises ValueError if one of the other files is wrong."""
    try:
        answer = process.ask(None)
    except Ended as ended:
        return Verdict("COMPILE_ERROR", f"it ends the process when it is loaded, {ended.how}")
    if "error" in answer:
        raise ValueError(answer["error"])
    return Verdict(*answer["verdict"]) if "verdict" in answer else None


def _asked(process: Restarted, place: str, line: str) -> Verdict:
    try:
        answer = process.ask((place, line))
    except Ended as ended:
        return Verdict("RUNTIME_ERROR", f"it ended its process, {ended.how}")
    if "unable" in answer:
        raise definition.Unable(answer["unable"])
    return Verdict(*answer["verdict"])


@contextmanager
def answering(options: argparse.Namespace) -> Iterator[Callable[[Any], dict[str, Any]]]:
    """What the process answers: to a workload's place and line its verdict, to None whether the files can be loaded.

    The inputs of a workload depend on the seed alone, not on the workloads before it.
    """
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    of = definition.read(options.definition)
    given = solution.read(options.solution, of)
    with ExitStack() as stack:
        found: dict[str, Any] = {}
        try:
            meaning = definition.Reference(of)
            watch = Watch()  # after the reference, so that it notices if the solution replaces it
            loaded = stack.enter_context(solution.loaded(given, of, watch))
        except solution.CompileError as error:
            found = {"verdict": Verdict("COMPILE_ERROR", str(error))}
        except ValueError as error:
            found = {"error": str(error)}

        def answer(question: Any) -> dict[str, Any]:
            if question is None:
                return found
            place, line = question
            torch.manual_seed(options.seed)
            try:
                return {"verdict": verdict(workload.read(line, place, of), meaning, loaded, device)}
            except definition.Unable as error:
                return {"unable": str(error)}

        yield answer


def _words(found: Verdict) -> str:
    if found.times is None:
        return found.log
    own, reference = found.times
    return f"{own:.4g} ms, the reference {reference:.4g} ms"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m bench.common_form",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = made.add_subparsers(dest="command", required=True)
    add = commands.add_parser("run", help="check and time a solution").add_argument
    add("definition", metavar="DEFINITION.json")
    add("workloads", metavar="WORKLOADS.jsonl")
    add("solution", metavar="SOLUTION.json")
    add("--trace", metavar="OUT.jsonl", type=output, help="write a trace for each workload")
    add("--seed", type=int, help="seed of the inputs; default: a new one each time")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    add = commands.add_parser("export", help="write InternLM3-8B's ops").add_argument
    add("folder", type=Path, metavar="FOLDER")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    parse, given = parser(), [*(sys.argv[1:] if arguments is None else arguments)]
    options = parse.parse_args(given)
    try:
        if options.command == "export":
            files = export(options.folder)
            print(f"{len(files) // 3} definitions, with workloads and solutions, in {options.folder}")
            return 0
        if options.worker:
            with answering(options) as answer:
                serve(answer)
            return 0
        if options.seed is None:
            given += ["--seed", str(secrets.randbits(32))]
            options = parse.parse_args(given)
        of = definition.read(options.definition)
        traces, passed = run(of, options.workloads, solution.read(options.solution, of), given)
    except (ValueError, OSError) as error:
        parse.error(str(error))
    if options.trace:
        Path(options.trace).write_text("".join(f"{line}\n" for line in traces), "utf-8")
    if not passed:
        print(f"not every workload passed; run the same inputs again with --seed {options.seed}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
