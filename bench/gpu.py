"""Everything that only a GPU can prove or measure, in one script for a bare machine with one.

    python bench/gpu.py --out OUT                       all parts, in order, within 8.5 minutes
    python bench/gpu.py --out OUT --part truth decode   some of them
    python bench/gpu.py --out OUT --small               a dry run of the same code on a CPU, at a toy's shapes

It needs torch, triton, transformers, numpy and pytest; what else is missing is a row that says so. Each part runs in a
process of its own, in a box of time, and its rows are on disk as they come: a part that crashes or outlives its box
costs the others nothing. OUT/gpu.json holds all rows and where, when and with what they were found; a second call with
the same OUT adds its parts to it, or measures them anew. Tables come last; bench/report.py draws them.

Exit code: 0 where every check passed, 1 where one failed or did not finish, 2 for a bad argument, 3 without a GPU.
"""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
SCRIPT = __file__  # what a part's own process runs


class Box(NamedTuple):
    """A part's module, whose `rows(small)` gives its rows, and the seconds that it may take."""

    module: str
    seconds: int


PARTS = {
    "suite": Box("parts.suite", 300),
    "truth": Box("parts.truth", 300),
    "sanitizer": Box("parts.sanitizer", 400),
    "ceilings": Box("parts.ceilings", 90),
    "kernels": Box("parts.kernel_table", 400),
    "decode": Box("parts.decode_times", 300),
    "where": Box("parts.where", 60),
    "prompt": Box("parts.prompt_times", 200),
    "peers": Box("parts.peer_models", 500),
}


def environment(small: bool, link: str) -> dict[str, str]:
    """Of the processes: the checkout can be imported as internlm3, whatever the name of its folder."""
    Path(link, "internlm3").symlink_to(HERE.parent.absolute())
    paths = [link, str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    if small:
        found |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return found


def work(part: str, out: Path, small: bool) -> None:
    """The process of one part."""
    from .rows import append

    for row in importlib.import_module(PARTS[part].module).rows(small):
        append(out / f"{part}.jsonl", row)
        print(row, flush=True)


def run(part: str, out: Path, small: bool, seconds: float, env: dict[str, str]) -> str:
    """Runs one part; why it did not finish, "" where it did."""
    (out / f"{part}.jsonl").unlink(missing_ok=True)
    command = [sys.executable, SCRIPT, "--out", str(out), "--worker", part, *["--small"] * small]
    with (out / f"{part}.log").open("w") as log:
        process = subprocess.Popen(command, stderr=log, env=env, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"outlived its box of {seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with whatever it started
                process.wait()
    if code == 0:
        return ""
    last = (out / f"{part}.log").read_text(errors="replace").strip().splitlines()[-1:]
    return f"ended with {code}: {last[0] if last else 'no word'}"


def parser() -> argparse.ArgumentParser:
    from .options import one_of

    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, required=True, help="a folder for all that is found")
    made.add_argument("--part", nargs="+", type=one_of("part", PARTS), help=f"default: {' '.join(PARTS)}")
    made.add_argument("--minutes", type=float, default=8.5, help="for all parts together; default: 8.5")
    made.add_argument("--small", action="store_true", help="a dry run on a CPU, at a toy's shapes")
    made.add_argument("--worker", choices=PARTS, help=argparse.SUPPRESS)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    parse = parser()
    options = parse.parse_args(arguments)
    out, small = options.out, options.small
    if options.worker:
        work(options.worker, out, small)
        return 0
    if options.minutes <= 0:
        parse.error(f"--minutes {options.minutes:g}: more than none")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parse.error(f"--out {out} can't be made: {error.strerror}")

    from . import record
    import torch
    from .rows import Row, append, read

    if not (small or torch.cuda.is_available()):
        print("no GPU here, and every figure of this script is a GPU's: run it where one is, or dry with --small")
        return 3
    print(f"{record.device_name()}; PyTorch {torch.__version__}{'; a DRY RUN, whose figures mean nothing' * small}")
    deadline = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as link:
        env = environment(small, link)
        for part in options.part or PARTS:
            left = deadline - time.monotonic()
            late = run(part, out, small, min(PARTS[part].seconds, left), env) if left > 0 else "no time was left for it"
            if late:
                row = Row(part, "the part itself", "FAIL" if left > 0 else "not run", late)
                append(out / f"{part}.jsonl", row)
                print(row, flush=True)

    rows = [row for part in PARTS for row in read(out / f"{part}.jsonl")]
    made = {**record.stamp(), "dry run": small}
    (out / "gpu.json").write_text(json.dumps({"stamp": made, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    states = [row.state for row in rows]
    print("; ".join(f"{states.count(state)} {state}" for state in ("pass", "FAIL", "figure", "not run")))
    for row in rows:
        if row.state in ("FAIL", "not run"):
            print(row)
    return int("FAIL" in states or "not run" in [row.state for row in rows if row.name == "the part itself"])


if __name__ == "__main__":
    sys.exit(main())
