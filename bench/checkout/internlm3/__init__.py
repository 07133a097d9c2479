"""This checkout as the package `internlm3`, whatever the environment has installed under that name.

If `bench/checkout` is first on the path, `import internlm3` runs this file. It replaces itself by the package at the
root of this checkout (of INTERNLM3_CHECKOUT, if set: bench/workers.py compares two checkouts). Tests and benchmarks set
the path this way, so several checkouts can share one environment.
"""

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(os.environ.get("INTERNLM3_CHECKOUT") or Path(__file__).resolve().parents[3])
spec = importlib.util.spec_from_file_location("internlm3", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
assert spec is not None and spec.loader is not None
sys.modules["internlm3"] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
