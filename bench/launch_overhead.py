"""What the host does for an op before Triton has it: checks, allocations, arguments. On any machine, in CPU time.

    python bench/host.py [--calls 2000]

The ops run at a small model's shapes with every launch replaced by nothing, so Triton's own part is not in the figures:
microseconds of process time a call, the least of five rounds.
"""

import argparse
import os
import time
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"  # a kernel is then an object that needs no GPU, even to be replaced

import torch
from .cases import Size, cases
from internlm3 import kernels
from triton.runtime.interpreter import InterpretedFunction

SMALL = Size(hidden=512, intermediate=1280, vocabulary=4096, heads=8, kv_heads=2, head_dim=64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000, help="in a round")
    calls = parser.parse_args().calls
    launches = 0

    def launched(*_args: object, **_options: object) -> None:
        nonlocal launches
        launches += 1

    print(f"{'op':25}{'shape':18}{'us a call':>10}{'launches':>10}{'us a launch':>13}")
    with mock.patch.object(InterpretedFunction, "__getitem__", lambda _kernel, _grid: launched):
        for case in cases(SMALL):
            op, arguments = getattr(kernels, case.op), case.arguments(torch.device("cpu"))
            launches = 0
            op(**arguments)
            each, rounds = launches, []
            for _ in range(5):
                begun = time.process_time()
                for _ in range(calls):
                    op(**arguments)
                rounds.append((time.process_time() - begun) / calls * 1e6)
            print(f"{case.op:25}{case.shape:18}{min(rounds):10.1f}{each:10}{min(rounds) / each:13.1f}")


if __name__ == "__main__":
    main()
