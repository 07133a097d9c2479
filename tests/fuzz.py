"""Random cases that nobody has tried yet, until one fails: `make fuzz ARGS="--op linear --dtype bfloat16 --minutes 5"`.

A round is every random test once, with a new seed, or those of the ops and dtypes asked for; without `--op` those of
tokenizer, text and sampling settings are among them. With `--kernel` the functions of somebody's file stand for ours.
The last line of a failure is the command that repeats its round.
"""

import argparse
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from internlm3 import kernels

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "bench"))
import own  # noqa: E402
from options import one_of, positive  # noqa: E402

DTYPES = ("bfloat16", "float16", "float32")


def run(ops: Sequence[str], dtypes: Sequence[str], seed: int, kernel: str | None = None) -> int:
    """One round; pytest's exit code."""
    chosen = "hypothesis" + (" and (" + " or ".join(f'op(name="{op}")' for op in ops) + ")" if ops else "")
    command = [
        *(Path(sys.executable).with_name("pytest"), "-q", "--no-header", "-x", "-n", "2", "--dist", "worksteal"),
        *("-m", chosen, "--hypothesis-profile", "fuzz", "--hypothesis-seed", str(seed)),
    ]
    chosen_here = {"INTERNLM3_DTYPES": ",".join(dtypes), **({"INTERNLM3_KERNEL": kernel} if kernel else {})}
    return subprocess.run(command, cwd=ROOT, env=os.environ | chosen_here).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", type=one_of("op", kernels.__all__), help="default: all, and no op's")
    parser.add_argument("--dtype", action="append", type=one_of("dtype", DTYPES), help="of ops' tests; default: all")
    parser.add_argument("--kernel", metavar="FILE.py", help="the cases of the ops for which this file has a function")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--rounds", type=positive, default=1, help="default: 1")
    length.add_argument("--minutes", type=float, default=0, help="new rounds begin for so long")
    length.add_argument("--seed", type=int, help="the round of this seed again")
    options = parser.parse_args()

    if options.kernel:
        options.kernel = os.path.abspath(options.kernel)
        try:
            options.op = options.op or [*own.load(options.kernel)]
        except ValueError as error:
            parser.error(str(error))

    end, rounds = time.monotonic() + 60 * options.minutes, 0
    while rounds < options.rounds or time.monotonic() < end:
        seed = secrets.randbits(32) if options.seed is None else options.seed
        print(f"round {rounds + 1}, seed {seed}", flush=True)
        if run(options.op or (), options.dtype or DTYPES, seed, options.kernel):
            words = [f"--op {op}" for op in options.op or ()] + [f"--dtype {dtype}" for dtype in options.dtype or ()]
            words += [f"--kernel {options.kernel}"] if options.kernel else []
            print(f'again: make fuzz ARGS="{" ".join([*words, f"--seed {seed}"])}"')
            return 1
        rounds += 1
    print(f"{rounds} rounds, nothing found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
