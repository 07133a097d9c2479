"""Where the time of a decode step goes, launch by launch, as CUPTI records the replay of its graph.

A launch adds the time from its predecessor's end to its own end. Launches overlap, so their durations say less.
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

from ..record import Part, Row
from .bare_step import random_model
from .decode import needs, ready, shape_of

SHAPES = ((1, 1024), (1, 32768), (4, 1024), (16, 1024))  # batch size, context length
REPLAYS = 4


def rows(small: bool, name: str) -> Iterator[Row]:
    part = Part("launch_profile")
    if small:
        yield part.missing("a step, launch by launch", "needs a GPU's graphs")
        return
    model = random_model(small, name)
    for batch, context in SHAPES:
        shape = shape_of(batch, context)
        added = added_times(model, batch, context)
        step = sum(map(sum, added.values())) / (REPLAYS - 1)
        yield part.figure(f"{shape}: a step", [step], "us", **needs(model, batch, context))
        for launch, times in sorted(added.items(), key=lambda item: -sum(item[1])):
            share = sum(times) / (REPLAYS - 1) / step
            note = f"x {len(times) / (REPLAYS - 1):.0f}, {share:.1%} of the step"
            yield part.figure(f"{shape}: {launch}", times, "us", note)


def added_times(model: InternLM3ForCausalLM, batch: int, context: int) -> dict[str, list[float]]:
    """Microseconds that each launch adds, over a few replays, by kernel, grid and registers."""
    steps = ready(model, batch, context + REPLAYS + 4)
    steps.set_context(context)
    with torch.inference_mode():
        replay = cuda_graphs()(partial(steps.step, Tier.USUAL))
        replay()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
            for _ in range(REPLAYS):
                replay()
            torch.cuda.synchronize()
    launches = launches_of(profile)
    added = defaultdict(list)
    # The first replay is left out: it starts after whatever came before it.
    first = len(launches) // REPLAYS
    for before, launch in zip(launches[first - 1 :], launches[first:], strict=False):
        ends = [each["ts"] + each["dur"] for each in (before, launch)]
        about = launch["args"]
        grid, registers = "x".join(map(str, about["grid"])), about["registers per thread"]
        added[f"{launch['name']} {grid}, {registers} registers"].append(ends[1] - ends[0])
    return dict(added)


def launches_of(profile: Any) -> list[dict[str, Any]]:
    """The kernel launches of a profile, in order."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text("utf-8"))["traceEvents"]
    return sorted((event for event in events if event.get("cat") == "kernel"), key=lambda event: event["ts"])
