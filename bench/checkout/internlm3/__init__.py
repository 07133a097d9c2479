"""This checkout as the package `internlm3`, whatever the environment has installed under that name.

With `bench/checkout` first on the path, `import internlm3` runs this file, which puts the package that is the root of
this checkout in its place. Tests, benches and `make` set the path so: two checkouts may share one environment.
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
spec = importlib.util.spec_from_file_location("internlm3", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
assert spec is not None and spec.loader is not None
sys.modules["internlm3"] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
