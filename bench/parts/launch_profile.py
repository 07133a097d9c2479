"""Where a step's time goes, launch by launch, as CUPTI sees the graph replay.

What a launch adds is from its predecessor's end to its own: launches overlap, so that how long each runs says less.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from internlm3 import InternLM3ForCausalLM
from internlm3.runtime.engine.graphs import cuda_graphs
from internlm3.runtime.engine.state import Tier
from .bare_step import random_model
from .decode import ready
from ..rows import Part, Row

SHAPES = ((1, 1024), (1, 32768), (4, 1024), (16, 1024))  # rows, tokens held
REPLAYS = 4


def rows(small: bool) -> Iterator[Row]:
    part = Part("where")
    if small:
        yield part.missing("a step, launch by launch", "a GPU's graphs")
        return
    model = random_model(small)
    for count, context in SHAPES:
        name = f"{count} row{'s' * (count > 1)}, {context} held"
        added = what_launches_add(model, count, context)
        step = sum(map(sum, added.values())) / (REPLAYS - 1)
        yield part.figure(f"{name}: a step", [step], "us")
        for launch, times in sorted(added.items(), key=lambda item: -sum(item[1])):
            share = sum(times) / (REPLAYS - 1) / step
            note = f"x {len(times) / (REPLAYS - 1):.0f}, {share:.1%} of the step"
            yield part.figure(f"{name}: {launch}", times, "us", note)


def what_launches_add(model: InternLM3ForCausalLM, rows: int, context: int) -> dict[str, list[float]]:
    """Microseconds that each launch of some replays adds, by kernel, grid and registers."""
    steps = ready(model, rows, context + REPLAYS + 4)
    steps.hold(context)
    with torch.inference_mode():
        replay = cuda_graphs()(partial(steps.step, Tier.USUAL))
        replay()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
            for _ in range(REPLAYS):
                replay()
            torch.cuda.synchronize()
    launches = traced(profile)
    added = defaultdict(list)
    # The first replay begins with what lies before it.
    first = len(launches) // REPLAYS
    for before, launch in zip(launches[first - 1 :], launches[first:], strict=False):
        ends = [each["ts"] + each["dur"] for each in (before, launch)]
        about = launch["args"]
        grid, registers = "x".join(map(str, about["grid"])), about["registers per thread"]
        added[f"{launch['name']} {grid}, {registers} registers"].append(ends[1] - ends[0])
    return dict(added)


def traced(profile: Any) -> list[dict[str, Any]]:
    """The launches that a profile saw, by their beginning."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text("utf-8"))["traceEvents"]
    return sorted((event for event in events if event.get("cat") == "kernel"), key=lambda event: event["ts"])
