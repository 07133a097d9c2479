"""The CPU time of an op's Python code before Triton gets the launch: checks, allocations, arguments. Needs no GPU.

    python -m bench.launch_overhead [--calls 2000]

The ops run at a small model's shapes, with every launch replaced by a no-op, so Triton's own overhead is not included.
Printed are microseconds of process time per call, the minimum of five rounds.
"""

import argparse
import os
import time
from collections.abc import Sequence
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"  # interpreted kernels need no GPU

import torch
from triton.runtime.interpreter import InterpretedFunction

from internlm3 import kernels

from .cases import SMALL, cases


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000, help="per round")
    calls = parser.parse_args(arguments).calls
    launches = 0

    def launched(*_args: object, **_options: object) -> None:
        nonlocal launches
        launches += 1

    print(f"{'op':25}{'shape':24}{'us/call':>10}{'launches':>10}{'us/launch':>13}")
    with mock.patch.object(InterpretedFunction, "__getitem__", lambda _kernel, _grid: launched):
        for case in cases(SMALL):
            op, inputs = getattr(kernels, case.op), case.arguments(torch.device("cpu"))
            launches = 0
            op(**inputs)
            each, rounds = launches, []
            for _ in range(5):
                begun = time.process_time()
                for _ in range(calls):
                    op(**inputs)
                rounds.append((time.process_time() - begun) / calls * 1e6)
            least = min(rounds)
            print(f"{case.op:25}{case.shape:24}{least:10.1f}{each:10}{least / each if each else 0:13.1f}")


if __name__ == "__main__":
    main()
