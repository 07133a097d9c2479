"""New random cases until one fails: make fuzz ARGS="--op linear --dtype bfloat16 --minutes 5"

A round runs every random test once with a new seed, or only those of the ops and dtypes asked for; without `--op` this
includes the tests of the tokenizer, of text and of sampling settings. `--kernel` tests the functions of a user's file
instead of ours. After a failure, the last line is the command that repeats the round.
"""

import argparse
import os
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench import ROOT, user_kernels
from bench.options import one_of, positive
from internlm3 import kernels

DTYPES = ("bfloat16", "float16", "float32")


def run(
    ops: Sequence[str], dtypes: Sequence[str], seed: int, kernel: str | None = None, ignored: Sequence[str] = ()
) -> int:
    """One round; pytest's exit code."""
    chosen = "hypothesis" + (" and (" + " or ".join(f'op(name="{op}")' for op in ops) + ")" if ops else "")
    command = [
        *(str(Path(sys.executable).with_name("pytest")), "-q", "--no-header", "-x", "-n", "2", "--dist", "worksteal"),
        *("-m", chosen, "--hypothesis-profile", "fuzz", "--hypothesis-seed", str(seed)),
        *(["tests/kernels"] if ops else []),
        *([f"--ignore={path}" for path in ignored]),
    ]
    variables = {"INTERNLM3_DTYPES": ",".join(dtypes), **({"INTERNLM3_KERNEL": kernel} if kernel else {})}
    return subprocess.run(command, cwd=ROOT, env=os.environ | variables).returncode


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--op", action="append", type=one_of("op", kernels.__all__), help="default: all, and the tests of no op"
    )
    parser.add_argument(
        "--dtype", action="append", type=one_of("dtype", DTYPES), help="for the tests of ops; default: all"
    )
    parser.add_argument("--kernel", metavar="FILE.py", help="test the functions of this file that are named like ops")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--rounds", type=positive, default=1, help="default: 1")
    length.add_argument("--minutes", type=float, default=0, help="start new rounds for this long")
    length.add_argument("--seed", type=int, help="run one round with this seed")
    options = parser.parse_args()

    ignored = []
    if options.kernel:
        options.kernel = os.path.abspath(options.kernel)
        try:
            file = user_kernels.load(options.kernel)
            for op in options.op or ():
                user_kernels.check_ops(options.kernel, [*file.ops], [op])
        except ValueError as error:
            parser.error(str(error))
        options.op = options.op or [*file.ops]
        if not file.quantised:
            ignored.append("tests/kernels/test_linear_quantised.py")

    end, rounds = time.monotonic() + 60 * options.minutes, 0
    while rounds < options.rounds or time.monotonic() < end:
        seed = secrets.randbits(32) if options.seed is None else options.seed
        print(f"round {rounds + 1}, seed {seed}", flush=True)
        if run(options.op or (), options.dtype or DTYPES, seed, options.kernel, ignored):
            words = [f"--op {op}" for op in options.op or ()] + [f"--dtype {dtype}" for dtype in options.dtype or ()]
            words += [f"--kernel {shlex.quote(options.kernel)}"] if options.kernel else []
            print(f'again: make fuzz ARGS="{" ".join([*words, f"--seed {seed}"])}"')
            return 1
        rounds += 1
    print(f"{rounds} rounds, no failure")
    return 0


if __name__ == "__main__":
    sys.exit(main())
