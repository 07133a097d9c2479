"""The rate at which honest kernels are refused, over 200 new ones: python -m tests.honest

It must be zero: each refusal is printed with its reason, and the last line has the command that repeats the kernels.
"""

import argparse
import os
import secrets
import sys

import bench  # noqa: F401  makes internlm3 this checkout

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

from internlm3.tests.support.honest_kernels import STYLES, refused

SLOW = {"compiled": 4, "triton_kernels": 12}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.honest", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=secrets.randbits(32), help="default: a new one")
    seed = parser.parse_args().seed
    count, found = 0, []
    for style in STYLES:
        kernels = SLOW.get(style, 21)
        found += refused(style, kernels, f"{style} {seed}")
        count += kernels
        print(f"{style}: {kernels} kernels", flush=True)
    print("\n".join([*found, f"{len(found)} of {count} refused; again: python -m tests.honest --seed {seed}"]))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
