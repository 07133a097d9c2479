"""This checkout's package `bench`, for processes that have `bench/checkout` on the path but not the root."""

import importlib.util
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("bench", BENCH / "__init__.py", submodule_search_locations=[str(BENCH)])
assert spec is not None and spec.loader is not None
sys.modules["bench"] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
