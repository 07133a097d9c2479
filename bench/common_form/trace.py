"""A trace: what the check of a solution on a workload found, in the common form."""

import json
import math
from datetime import datetime, timezone
from typing import Any

import torch

from ..record import PACKAGES, device_name, version_of
from .check import Verdict
from .definition import Definition
from .solution import Solution
from .workload import Workload


def trace(definition: Definition, workload: Workload, solution: Solution, verdict: Verdict) -> str:
    """One line of JSON."""
    evaluation: dict[str, Any] = {"status": verdict.status, "log": verdict.log, "correctness": None}
    evaluation["performance"] = None
    if verdict.errors is not None:
        relative, absolute = map(_number, verdict.errors)
        evaluation["correctness"] = {"max_relative_error": relative, "max_absolute_error": absolute}
    if verdict.times is not None:
        own, reference = verdict.times
        times = {"latency_ms": own, "reference_latency_ms": reference, "speedup_factor": reference / own}
        evaluation["performance"] = times
    libs = {name: found for name in PACKAGES if (found := version_of(name))}
    if torch.version.cuda:
        libs["cuda"] = torch.version.cuda
    evaluation["environment"] = {"hardware": device_name().replace(" ", "_"), "libs": libs}
    evaluation["timestamp"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    content = {"definition": definition.name, "workload": workload.content, "solution": solution.name}
    return json.dumps({**content, "evaluation": evaluation}, allow_nan=False)


def _number(x: float) -> float | str:
    """JSON has no NaN and no infinity: SOL-ExecBench writes them as strings."""
    return x if math.isfinite(x) else "NaN" if math.isnan(x) else "Infinity"
