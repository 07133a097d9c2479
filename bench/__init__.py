"""Benchmarks, the audit of machine code, and the checks that need a GPU.

Programs, each run from the repository root: `python -m bench.ops`, `.gpu`, `.report`, `.demo_model`, `.batching`,
`.launch_overhead`, `.step_model`, `.audit`. bench/README.md describes them.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHECKOUT = str(ROOT / "bench" / "checkout")

# `import internlm3` gives this checkout, here and in child processes: see bench/checkout/internlm3/__init__.py.
if CHECKOUT not in sys.path:
    sys.path.insert(0, CHECKOUT)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (CHECKOUT, os.environ.get("PYTHONPATH"))))
# `python -m bench.ops` puts the root on the path, where its `kernels` would shadow the registry's package of that name,
# which transformers looks for. Modules of bench are found by the path of this package.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != ROOT]
