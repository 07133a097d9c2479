"""compute-sanitizer over every op at small shapes: its four tools, each over the same launches.

Run with a dtype, this module makes the launches that the tools watch.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

from .. import ROOT
from ..record import Part, Row

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND = 9  # exit code of a tool that has found something


def rows(small: bool) -> Iterator[Row]:
    part = Part("sanitizer")
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    launches = [sys.executable, "-m", __name__, "float16" if small else "bfloat16"]
    # Each tensor gets memory of its own, so that an access beyond it is noticed.
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(launches, capture_output=True, text=True, env=env, cwd=ROOT)
    yield part.check("the launches without a tool", done.stderr.strip()[-300:] if done.returncode else "")
    for tool in TOOLS:
        if small or not sanitizer:
            yield part.missing(tool, "compute-sanitizer is not installed" if not sanitizer else "needs a GPU")
            continue
        options = ["--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "3"]
        done = subprocess.run([sanitizer, *options, *launches], capture_output=True, text=True, env=env, cwd=ROOT)
        lines = [line.lstrip("= ") for line in done.stdout.splitlines() if line.startswith("=========")]
        yield part.check(tool, " / ".join(lines[1:6]) or f"exit code {done.returncode}" if done.returncode else "")


def launch(dtype: str) -> None:
    """Runs every op once at each of a toy model's shapes."""
    import torch

    from internlm3 import kernels

    from ..cases import Size, cases

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    toy = Size(hidden=128, intermediate=192, vocabulary=640, heads=4, kv_heads=2, head_dim=32)
    for case in cases(toy, [getattr(torch, dtype)], batches=[1, 3], chunks=[4, 20], contexts=[70]):
        getattr(kernels, case.op)(**case.arguments(device))
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    launch(*sys.argv[1:])
