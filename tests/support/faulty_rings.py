"""The ring of bench/candidates with planted faults. Run by test_trial.py in a process without Triton's interpreter:

    python -m tests.support.faulty_rings FOLDER

prints as JSON what the audit finds for each fault. FOLDER is for the faulty sources: Triton reads them from files.
"""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import torch

from bench import ROOT
from bench.candidates.settings import Ring
from bench.machine_code.launches import compile_launches
from bench.machine_code.reader import read
from bench.machine_code.targets import TARGETS

WEIGHTS = "        if i < CHUNKS:\n            _load(w_ring"
FAULTS: dict[str, list[tuple[str, str]]] = {  # name -> what is replaced in the source, and by what
    "none": [],
    "late weights": [("    _trigger()\n", "    _trigger()\n    _wait()\n")],
    "few weights": [(WEIGHTS, WEIGHTS.replace("CHUNKS", "CHUNKS - 4"))],
    "early activations": [("    _wait()\n\n    x_row", "    x_row"), ("    summed:", "    _wait()\n    summed:")],
    "no trigger": [("    _trigger()\n", "")],
}


def changed(folder: str | Path, name: str, changes: list[tuple[str, str]]) -> ModuleType:
    """bench/candidates/ring.py with these replacements, each of a text that occurs once."""
    source = (ROOT / "bench" / "candidates" / "ring.py").read_text()
    for old, new in changes:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    file = Path(folder, f"{name.replace(' ', '_')}.py")
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(f"bench.candidates.{file.stem}", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def arguments(device: torch.device) -> dict:
    x, weight = (torch.empty(rows, 1024, dtype=torch.bfloat16, device=device) for rows in (4, 4096))
    return {"x": x, "weight": weight, "parts": 1, "ring": Ring()}


def main(folder: str) -> None:
    from bench.trial.audit import TARGET, wrong_with  # it takes Triton's interpreter out of the environment

    found = {}
    for name, changes in FAULTS.items():
        faulty = changed(folder, name, changes)
        (launch,) = compile_launches(faulty.partial_products, arguments, TARGETS[TARGET])
        found[name] = wrong_with(launch, read(launch, TARGETS[TARGET]))
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
