"""Benchmarks, the audit of machine code, and the checks that need a GPU.

Programs, run from the root of the repository: `python -m bench.ops`, `.common_form`, `.conformance`, `.gpu`, `.report`,
`.demo_model`, `.batching`, `.launch_overhead`, `.step_model`, `.audit`. bench/README.md describes them.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHECKOUT = str(ROOT / "bench" / "checkout")

# In this process and its children `internlm3` is this checkout and `bench` this package: see bench/checkout.
if CHECKOUT not in sys.path:
    sys.path.insert(0, CHECKOUT)
if CHECKOUT not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (CHECKOUT, os.environ.get("PYTHONPATH"))))
# `python -m` puts the root on the path. Its folder `kernels` would shadow the registry package of that name, which
# transformers looks for.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != ROOT]
