"""Everything that only a GPU can prove or measure, in one program for a bare machine that has one.

    python -m bench.gpu --out OUT                           all parts, in order, within 8.5 minutes
    python -m bench.gpu --out OUT --part correctness decode some of them
    python -m bench.gpu --out OUT --part trial              variants of kernels: see bench/trial; only if it is named
    python -m bench.gpu --out OUT --model qwen3-8b          the shapes of a model whose figures others have published
    python -m bench.gpu --out OUT --small                   a dry run of the same code on a CPU, at a toy model's shapes

It needs torch, triton, transformers, numpy and pytest. Anything else that is missing is a row that says so. Each part
runs in its own process with a time limit and writes its rows as it finds them, so a part that crashes or runs too long
costs the others nothing. OUT/gpu.json is the record of all rows; a second run with the same OUT adds its parts or
replaces them. `python -m bench.report` makes tables and plots of it. A dry run has no time limits. All shares of a
record are of its one set of ceilings, which the first run of a part with shares measures before anything else.

A record is of one machine and one model. Weights are random; Qwen3-8B is without its norms of each head's q and k. The
parts that no model's shapes change run by default for InternLM3-8B only.

Exit code: 0 if every check passed, 1 if one failed or a part did not finish, 2 for a bad argument, 3 without a GPU.
"""

import argparse
import importlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from . import ROOT
from .data_sheets import with_rates
from .models import INTERNLM3, MODELS, shapes, shapes_of, title_of
from .options import one_of
from .record import Record, Row, append, device_name, load, read_rows, stamp

if TYPE_CHECKING:
    from .roofline import Roofline

COMMAND = [sys.executable, "-m", "bench.gpu"]  # starts the process of a part


class Limit(NamedTuple):
    """A part's module, whose `rows` yields its rows, and its time limit."""

    module: str
    seconds: int
    shares: bool = False  # its rows have shares of the ceilings
    of_model: bool = False  # its rows are of the shapes of a model, whose name `rows` takes
    by_default: bool = True  # False: it runs only if it is named


PARTS = {
    "suite": Limit("bench.parts.suite", 300),
    "correctness": Limit("bench.parts.correctness", 300, of_model=True),
    "sanitizer": Limit("bench.parts.sanitizer", 400),
    "ceilings": Limit("bench.parts.ceilings", 90),
    "ops": Limit("bench.parts.ops", 400, shares=True, of_model=True),
    "decode": Limit("bench.parts.decode", 300, shares=True, of_model=True),
    "quantised": Limit("bench.parts.quantised", 120, shares=True, of_model=True),
    "launch_profile": Limit("bench.parts.launch_profile", 60, shares=True, of_model=True),
    "first_token": Limit("bench.parts.first_token", 200, shares=True, of_model=True),
    "speculation": Limit("bench.parts.speculation", 150, of_model=True),
    "peers": Limit("bench.parts.peer_models", 500, shares=True, of_model=True),
    "trial": Limit("bench.parts.trial", 350, by_default=False),
}


def default_parts(model: str = INTERNLM3) -> list[str]:
    return [part for part, limit in PARTS.items() if limit.by_default and (limit.of_model or model == INTERNLM3)]


def work(part: str, out: Path, small: bool, model: str = INTERNLM3) -> None:
    """Runs in the process of one part."""
    rows = importlib.import_module(PARTS[part].module).rows
    for row in with_shares(out, rows(small, model) if PARTS[part].of_model else rows(small)):
        append(out / f"{part}.jsonl", row)
        print(row, flush=True)


def ceilings_of(out: Path) -> "Roofline | None":
    rows = [*read_rows(out / "ceilings.jsonl")]
    if not rows:
        return None
    from .roofline import Roofline

    return Roofline.of(rows)


def with_shares(out: Path, rows: Iterable[Row]) -> Iterator[Row]:
    """The rows as they come, with their shares of the ceilings in `out`, if it has any, and decode steps' rates."""
    ceilings = ceilings_of(out)
    for row in rows:
        if "bytes" in row.about:  # other rows have neither, and a process without any need not import torch
            row = with_rates(ceilings.with_share(row) if ceilings else row, device_name())
        yield row


def in_order(parts: Iterable[str], out: Path) -> list[str]:
    """The parts, after that of the ceilings if it is one of them, or if one needs it and `out` has none."""
    parts = [*parts]
    needed = any(PARTS[part].shares for part in parts) and not ceilings_of(out)
    return [*dict.fromkeys(["ceilings"] * (needed or "ceilings" in parts) + parts)]


def run(part: str, out: Path, small: bool, model: str, seconds: float | None) -> str:
    """Runs one part in a process. Returns why it did not finish, or ""."""
    (out / f"{part}.jsonl").unlink(missing_ok=True)
    command = [*COMMAND, "--out", str(out.absolute()), "--worker", part, "--model", model, *["--small"] * small]
    dry = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if small else {}
    with (out / f"{part}.log").open("w") as log:
        process = subprocess.Popen(command, stderr=log, env=os.environ | dry, cwd=ROOT, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"exceeded its limit of {seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with every process that it started
                process.wait()
    if code == 0:
        return ""
    last = (out / f"{part}.log").read_text(errors="replace").strip().splitlines()[-1:]
    return f"exit code {code}: {last[0] if last else 'no output'}"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--out", type=Path, required=True, help="the folder for all results")
    made.add_argument("--part", nargs="+", type=one_of("part", PARTS), help=f"default: {' '.join(default_parts())}")
    made.add_argument("--model", type=one_of("model", MODELS), default=INTERNLM3, help=f"{', '.join(MODELS)}")
    made.add_argument("--minutes", type=float, help="for all parts together; default: 8.5, in a dry run no limit")
    made.add_argument("--small", action="store_true", help="a dry run on a CPU, at a toy model's shapes")
    made.add_argument("--worker", choices=PARTS, help=argparse.SUPPRESS)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    parse = parser()
    options = parse.parse_args(arguments)
    out, small, model = options.out, options.small, options.model
    if options.worker:
        work(options.worker, out, small, model)
        return 0
    if model != INTERNLM3 and "trial" in (options.part or ()):
        parse.error(f"the part trial is of {INTERNLM3} only: leave --model {model} out")
    minutes = options.minutes if options.minutes is not None else math.inf if small else 8.5
    if minutes <= 0:
        parse.error(f"--minutes {minutes:g} must be positive")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parse.error(f"--out {out} can't be created: {error.strerror}")

    import torch

    if not (small or torch.cuda.is_available()):
        print("no GPU found: run this on a machine with one, or as a dry run with --small")
        return 3
    dry = "; a DRY RUN: its figures mean nothing" * small
    print(f"{device_name()}; PyTorch {torch.__version__}; shapes of {title_of(model)}{dry}")
    try:
        earlier = load(out / "gpu.json").stamp if (out / "gpu.json").exists() else None
    except ValueError as error:
        parse.error(str(error))
    made = {**stamp(), "dry run": small, "shapes": shapes(model)}
    if earlier and any(earlier.get(key) != made[key] for key in ("device", "dry run")):
        of = f"{'a dry run on ' * bool(earlier.get('dry run'))}{earlier.get('device')}"
        parse.error(f"--out {out} has the record of {of}: name another folder, a record is of one machine")
    if earlier and shapes_of(earlier) != made["shapes"]:
        of = shapes_of(earlier)["of"]
        parse.error(f"--out {out} has the record of {of}: name another folder, a record is of one model")
    deadline = time.monotonic() + 60 * minutes
    for part in in_order(options.part or default_parts(model), out):
        left = deadline - time.monotonic()
        limit = None if small else min(PARTS[part].seconds, left)
        reason = run(part, out, small, model, limit) if left > 0 else "no time was left for it"
        if reason:
            row = Row(part, "the part itself", "FAIL" if left > 0 else "not run", reason)
            append(out / f"{part}.jsonl", row)
            print(row, flush=True)

    rows = [*with_shares(out, (row for part in PARTS for row in read_rows(out / f"{part}.jsonl")))]
    Record(made, rows).save(out / "gpu.json")
    states = [row.state for row in rows]
    print("; ".join(f"{states.count(state)} {state}" for state in ("pass", "FAIL", "figure", "not run")))
    for row in rows:
        if row.state in ("FAIL", "not run"):
            print(row)
    return int("FAIL" in states or "not run" in [row.state for row in rows if row.name == "the part itself"])


if __name__ == "__main__":
    sys.exit(main())
